"""Distances between two sets of pictures, on their features (N, D), and diversity within one. Report N beside every number."""

from __future__ import annotations

import torch
from torch import Tensor


def fid(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S with N - 1. Heusel et al. 2017; biased in N.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    """
    x, y = a.double(), b.double()
    cov_a, cov_b = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kid(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^3, over all pairs. Binkowski et al. 2018."""
    x, y = a.double(), b.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.trace()) / (len(u) * (len(u) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def cmmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """1000 x the biased squared MMD of unit vectors, kernel exp(-d^2 / (2 sigma^2)). Jayasumana et al. 2024.

    Published on CLIP L/14 at 336 px.
    """
    x, y = (torch.nn.functional.normalize(v.double(), dim=-1) for v in (a, b))

    def mean(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(u, v).square() / (2 * sigma**2)).mean()

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)).item()


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of ``made`` within the k-th neighbour's distance of some real one, and the other way. Kynkaanniemi et al. 2019."""

    def covered(points: Tensor, by: Tensor) -> float:
        radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values  # the first neighbour is the point itself
        return (torch.cdist(points, by) <= radius).any(1).double().mean().item()

    x, y = real.double(), made.double()
    return covered(y, x), covered(x, y)


def vendi(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of the cosine matrix over N: 1 (all alike) to N. Friedman and Dieng 2023."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    smaller = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # the same eigenvalues but for zeros
    p = torch.linalg.eigvalsh(smaller / len(x)).clamp(min=0)
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def dissimilarity(features: Tensor) -> float:
    """1 - the mean cosine of all pairs: 0 (all alike) upwards. At least two rows."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    n = len(x)
    return (1 - (x.sum(0).square().sum() - n) / (n * (n - 1))).item()
