"""Distances between sets of features, by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.distribution import cmmd, dissimilarity, fid, kid, precision_recall, vendi


def cloud(seed: int, n: int = 40, d: int = 5) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(-5, 5), st.floats(0.1, 4))
def test_fid_of_scaled_and_shifted_copies(shift: float, scale: float) -> None:
    """S_b = scale^2 S_a: |shift|^2 D + (1 - scale)^2 Tr S_a."""
    a = cloud(0) - cloud(0).mean(0)
    expected = 5 * shift**2 + (1 - scale) ** 2 * torch.cov(a.T).trace().item()
    assert fid(a, scale * a + shift) == pytest.approx(expected, abs=1e-8)


def test_fid_of_covariances_that_do_not_commute() -> None:
    a, b = cloud(1), cloud(2) @ cloud(3, 5)
    product = torch.cov(a.T) @ torch.cov(b.T)
    cross = torch.linalg.eigvals(product).sqrt().sum().real
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross
    assert fid(a, b) == pytest.approx(expected.item())
    assert fid(a, b) == pytest.approx(fid(b, a))


def test_kid_by_hand() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    expected = 3.0**3 + 1.0**3 - 2 * (1 + 8 + 1 + 27) / 4
    assert kid(a, b) == pytest.approx(expected)


def test_kid_of_one_distribution_is_zero_in_the_mean() -> None:
    values = torch.tensor([kid(cloud(2 * i), cloud(2 * i + 1)) for i in range(200)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)


def test_cmmd_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.5]])  # unit vectors at distance sqrt 2
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    assert cmmd(a, 7 * a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_see_which_side_misses() -> None:
    real = torch.cat([cloud(0), cloud(1) + 50])
    made = real[:40] + 1e-3
    assert precision_recall(real, made) == (1, 0.5)
    assert precision_recall(made, real) == (0.5, 1)


def test_vendi_counts_what_differs() -> None:
    assert vendi(torch.eye(6)) == pytest.approx(6)
    assert vendi(torch.ones(6, 3)) == pytest.approx(1)
    assert vendi(torch.eye(3).repeat(4, 1)) == pytest.approx(3)
    x = torch.nn.functional.normalize(cloud(4), dim=-1)
    p = torch.linalg.eigvalsh(x @ x.T / 40).clamp(min=1e-300)
    assert vendi(cloud(4)) == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_dissimilarity_is_the_mean_over_pairs() -> None:
    assert dissimilarity(torch.tensor([[1.0, 0], [0, 2], [-3, 0]])) == pytest.approx(1 - (0 + 0 - 1) / 3)
    assert dissimilarity(torch.ones(4, 2)) == pytest.approx(0)
