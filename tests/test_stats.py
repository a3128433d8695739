"""Estimates against closed forms and simulation."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import stats


def test_clustered_error_counts_prompts_not_images() -> None:
    """Copies of a prompt's value add no information."""
    one = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    e, copies = stats.clustered_mean(one), stats.clustered_mean(one.expand(50, 8))
    assert copies.se == pytest.approx(e.se)
    assert e.se == pytest.approx(one.double().std().item() / math.sqrt(50))


def test_bootstrap_of_one_run_matches_the_normal_error() -> None:
    v = torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    e = stats.bootstrap_mean(v)
    assert e.value == pytest.approx(v.mean().item(), abs=1e-6)
    assert e.se == pytest.approx(v.std().item() / 20, rel=0.05)
    assert e.low < e.value < e.high


def test_bootstrap_over_runs_covers_the_truth() -> None:
    """Runs and prompts both vary; the 95 % interval holds 0 in at least 90 of 100 worlds."""
    hits = 0
    for world in range(100):
        g = torch.Generator().manual_seed(world)
        v = 0.1 * torch.randn(5, 1, generator=g) + torch.randn(1, 60, generator=g) + 0.3 * torch.randn(5, 60, generator=g)
        e = stats.bootstrap_mean(v, draws=1000, seed=world)
        hits += e.low <= 0 <= e.high
    assert hits >= 90


def test_bootstrap_refuses_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\(runs, prompts\)"):
        stats.bootstrap_mean(torch.zeros(3))


def test_win_rate_counts_ties_one_half() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    assert stats.win_rate(a, b).value == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
    assert stats.win_rate(a, a).value == 0.5


def test_holm_on_a_textbook_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_diversity_is_zero_for_copies_and_one_for_black_and_white() -> None:
    same = torch.rand(2, 1, 3, 4, 4).expand(2, 3, 3, 4, 4)
    assert stats.diversity(same) == 0.0
    opposite = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])[None]
    assert stats.diversity(opposite) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two images"):
        stats.diversity(same[:, :1])
