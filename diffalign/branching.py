"""Several steps from one state: candidates that are compared by previews, one of which goes on (SPO, TailorPO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.models import Model
from diffalign.rollout import Arrival, RolloutSettings, Trajectories, conditions, denoised, evaluations, rollout
from diffalign.sampling import Item

See = Callable[[list[int], list[int], Tensor, float], object]
"""Told the rows, the slots and the x0 (n, K, C, H, W) of candidates, and the time that the network was told for it: 0 of those
that are finished."""


@dataclass(frozen=True)
class Branches:
    """Trajectories whose trained steps were drawn several times."""

    paths: Trajectories
    """What went on."""
    candidates: Tensor
    """(B, S, K, C, H, W), all states after each trained step."""
    passes: int
    """Denoiser passes of one image, guidance counted once."""


@torch.no_grad()
def branch(
    model: Model, items: Sequence[Item], settings: RolloutSettings, seed: int, epoch: int, candidates: int, see: See
) -> Branches:
    """A rollout that draws each trained step ``candidates`` times from the same mean; one of them, at random, goes on.

    ``see`` is given what the model makes of each candidate, x0_hat(x_next), or the candidate itself where the schedule ends.
    All that is drawn belongs to the item, as in :func:`diffalign.rollout.rollout`.

    Raises:
        ConfigError: see :func:`diffalign.rollout.check`.
    """
    cond, negative = conditions(model, items, settings)
    timesteps, grid = model.grid(settings.num_inference_steps)
    kept: list[tuple[list[int], list[int], Tensor]] = []
    passes = len(items) * evaluations(model, items, settings, seed, epoch)

    def advance(at: Arrival) -> Tensor:
        nonlocal passes
        n = len(at.rows)
        z = torch.stack([torch.randn(candidates, *at.mean.shape[1:], generator=g) for g in at.draws]).to(at.mean)
        chosen = [int(torch.randint(candidates, (), generator=g)) for g in at.draws]
        x = at.mean[:, None] + at.std.view(-1, 1, 1, 1, 1) * z
        kept.append((at.rows, at.slots, x))
        flat, time = x.flatten(0, 1), 0.0
        if at.then < len(timesteps):
            who = [row for row in at.rows for _ in range(candidates)]
            c, t = grid[[at.then] * len(who)], timesteps[at.then].expand(len(who))
            time = timesteps[at.then].item()
            aside = None if negative is None else negative[who]
            flat = denoised(model, flat, t, c, cond[who], settings, aside)[0]
            passes += len(who)
        see(at.rows, at.slots, flat.view(x.shape), time)
        return x[torch.arange(n), chosen]

    paths = rollout(model, items, settings, seed, epoch, cond, negative, advance)
    b, s = paths.std.shape
    out = paths.x.new_zeros(b, s, candidates, *paths.x.shape[2:])
    for rows, slots, x in kept:
        out[rows, slots] = x
    return Branches(paths, out, passes)
