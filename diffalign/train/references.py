"""What the policy is compared with: the model before training, or weights that move along with it.

Weights that move are held as named snapshots of the trainable weights, which checkpoints save. What a finished run left is
a snapshot too, read again from that run when this one resumes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from diffalign.models.base import Weights
from diffalign.spec import Choice, Spec

MOVING = "moving"
OF_RUN = "run"
GIVEN = frozenset({"reference", OF_RUN})
"""Snapshots that follow from the configuration: checkpoints leave them out."""


class ReferencePolicy(Spec):
    """The ``reference`` section."""

    @property
    def copies(self) -> int:
        """How many copies of the trained weights it holds at most."""
        return 1

    def begin(self, weights: Weights) -> None:
        """Before the first step, or before a checkpoint is read."""
        weights.take(MOVING)

    def name(self, weights: Weights, step: int, seed: int) -> str:
        """The snapshot that this step is compared with."""
        return MOVING

    @abstractmethod
    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        """After the optimizer's ``step``-th step. ``drift`` measures |error - base's error| under the moving reference."""


class Base(ReferencePolicy):
    """The model before training: the adapter off, or a frozen copy where all weights are trained."""

    type: Literal["base"] = "base"

    @property
    def copies(self) -> int:
        return 0

    def begin(self, weights: Weights) -> None:
        return

    def name(self, weights: Weights, step: int, seed: int) -> str:
        return "reference"

    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        return


class EMA(ReferencePolicy):
    """An exponential average of the policy (Linear-DPO). Of an adapter it averages the factors, not their product."""

    type: Literal["ema"] = "ema"
    decay: float = Field(default=0.99, ge=0, lt=1)

    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        there = weights.snapshots[MOVING]
        for name, p in weights.trainable().items():
            there[name].lerp_(p.detach(), 1 - self.decay)


class Periodic(ReferencePolicy):
    """The policy of some steps ago, mixed into the reference every ``every`` steps (TR-DPO), until it has drifted too far.

    With mix 1 and a largest drift it is Rethinking-DPO's: once the reference's denoise error on winners has left the
    base's by more than ``max_drift``, it stays where it is.
    """

    type: Literal["periodic"] = "periodic"
    every: int = Field(default=64, ge=1)
    mix: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy in the new reference."""
    max_drift: float | None = Field(default=None, gt=0)
    """In units of error; None never stops."""

    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        if step % self.every or "frozen" in weights.snapshots:
            return
        there = weights.snapshots[MOVING]
        for name, p in weights.trainable().items():
            there[name].lerp_(p.detach(), self.mix)
        if self.max_drift is not None and drift() > self.max_drift:
            weights.snapshots["frozen"] = {}  # a mark that checkpoints keep


class Past(ReferencePolicy):
    """A past policy, drawn anew in every step from those kept every ``every`` steps and the start (SePPO)."""

    type: Literal["past"] = "past"
    every: int = Field(default=30, ge=1)
    keep: int = Field(default=8, ge=1)
    """The oldest are forgotten beyond this many."""

    @property
    def copies(self) -> int:
        return self.keep + 1  # for a moment, as the next one is taken

    def begin(self, weights: Weights) -> None:
        weights.take("past-0")

    def name(self, weights: Weights, step: int, seed: int) -> str:
        known = self._known(weights)
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return known[int(torch.randint(len(known), (), generator=g))]

    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        if step % self.every == 0:
            weights.take(f"past-{step}")
            for old in self._known(weights)[: -self.keep]:
                del weights.snapshots[old]

    def _known(self, weights: Weights) -> list[str]:
        names = [n for n in weights.snapshots if n.startswith("past-")]
        return sorted(names, key=lambda n: int(n.removeprefix("past-")))


class OfRun(ReferencePolicy):
    """What a finished run of the same model and layers left, as it is: a round of SPIN is compared with the last one."""

    type: Literal["run"] = "run"
    path: str
    """The folder of the run."""

    def begin(self, weights: Weights) -> None:
        return  # they were read with the model

    def name(self, weights: Weights, step: int, seed: int) -> str:
        return OF_RUN

    def update(self, weights: Weights, step: int, drift: Callable[[], float]) -> None:
        return


REFERENCES = Choice(ReferencePolicy, {"base": Base, "ema": EMA, "periodic": Periodic, "past": Past, "run": OfRun})
