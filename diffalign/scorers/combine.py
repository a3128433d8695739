"""Combining values: pure functions of (..., K) tensors, K images of one prompt last. NaN stays NaN.

Raw sums of different scorers are sums of different units: standardise within the prompt (``zscore``, ``rank``) first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.advantages import beats, hinge, par, rank, weighted, win_rate, zscore

__all__ = [
    "beats", "ensemble", "gate", "hinge", "minimum", "par", "rank", "weighted", "win_rate", "worst_off", "zscore",
]  # fmt: skip


def minimum(values: Mapping[str, Tensor]) -> Tensor:
    """The smallest of the scorers, image by image: no scorer can be traded for another."""
    return torch.stack(list(values.values())).amin(0)


def worst_off(values: Mapping[str, Tensor]) -> Tensor:
    """Max-min: the values of the scorer (or user group) that is worst off in the mean over all images.

    Its mean is min_u E[r_u], so an ascent on it is one on the worst (Chakraborty et al. 2024, MaxMin-RLHF).
    """
    return min(values.values(), key=lambda v: v.mean().item())


def gate(values: Tensor, margin: Tensor, blocked: float) -> Tensor:
    """``values`` where the margin is above 0 (safe), ``blocked`` elsewhere; NaN where the margin is."""
    return torch.where(margin > 0, values, torch.where(margin.isnan(), margin, torch.full_like(values, blocked)))


def ensemble(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the members and their disagreement (population deviation), of values in one unit."""
    stacked = torch.stack(list(values.values()))
    return stacked.mean(0), stacked.std(0, correction=0)
