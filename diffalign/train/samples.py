"""What a rollout leaves for training: blocks of images, and the parts of them that micro-batches are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.rollout import Trajectories
from diffalign.sampling import Item, item_seed


@dataclass(frozen=True)
class Block:
    """B images that were sampled together, and all that training on them needs."""

    items: list[Item]
    paths: Trajectories
    advantages: Tensor
    """(B,)"""
    rewards: Tensor
    """(B,) the weighted sum of the rewards."""

    def state(self) -> dict[str, Any]:
        """All but the items, as tensors and plain values."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "items"}
        return kept | {"paths": self.paths.state()}

    @classmethod
    def of(cls, items: list[Item], state: dict[str, Any]) -> Self:
        """Back from what :meth:`state` gave."""
        return cls(items, **state | {"paths": Trajectories.of(state["paths"])})


@dataclass(frozen=True)
class StepBatch:
    """Rows of a block at one of its trained steps."""

    block: Block
    rows: list[int]
    slot: int
    weight: Tensor | None = None
    """(B,), where some rows only fill up the batch."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Example:
    """Images of one block that are learned from together."""

    block: Block
    rows: tuple[int, ...]
    weight: float = 1.0


def prompt_at(prompts: Sequence[Prompt], position: int, seed: int) -> Prompt:
    """One of the pool's endless stream of shuffled epochs."""
    turn, offset = divmod(position, len(prompts))
    g = torch.Generator().manual_seed(item_seed(seed, "prompts", turn))
    return prompts[int(torch.randperm(len(prompts), generator=g)[offset])]


def follow(weights: Any, name: str, decay: float) -> None:
    """w <- decay w + (1 - decay) policy, of the snapshot of this name."""
    if name not in weights.snapshots:
        weights.take(name)
    for key, p in weights.trainable().items():
        weights.snapshots[name][key].lerp_(p.detach(), 1 - decay)


def within_groups(rewards: Tensor) -> float:
    """Mean deviation within the groups, (G, K)."""
    return (rewards - rewards.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt().nanmean().item()
