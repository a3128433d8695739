"""The training loop, its feeds, its state, and evaluation."""
