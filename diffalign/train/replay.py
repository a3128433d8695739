"""States of the policy's own trajectories in the losers' place: Diffusion-DRO (arXiv 2510.18353)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from diffalign.models import Cond, Model
from diffalign.path import Coeffs, split
from diffalign.solvers import dpm_2m

LAGGED = "lagged"
"""The snapshot of the policy that makes the trajectories; without one it is the policy as it is."""


@torch.no_grad()
def replay(model: Model, eps: Tensor, u: Tensor, cond: Cond, steps: int) -> tuple[Tensor, Tensor, int]:
    """The states x (B, C, H, W) at ``u`` (B,) of trajectories from ``eps``, what the model predicts there, and the passes.

    A trajectory goes down a grid of 1 / ``steps`` that meets ``u``, from the last point below 1: the authors' equal steps
    with one perturbation a trajectory. Its rule is DPM-Solver++ (2M) without guidance (Lu et al. 2022, arXiv 2211.01095,
    algorithm 2), and its start has the variance of x_t for latents of variance 1.
    """
    size = (eps.shape[-2], eps.shape[-1])
    above = (steps * (1 - u.double())).ceil().long() - 1  # steps that are left until u
    device = eps.device

    def at(rows: Tensor, left: Tensor) -> tuple[Tensor, Coeffs]:
        t = model.timestep((u[rows].double() + left / steps).clamp(max=1 - 2**-24).float(), size)
        return t, model.coeffs(t)

    everything = torch.arange(len(u))
    a, s = at(everything, above)[1].over(eps)
    x = (a.square() + s.square()).sqrt() * eps
    passes, last = len(u), torch.zeros_like(x)
    c_last = Coeffs(torch.ones_like(u, device=device), torch.ones_like(u, device=device))
    with _bare(model), model.weights(LAGGED) if LAGGED in model.named_weights.snapshots else nullcontext():
        for done in range(int(above.max())):
            rows = everything[above > done]
            here, passes = rows.to(device), passes + len(rows)
            (t, c), (_, c_next) = at(rows, above[rows] - done), at(rows, above[rows] - done - 1)
            x0 = split(model.kind, model.predict(x[here], t, cond[here]), x[here], c)[0]
            c_before = Coeffs(c_last.alpha[here], c_last.sigma[here])
            before = (last[here], c_before, torch.ones_like(c.alpha, dtype=torch.bool)) if done else None
            x[here] = dpm_2m(x[here], x0, c, c_next, before)
            last[here], c_last.alpha[here], c_last.sigma[here] = x0, c.alpha.to(c_last.alpha), c.sigma.to(c_last.sigma)
        t, _ = at(everything, torch.zeros_like(above))
        return x, model.predict(x, t, cond), passes


@contextmanager
def _bare(model: Model) -> Iterator[None]:
    """The network itself: processes take different numbers of steps, and a wrapped one waits for the others."""
    wrapped, model.net = model.net, getattr(model.net, "module", model.net)
    try:
        yield
    finally:
        model.net = wrapped
