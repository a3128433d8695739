"""What keeps winners from being lost, whatever the objective."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffalign.objectives.base import PairTerms, require


def protected(terms: PairTerms, mu: float) -> PairTerms:
    """Diffusion-SDPO (arXiv 2511.03317): scale the loser's gradient so that the winner's error does not rise at first order.

    The share is (1 - mu) |rho_w|^2 / <rho_w, rho_l>, held in [0, 1], and 1 where the residuals rho do not point the same way.
    Values stay as they are. It is per pair, where the authors' code takes the micro-batch as one.
    """
    overlap, loser = require(terms.overlap, "overlap"), require(terms.loser, "loser")
    safe = overlap.clamp(min=1e-9)
    share = torch.where(overlap > 0, ((1 - mu) * terms.winner.detach() / safe).clamp(0, 1), 1.0)
    fixed = loser.detach()
    return replace(terms, loser=fixed + share * (loser - fixed))
