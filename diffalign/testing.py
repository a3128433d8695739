"""Checks that any objective must pass, for tests in and out of the tree.

from diffalign.testing import check_objective
check_objective(MyObjective(beta=2.0))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.objectives import (
    GroupTerms,
    ImageTerms,
    LabelTerms,
    Objective,
    PairTerms,
    RewardTerms,
    StepTerms,
    Terms,
    Total,
)
from diffalign.spec import Spec, dump

T = TypeVar("T", bound=Terms)
_ERRORS = ("winner", "loser", "error", "distance", "distance_average", "log_ratio", "kl_old", "kl_ref", "residual", "reward")


def random_terms(needs: frozenset[str], rows: int = 8, seed: int = 0) -> PairTerms:
    """Plausible errors: near 0.2, the policy within a few percent of the reference; only what ``needs`` names."""
    g = torch.Generator().manual_seed(seed)
    ref = 0.2 + 0.05 * torch.rand(2, rows, generator=g, dtype=torch.double)
    now = ref + 0.002 * torch.randn(2, rows, generator=g, dtype=torch.double)
    both = "loser" in needs
    seen = "reference" in needs
    t = torch.rand(rows, generator=g)
    scores = torch.rand(2, rows, generator=g, dtype=torch.double).sort(0, descending=True).values
    more = {
        "p_win": ("p_win", 0.5 + 0.5 * torch.rand(rows, generator=g, dtype=torch.double)),
        "distance": ("distance", 1e-4 * torch.rand(rows, generator=g, dtype=torch.double)),
        "overlap": ("overlap", 0.1 * torch.rand(rows, generator=g, dtype=torch.double)),
    }
    given: dict[str, Any] = {name: value for need, (name, value) in more.items() if need in needs}
    if "scores" in needs:
        given |= {"score_winner": scores[0], "score_loser": scores[1]}
    if "old" in needs:
        old = now + 1e-4 * torch.randn(2, rows, generator=g, dtype=torch.double)
        given |= {"old_winner": old[0], "old_loser": old[1] if both else None}
    return PairTerms(
        now[0], now[1] if both else None, ref[0] if seen else None, ref[1] if seen and both else None, t=t, **given
    )


def random_labels(needs: frozenset[str], rows: int = 8, seed: int = 0) -> LabelTerms:
    """Single images, every other one good."""
    p = random_terms(frozenset({"reference"}) | needs, rows, seed)
    return LabelTerms(p.winner, torch.arange(rows) % 2 == 0, p.ref_winner, t=p.t, distance=p.distance)


def random_groups(rows: int = 8, size: int = 4, seed: int = 0) -> GroupTerms:
    """Groups of ``size`` images with scores in [0, 1]."""
    p = random_terms(frozenset({"reference"}), rows * size, seed)
    assert p.ref_winner is not None
    scores = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return GroupTerms(p.winner.view(rows, size), scores, p.ref_winner.view(rows, size), t=torch.rand(rows))


def random_steps(needs: frozenset[str], rows: int = 8, seed: int = 0) -> StepTerms:
    """Steps of a policy that has moved: log ratios of about 1e-3, every other advantage above 0."""
    g = torch.Generator().manual_seed(seed)
    log_ratio = 1e-3 * torch.randn(rows, generator=g, dtype=torch.double)
    size, kl, ref, std, t = torch.rand(5, rows, generator=g, dtype=torch.double)
    advantage = (0.1 + size) * (1 - 2 * (torch.arange(rows) % 2))
    kl_ref = 1e-4 * ref if "reference" in needs else None
    return StepTerms(log_ratio, advantage, 1e-4 * kl, 0.1 + 0.5 * std, torch.full_like(t, 0.1), kl_ref, t=t)


def random_images(needs: frozenset[str], rows: int = 8, seed: int = 0) -> ImageTerms:
    """Own samples of a policy that has moved a little since, every other advantage above 0."""
    p = random_terms(frozenset({"reference", "distance"}), rows, seed)
    g = torch.Generator().manual_seed(seed + 1)
    old = p.winner + 1e-3 * torch.randn(rows, generator=g, dtype=torch.double)
    advantage = (0.1 + torch.rand(rows, generator=g, dtype=torch.double)) * (1 - 2 * (torch.arange(rows) % 2))
    residual = 0.4 * torch.randn(rows, 6, generator=g, dtype=torch.double)
    other = residual + 0.01 * torch.randn(rows, 6, generator=g, dtype=torch.double)
    asked, near = "residual" in needs, 1e-4 * torch.rand(rows, generator=g, dtype=torch.double)
    return ImageTerms(
        p.winner, advantage, old if "old" in needs else None, p.ref_winner if "reference" in needs else None,
        residual=residual if asked else None, residual_old=other if asked else None,
        distance_average=near if "average" in needs else None,
        t=p.t, distance=p.distance if "distance" in needs else None, time=None if p.t is None else 3 * p.t / (1 + 2 * p.t),
    )  # fmt: skip


def random_rewards(rows: int = 8, seed: int = 0) -> RewardTerms:
    """Rewards of about 1."""
    g = torch.Generator().manual_seed(seed)
    return RewardTerms(1 + 0.3 * torch.randn(rows, generator=g, dtype=torch.double), t=torch.rand(rows, generator=g))


def terms_for(objective: Objective, rows: int = 8, seed: int = 0) -> Terms:
    """Random terms of the objective's kind."""
    match objective.data:
        case "pairs":
            return random_terms(objective.needs, rows, seed)
        case "labels":
            return random_labels(objective.needs, rows, seed)
        case "groups":
            return random_groups(rows, seed=seed)
        case "steps":
            return random_steps(objective.needs, rows, seed)
        case "images":
            return random_images(objective.needs, rows, seed)
        case "rewards":
            return random_rewards(rows, seed)


def rows_of(terms: T, rows: slice) -> T:
    """Some rows of the terms."""
    found: dict[str, Any] = {k: v[rows] for k, v in vars(terms).items() if isinstance(v, Tensor)}
    return replace(terms, **found)


def at_start(terms: T) -> T:
    """The terms of a policy that is the reference still, and the one that sampled."""
    same = {"winner": "ref_winner", "loser": "ref_loser", "error": "ref", "residual": "residual_old"}
    found = {k: v for k, ref in same.items() if (v := getattr(terms, ref, None)) is not None}
    sampled = {"old_winner": "winner", "old_loser": "loser", "old": "error"}
    found |= {old: found.get(k, getattr(terms, k)) for old, k in sampled.items() if getattr(terms, old, None) is not None}
    zero = ("distance", "distance_average", "log_ratio", "kl_old", "kl_ref")
    found |= {k: torch.zeros_like(v) for k in zero if (v := getattr(terms, k, None)) is not None}
    return replace(terms, **found)


def slopes(objective: Objective, terms: Terms) -> tuple[Tensor, Tensor]:
    """(B,) each: how each row's loss changes as the error of what is good falls, and as that of what is bad rises.

    Of steps, as the density of what is good rises; of rewards, as they rise.
    """
    names = [n for n in ("winner", "loser", "error", "residual", "log_ratio", "reward") if getattr(terms, n, None) is not None]
    inputs = {n: getattr(terms, n).detach().clone().requires_grad_(True) for n in names}
    loss = objective(replace(terms, **inputs), {}).loss.sum()
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    by_name = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=True)}
    match terms:
        case PairTerms():
            return -by_name["winner"], by_name.get("loser", torch.zeros_like(by_name["winner"]))
        case LabelTerms():
            return -by_name["error"] * terms.good, by_name["error"] * ~terms.good
        case GroupTerms():
            high = terms.scores > terms.scores.mean(-1, keepdim=True)
            return (-by_name["error"] * high).sum(-1), (by_name["error"] * ~high).sum(-1)
        case StepTerms():
            return by_name["log_ratio"] * (terms.advantage > 0), -by_name["log_ratio"] * (terms.advantage < 0)
        case ImageTerms():
            worse = by_name["error"]
            if terms.residual is not None:
                worse = worse + (by_name["residual"] * terms.residual).sum(-1)
            return -worse * (terms.advantage > 0), worse * (terms.advantage < 0)
        case RewardTerms():
            return by_name["reward"], torch.zeros_like(by_name["reward"])
    raise TypeError(type(terms).__name__)


def check_objective(objective: Objective, prefers: bool = True) -> None:
    """Assert what holds for every objective; raises AssertionError that says what does not.

    It must return one finite loss per row that depends on that row and the state alone (unless ``by_row`` is False), with
    gradients that agree with finite differences (unless ``held`` says that a factor is constant); from the reference on, a
    lower error of what is good and a higher one of what is bad must lower the loss, and neither of them alone may raise it
    (not asked of a regulariser, which ``prefers`` nothing); it must use only what it declares in ``needs``; and its
    configuration must survive a round trip.
    """
    terms = terms_for(objective)
    out = objective(terms, {})
    rows = len(terms.t) if terms.t is not None else 0
    assert out.loss.shape == (rows,), f"loss has shape {tuple(out.loss.shape)}, not one value per row"
    assert out.loss.isfinite().all(), "the loss is not finite"
    for state in ({}, out.state) if objective.by_row else ():
        one_by_one = torch.cat([objective(rows_of(terms, slice(i, i + 1)), state).loss for i in range(rows)])
        whole = objective(terms, state).loss
        torch.testing.assert_close(whole, one_by_one, msg="the loss of a batch differs from the losses of its rows")
    for name, value in out.metrics.items():
        assert value.shape == (rows,), f"metric {name} is not one value per row"
        assert not value.requires_grad, f"metric {name} is not detached"

    for name in () if objective.held else _ERRORS:
        x = getattr(terms, name, None)
        if x is None:
            continue
        for k in range(x[0].numel()):  # one image of each row at a time
            one = torch.zeros_like(x)
            one.view(rows, -1)[:, k] = 1e-6
            y = x.clone().requires_grad_(True)
            total = objective(replace(terms, **{name: y}), {}).loss.sum() + 0 * y.sum()
            (gradient,) = torch.autograd.grad(total, y)
            up, down = (objective(replace(terms, **{name: x + sign * one}), {}).loss for sign in (1, -1))
            slope = (up - down) / 2e-6
            torch.testing.assert_close(
                gradient.view(rows, -1)[:, k], slope, rtol=1e-4, atol=1e-5, msg=f"the gradient of {name} is wrong"
            )
    if prefers:
        good, bad = slopes(objective, at_start(terms))
        assert (good + bad < 0).all(), "from the reference, a better winner and a worse loser must lower the loss"
        assert (good <= 1e-9).all(), "from the reference, a better winner raises the loss"
        assert (bad <= 1e-9).all(), "from the reference, a worse loser raises the loss"

    class Holder(Spec):
        objective: Objective

    assert type(objective).model_validate(objective.model_dump()) == objective, "the configuration changes in a round trip"
    assert dump(Holder(objective=objective))
    torch.testing.assert_close(Total((objective,))(terms, {}).loss, out.loss * objective.weight)
