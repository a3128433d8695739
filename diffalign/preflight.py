"""A test before online training: does the policy, replayed as it will be trained, have the ratio 1 to itself?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.models import Cond, Model
from diffalign.path import log_ratio
from diffalign.rollout import RolloutSettings, conditions, replay, rollout
from diffalign.rules import noise_after
from diffalign.sampling import Item


@dataclass(frozen=True)
class Preflight:
    """What one rollout and its replay say before anything is trained; a value per step of the schedule, the noisiest first."""

    ratio_error: float
    """Largest |ratio - 1| of the policy to itself, over images and trained steps; infinite if one is not a number. A clip
    range below it gates on rounding.
    """
    trained: tuple[int, ...]
    """Indices of the steps that this rollout trains on."""
    std: tuple[float, ...]
    """Of the noise that the rule adds."""
    noise: tuple[float, ...]
    """Standard deviation of all noise after the step, if the prediction is exact."""
    sigma_next: tuple[float, ...]
    """What the schedule says it is."""
    rollout_seconds: float
    replay_seconds: float

    @property
    def excess(self) -> float:
        """Noise beyond the schedule after the trained steps, the largest of ``noise - sigma_next``; 0 with none trained."""
        return max((self.noise[n] - self.sigma_next[n] for n in self.trained), default=0.0)


def preflight(
    model: Model,
    items: Sequence[Item],
    settings: RolloutSettings,
    seed: int,
    micro_batch: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    cond: Cond | None = None,
    negative: Cond | None = None,
) -> Preflight:
    """Roll out one batch and replay it in micro-batches, as training will: same precision, same compilation, same guidance.

    Raises:
        ConfigError: see :func:`check`.
    """
    if cond is None:
        cond, negative = conditions(model, items, settings)
    begin = time.perf_counter()
    with autocast():
        made = rollout(model, items, settings, seed, 0, cond, negative)
    made.x0.sum().item()  # waits for the device
    rolled, error = time.perf_counter(), 0.0
    for first in range(0, len(made), micro_batch):
        rows = slice(first, first + micro_batch)
        some = made[rows]
        for slot in range(some.steps.shape[1]):
            with autocast():
                mean = replay(model, some, slot, cond[rows], settings, None if negative is None else negative[rows])
            ratio = log_ratio(mean.detach(), some.mean[:, slot], some.x_next[:, slot], some.std[:, slot])
            error = max(error, torch.expm1(ratio.double()).abs().nan_to_num(nan=math.inf).max().item())
    replayed = time.perf_counter()
    grid = model.grid(settings.num_inference_steps)[1]
    c, c_next = grid[:-1], grid[1:]
    return Preflight(
        ratio_error=error,
        trained=tuple(sorted(set(made.steps.flatten().tolist()))),
        std=tuple(settings.rule(c, c_next)[1].tolist()),
        noise=tuple(noise_after(settings.rule, c, c_next).tolist()),
        sigma_next=tuple(c_next.sigma.tolist()),
        rollout_seconds=rolled - begin,
        replay_seconds=replayed - rolled,
    )
