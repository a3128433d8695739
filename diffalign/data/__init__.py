"""Preference data: one schema, readers, atomic resumable writers, and a cache."""
