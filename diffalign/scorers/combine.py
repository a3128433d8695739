"""Combining values: pure functions of (..., K) tensors, K images of one prompt last. NaN stays NaN.

Raw sums of different scorers are sums of different units: standardise within the prompt (``zscore``, ``rank``) first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_n w_n v_n over the names of ``weights``."""
    return torch.stack([w * values[name] for name, w in weights.items()]).sum(0)


def zscore(values: Tensor) -> Tensor:
    """(v - mean) / std within the group, of the population; 0 where all are equal."""
    centred = values - values.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    tiny = std <= 1e-6 * values.abs().amax(-1, keepdim=True)  # rounding of equal values is no difference
    return torch.where(tiny, torch.zeros_like(centred), centred / std)


def beats(values: Tensor) -> Tensor:
    """(..., K, K): 1 where i is better than j, 0 where worse, one half where equal."""
    return (values[..., :, None] - values[..., None, :]).sign() / 2 + 0.5


def win_rate(wins: Tensor) -> Tensor:
    """Mean over the others of P(i beats j), (..., K, K) to (..., K). Ties and unread verdicts are one half (Pref-GRPO)."""
    k = wins.shape[-1]
    return (wins.sum(-1) - wins.diagonal(dim1=-2, dim2=-1)) / (k - 1)


def rank(values: Tensor) -> Tensor:
    """Rank within the group, 0 worst to 1 best, ties shared: the win rate of the values themselves."""
    return win_rate(beats(values))


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


def par(values: Tensor, reference: Tensor, k: float = 1.0) -> Tensor:
    """Preference as reward: mean_m sigmoid(k (r - r_m)), in (0, 1) (Fu et al. 2025).

    ``reference`` (..., M) are rewards of the reference model on the same prompt; at most 10 do.
    """
    return torch.sigmoid(k * (values[..., :, None] - reference[..., None, :])).mean(-1)


def hinge(values: Tensor, target: float) -> Tensor:
    """-relu(target - v): no reward for going beyond the target (ReFL 2, DreamReward 4)."""
    return -(target - values).relu()


def ensemble(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the members and their disagreement (population deviation), of values in one unit."""
    stacked = torch.stack(list(values.values()))
    return stacked.mean(0), stacked.std(0, correction=0)
