"""What an objective is given and what it returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from diffalign.spec import Spec

Need = Literal["loser", "reference"]


@dataclass(frozen=True)
class PairTerms:
    """Denoise errors of B pairs, each (B,) in fp32; winner and loser share (t, eps), and so does the reference.

    ``loser``, ``ref_winner`` and ``ref_loser`` are None where the objective did not ask for them.
    """

    winner: Tensor
    loser: Tensor | None = None
    ref_winner: Tensor | None = None
    ref_loser: Tensor | None = None
    t: Tensor | None = None
    """Times as fractions of the schedule, 0 clean and 1 noise."""
    weight: Tensor | None = None
    """A weight per pair, mean about 1; the loop multiplies the loss by it."""

    @property
    def images(self) -> int:
        """Images that were trained on."""
        return len(self.winner) * (1 if self.loser is None else 2)

    @property
    def cost(self) -> int:
        """Denoiser passes: one per forward, two per backward, of policy and reference."""
        return self.images * (3 if self.ref_winner is None else 4)


@dataclass(frozen=True)
class LossOutput:
    """``loss`` (B,), before the mean; ``metrics`` name to (B,), detached; ``state`` for the next call."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class Objective(Spec):
    """A loss over preference terms. The configuration is the object: frozen fields and a pure call."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    paper: ClassVar[str] = ""
    """Where the formula comes from."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of this loss where several are summed."""

    @abstractmethod
    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        """Losses of the rows; what must survive the call goes in and out as ``state`` and is checkpointed by the loop."""


def require(value: Tensor | None, name: str) -> Tensor:
    """An optional term that this objective needs; a missing one is a mistake in its ``needs``."""
    if value is None:
        raise ValueError(f"the objective uses '{name}' without naming it in its needs")
    return value


@dataclass(frozen=True)
class Total:
    """Several objectives as one: the sum of their losses times their weights."""

    parts: tuple[Objective, ...]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(p.needs for p in self.parts))

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        outs = []
        for i, part in enumerate(self.parts):
            own = {k.removeprefix(f"{i}/"): v for k, v in state.items() if k.startswith(f"{i}/")}
            outs.append(part(terms, own))
        loss = sum((p.weight * o.loss for p, o in zip(self.parts, outs, strict=True)), start=0 * outs[0].loss)
        metrics = {k: v for o in outs for k, v in o.metrics.items()}
        return LossOutput(loss, metrics, {f"{i}/{k}": v for i, o in enumerate(outs) for k, v in o.state.items()})
