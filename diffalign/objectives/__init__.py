"""Preference losses: pure functions of denoise errors.

To add one: a class with ``type``, ``needs`` and ``__call__``, and its line in the table below; out of the tree, only
the class, named in a config as ``type: pkg.mod:Class`` and checked by :mod:`diffalign.testing`.
"""

from __future__ import annotations

from diffalign.objectives.base import LossOutput, Need, Objective, PairTerms, Total
from diffalign.objectives.metrics import pair_metrics
from diffalign.objectives.pairwise import MaPO, Sigmoid
from diffalign.objectives.supervised import SFT
from diffalign.spec import Choice

OBJECTIVES = Choice(
    Objective,
    {
        "sigmoid": Sigmoid,
        "mapo": MaPO,
        "sft": SFT,
    },
    aliases={"dpo": "sigmoid"},
)

__all__ = ["OBJECTIVES", "SFT", "LossOutput", "MaPO", "Need", "Objective", "PairTerms", "Sigmoid", "Total", "pair_metrics"]
