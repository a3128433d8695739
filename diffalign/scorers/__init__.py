"""Reward models over images and prompts."""

from __future__ import annotations

from diffalign.scorers.base import Callback, ScoreBatch, ScoreInput, Scorer, import_scorer

__all__ = ["Callback", "ScoreBatch", "ScoreInput", "Scorer", "import_scorer"]
