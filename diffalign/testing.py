"""Checks that any objective must pass, for tests in and out of the tree.

from diffalign.testing import check_objective
check_objective(MyObjective(beta=2.0))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffalign.objectives import Objective, PairTerms, Total
from diffalign.spec import Spec, dump

_NAMES = ("winner", "loser", "ref_winner", "ref_loser")


def random_terms(needs: frozenset[str], rows: int = 8, seed: int = 0) -> PairTerms:
    """Plausible errors: near 0.2, the policy within a few percent of the reference; only what ``needs`` names."""
    g = torch.Generator().manual_seed(seed)
    ref = 0.2 + 0.05 * torch.rand(2, rows, generator=g, dtype=torch.double)
    now = ref + 0.002 * torch.randn(2, rows, generator=g, dtype=torch.double)
    both = "loser" in needs
    seen = "reference" in needs
    return PairTerms(
        now[0],
        now[1] if both else None,
        ref[0] if seen else None,
        ref[1] if seen and both else None,
        t=torch.rand(rows, generator=g),
    )


def rows_of(terms: PairTerms, rows: slice) -> PairTerms:
    """Some rows of the terms."""
    return replace(terms, **{k: v[rows] for k, v in vars(terms).items() if v is not None})


def check_objective(objective: Objective) -> None:
    """Assert what holds for every objective; raises AssertionError that says what does not.

    It must return one finite loss per row that depends on that row alone, with gradients that agree with finite differences;
    from the reference on, a lower error of the winner must lower the loss; it must use only what it declares in ``needs``;
    and its configuration must survive a round trip.
    """
    terms = random_terms(objective.needs)
    out = objective(terms, {})
    assert out.loss.shape == terms.winner.shape, f"loss has shape {tuple(out.loss.shape)}, not one value per row"
    assert out.loss.isfinite().all(), "the loss is not finite"
    one_by_one = torch.cat([objective(rows_of(terms, slice(i, i + 1)), {}).loss for i in range(len(terms.winner))])
    torch.testing.assert_close(out.loss, one_by_one, msg="the loss of a batch differs from the losses of its rows")
    for name, value in out.metrics.items():
        assert value.shape == terms.winner.shape, f"metric {name} is not one value per row"
        assert not value.requires_grad, f"metric {name} is not detached"

    inputs = {n: v for n in _NAMES if (v := getattr(terms, n)) is not None}

    def loss_at(**changed: Tensor) -> Tensor:
        return objective(replace(terms, **changed), {}).loss

    for name in ("winner", "loser"):
        if name in inputs:
            x = inputs[name].clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss_at(**{name: x}).sum(), x)
            step = 1e-6
            slope = (loss_at(**{name: inputs[name] + step}) - loss_at(**{name: inputs[name] - step})) / (2 * step)
            torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6, msg=f"the gradient of {name} is wrong")
    start = {"winner": terms.ref_winner, "loser": terms.ref_loser} if terms.ref_winner is not None else {}
    here = {k: v for k, v in {**inputs, **start}.items() if v is not None}
    better = {**here, "winner": here["winner"] - 1e-5}
    assert (loss_at(**better) < loss_at(**here)).all(), "from the reference, a slightly better winner must lower the loss"

    class Holder(Spec):
        objective: Objective

    assert type(objective).model_validate(objective.model_dump()) == objective, "the configuration changes in a round trip"
    assert dump(Holder(objective=objective))
    assert Total((objective,))(terms, {}).loss.shape == out.loss.shape
