"""Objectives: closed forms, symmetries, and the checks that every one must pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_losses import VARIANTS

from diffalign.objectives import (
    OBJECTIVES,
    SFT,
    GroupTerms,
    LabelTerms,
    MaPO,
    Objective,
    PairTerms,
    Sigmoid,
    Total,
    group_metrics,
    label_metrics,
    pair_metrics,
)
from diffalign.objectives.pairwise import Pairwise
from diffalign.testing import check_objective, random_terms

PARAMETERS: dict[str, dict[str, float]] = {
    "sigmoid": {"beta": 500},
    "ipo": {"beta": 50},
    "hinge": {"beta": 50},
    "f_dpo": {"beta": 500},
    "linear": {"beta": 500},
    "dspo": {"beta": 0.5},
    "repo": {"beta": 50},
    "dro_hinge": {"mu": 0.1},
    "flow_dppo": {"tau": 3e-5},  # no random KL within a step of finite differences
}
"""Settings at which random terms are not all in a flat part of the loss."""


@pytest.mark.parametrize(
    ("name", "settings"), [*((n, {}) for n in OBJECTIVES.options), *VARIANTS, ("awm", {"near": 1.0})], ids=str
)
def test_contract(name: str, settings: dict[str, Any]) -> None:
    check_objective(OBJECTIVES.options[name](**PARAMETERS.get(name, {}) | settings), prefers=name not in {"kl", "rwr"})


@pytest.mark.parametrize("name", [n for n, cls in OBJECTIVES.options.items() if issubclass(cls, Pairwise) and n != "dspo"])
def test_contract_of_a_scale_that_moves(name: str) -> None:
    check_objective(OBJECTIVES.options[name](**PARAMETERS.get(name, {}), auto_beta=0.2))


@pytest.mark.parametrize("name", OBJECTIVES.options)
def test_every_objective_says_what_it_is(name: str) -> None:
    cls = OBJECTIVES.options[name]
    first = (cls.__doc__ or "").splitlines()[0]
    assert ":" in first or "." in first
    assert cls.paper
    assert cls.checked


def terms(w: float, l: float, rw: float | None = None, rl: float | None = None) -> PairTerms:  # noqa: E741
    one = lambda v: None if v is None else torch.tensor([v], dtype=torch.double)  # noqa: E731
    return PairTerms(one(w), one(l), one(rw), one(rl), t=torch.tensor([0.3]))


def test_dpo_is_ln_2_where_policy_is_reference() -> None:
    t = random_terms(frozenset({"loser", "reference"}))
    at_start = replace(t, winner=t.ref_winner, loser=t.ref_loser)
    out = Sigmoid(beta=5000)(at_start, {})
    assert out.loss.tolist() == [math.log(2)] * 8
    assert pair_metrics(at_start)["margin"].tolist() == [0.0] * 8
    assert pair_metrics(at_start)["accuracy"].tolist() == [0.5] * 8


def test_dpo_golden_value() -> None:
    """m = (0.30 - 0.28) - (0.19 - 0.20) = 0.03; log(1 + exp(-0.5 * 100 * 0.03)) by hand."""
    out = Sigmoid(beta=100, kappa=0.5)(terms(0.19, 0.30, 0.20, 0.28), {})
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-12)


def test_kappa_and_beta_only_matter_as_a_product() -> None:
    t = random_terms(frozenset({"loser", "reference"}))
    torch.testing.assert_close(Sigmoid(beta=5000, kappa=0.5)(t, {}).loss, Sigmoid(beta=2500, kappa=1.0)(t, {}).loss)


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_swapping_winner_and_loser_flips_the_margin(e: list[float]) -> None:
    t = terms(*e)
    swapped = PairTerms(t.loser, t.winner, t.ref_loser, t.ref_winner, t=t.t)
    assert pair_metrics(swapped)["margin"].item() == pytest.approx(-pair_metrics(t)["margin"].item(), abs=1e-12)
    lost, won = Sigmoid(beta=10)(swapped, {}).loss.item(), Sigmoid(beta=10)(t, {}).loss.item()
    margin = pair_metrics(t)["margin"].item()
    assert lost - won == pytest.approx(5 * margin, abs=1e-9)  # softplus(z) - softplus(-z) = z


def test_mapo_golden_value() -> None:
    """phi(e) = s e / (exp(s e) - 1), written out plainly."""
    phi = lambda e: 0.5 * e / (math.exp(0.5 * e) - 1)  # noqa: E731
    logit = 1000 * (phi(0.20) - phi(0.21))
    wanted = 0.20 + 0.1 * math.log1p(math.exp(-logit))
    assert MaPO()(terms(0.20, 0.21), {}).loss.item() == pytest.approx(wanted, rel=1e-9)


def test_mapo_has_a_limit_at_zero_error_and_no_overflow() -> None:
    zero, tiny, huge = MaPO()(terms(0.0, 0.0), {}), MaPO()(terms(1e-9, 1e-9), {}), MaPO()(terms(5000.0, 5000.0), {})
    assert zero.loss.item() == pytest.approx(0.1 * math.log(2))
    assert tiny.loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-6)
    assert huge.loss.isfinite().all()


def test_sft_is_the_winners_error_and_asks_for_nothing_else() -> None:
    assert SFT()(PairTerms(torch.tensor([0.2, 0.4])), {}).loss.tolist() == pytest.approx([0.2, 0.4])
    assert SFT.needs == frozenset()


def test_a_sum_weights_its_parts_and_joins_their_needs() -> None:
    t = random_terms(frozenset({"loser", "reference"}))
    both = Total((Sigmoid(beta=100), SFT(weight=0.25)))
    torch.testing.assert_close(both(t, {}).loss, Sigmoid(beta=100)(t, {}).loss + 0.25 * t.winner)
    assert both.needs == {"loser", "reference"}


def test_drift_is_policy_minus_reference() -> None:
    m = pair_metrics(terms(0.25, 0.30, 0.20, 0.28))
    assert m["drift/winner"].item() == pytest.approx(0.05)
    assert m["drift/loser"].item() == pytest.approx(0.02)
    assert m["margin"].item() == pytest.approx(-0.03)
    assert m["margin/q2"].item() == pytest.approx(-0.03)
    assert m["margin/q1"].isnan().all()


def test_metrics_of_labels_and_groups() -> None:
    e, ref = torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.3])
    m = label_metrics(LabelTerms(e, torch.tensor([True, True, False]), ref))
    assert m["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert m["drift/winner"][:2].tolist() == pytest.approx([-0.1, 0.1])
    assert m["drift/loser"].isnan().tolist() == [True, True, False]
    scores = torch.tensor([[0.9, 0.5, 0.1]])
    g = group_metrics(GroupTerms(e[None], scores, ref[None]))
    assert g["margin"].item() == pytest.approx(0.1)  # 0 - (-0.1)
    assert g["accuracy"].item() == pytest.approx(2 / 3)  # drifts -0.1, 0.1, 0: of three pairs the last is out of order


class Broken(Objective):
    """Averages over the batch before the nonlinearity: a published bug."""

    needs = frozenset({"loser", "reference"})

    def __call__(self, terms, state):  # type: ignore[no-untyped-def]
        from diffalign.objectives import LossOutput

        margin = ((terms.ref_winner - terms.winner) - (terms.ref_loser - terms.loser)).mean()
        return LossOutput(-torch.nn.functional.logsigmoid(margin).expand(len(terms.winner)))


def test_the_test_kit_catches_a_batch_mean_inside_the_loss() -> None:
    with pytest.raises(AssertionError, match="rows"):
        check_objective(Broken())
