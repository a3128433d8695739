"""Estimates with honest errors: prompts are the clusters, seeds and training runs are crossed with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and 95 % interval."""

    value: float
    se: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def clustered_mean(values: Tensor) -> Estimate:
    """Mean of ``values`` (P prompts, K seeds), the error clustered by prompt (rows may be correlated within)."""
    means = values.double().flatten(1).mean(1)
    value = means.mean().item()
    se = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.nan
    return Estimate(value, se, value - 1.96 * se, value + 1.96 * se)


def bootstrap_mean(values: Tensor, *, draws: int = 10_000, seed: int = 0) -> Estimate:
    """Percentile bootstrap of the mean of ``values`` (R runs, P prompts), both axes resampled (a pigeonhole bootstrap).

    Owen 2007: resampling rows and columns together gives an interval that covers new runs and new prompts alike, and is
    slightly conservative. With one run only prompts are resampled. Pass paired differences to compare two conditions.
    """
    v = values.double()
    if v.dim() != 2:
        raise ValueError(f"expected values of shape (runs, prompts), got {tuple(v.shape)}")
    r, p = v.shape
    g = torch.Generator().manual_seed(seed)
    means = []
    for size in (1000,) * math.ceil(draws / 1000):
        # the mean over resampled rows and columns is a bilinear form of their multiplicities
        rows = torch.nn.functional.one_hot(torch.randint(r, (size, r), generator=g), r).sum(1).double() / r
        cols = torch.zeros(size, p, dtype=torch.double)
        cols.scatter_add_(1, torch.randint(p, (size, p), generator=g), torch.ones(size, p, dtype=torch.double))
        means.append(torch.einsum("dr,rp,dp->d", rows, v, cols / p))
    m = torch.cat(means)[:draws]
    low, high = torch.quantile(m, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(v.mean().item(), m.std().item(), low, high)


def win_rate(a: Tensor, b: Tensor) -> Estimate:
    """Share of cells (P prompts, K seeds) where ``a`` beats ``b``; ties count one half; clustered by prompt."""
    e = clustered_mean((a > b).double() + 0.5 * (a == b).double())
    return Estimate(e.value, e.se, max(0.0, e.low), min(1.0, e.high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = running
    return out


def diversity(images: Tensor) -> float:
    """Mean distance between pictures of the same prompt: ``images`` (P, K, C, H, W) in [0, 1], K of at least 2.

    Root mean square over pixels of each pair of seeds, averaged over pairs and prompts; 0 where all seeds agree.
    """
    flat = images.double().flatten(2)
    k = flat.shape[1]
    if k < 2:
        raise ValueError("diversity needs at least two images per prompt")
    i, j = torch.triu_indices(k, k, offset=1)
    return (flat[:, i] - flat[:, j]).square().mean(-1).sqrt().mean().item()
