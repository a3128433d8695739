"""Oversample, then select: many cheap previews of a prompt say which seeds are worth a full rollout (Sol-RL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.models import Model
from diffalign.rollout import RolloutSettings, rollout
from diffalign.rules import ODE
from diffalign.sampling import Item
from diffalign.spec import Spec
from diffalign.windows import All

By = Literal["best", "worst", "extremes"]
Reward = Callable[[Tensor, Sequence[Item]], Tensor]
"""(B, 3, H, W) uint8 images and what they were made for, to (B,) rewards, higher is better."""


class Oversample(Spec):
    """The ``online.oversample`` section: groups are the extremes of more seeds, by cheap previews (Sol-RL: 24 of 96)."""

    candidates: int = Field(default=96, ge=2)
    """Seeds of a prompt that are previewed."""
    steps: int = Field(default=6, ge=1)
    """Of a preview, by the ODE."""
    by: By = "extremes"


def preselect(
    model: Model,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: RolloutSettings,
    seed: int,
    epoch: int,
    *,
    candidates: int,
    keep: int,
    steps: int = 6,
    by: By = "extremes",
    begin: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    """The k of ``keep`` out of ``candidates`` images of each prompt, ascending, by previews of ``steps`` steps of the ODE.

    A preview starts from the noise that :func:`diffalign.rollout.rollout` starts item (prompt, k) of this epoch from.
    ``extremes`` keeps as many of the best as of the worst, and one more of the best if ``keep`` is odd; of equals the lower k
    counts as better, and those without a finite reward are kept where there are no others. Candidates are counted from
    ``begin``, one number for each prompt, or from 0.

    Raises:
        ConfigError: more to keep than there are candidates, or all of them start from the same noise.
    """
    if not 0 < keep <= candidates:
        raise ConfigError(f"cannot keep {keep} of {candidates} candidates", hint="keep at least 1 and at most all")
    if settings.same_noise:
        raise ConfigError("same_noise: all previews of a prompt would be equal", hint="same_noise=false")
    cheap = {"num_inference_steps": steps, "rule": ODE(), "window": All(), "compress": 1.0}
    preview = settings.model_copy(update=cheap)
    begin = [0] * len(prompts) if begin is None else begin
    items = [Item(prompt, k + n) for prompt, k in zip(prompts, begin, strict=True) for n in range(candidates)]
    rewards = []
    for first in range(0, len(items), settings.batch_size):
        block = items[first : first + settings.batch_size]
        x0 = rollout(model, block, preview, seed, epoch).x0
        rewards.append(reward(to_uint8(model.decode(x0)).cpu(), block).double().cpu())
    table = torch.cat(rewards).view(len(prompts), candidates)
    kept = [_kept(row, keep, by) for row in table]
    return [tuple(k + n for n in row) for row, k in zip(kept, begin, strict=True)]


def _kept(rewards: Tensor, keep: int, by: By) -> tuple[int, ...]:
    finite = [k for k in range(len(rewards)) if rewards[k].isfinite()]
    if len(finite) < keep:
        others = [k for k in range(len(rewards)) if k not in finite]
        return tuple(sorted(finite + others[: keep - len(finite)]))
    best = sorted(finite, key=lambda k: (-rewards[k].item(), k))
    top = {"best": keep, "worst": 0, "extremes": keep - keep // 2}[by]
    return tuple(sorted(best[:top] + best[len(best) - (keep - top) :]))
