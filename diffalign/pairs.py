"""From a group of scored images of one prompt to preference pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from diffalign.spec import Choice, Spec


@dataclass(frozen=True)
class Preference:
    """Positions in the group, and the difference of their scores."""

    chosen: int
    rejected: int
    margin: float


class PairRule(Spec):
    """Chooses pairs within one prompt's images."""

    @abstractmethod
    def __call__(self, scores: Sequence[float]) -> list[Preference]:
        """Pairs of a group by its scores, higher is better; none where the group decides nothing."""


class BestWorst(PairRule):
    """The best image against the worst, where they differ enough; equal scores go by position."""

    type: Literal["best_worst"] = "best_worst"
    min_margin: float = Field(default=0.0, ge=0.0)
    """Groups whose best and worst differ by this or less make no pair."""

    def __call__(self, scores: Sequence[float]) -> list[Preference]:
        if len(scores) < 2:
            return []
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        worst = min(range(len(scores)), key=lambda i: (scores[i], i))
        margin = scores[best] - scores[worst]
        return [Preference(best, worst, margin)] if margin > self.min_margin else []


PAIR_RULES = Choice(PairRule, {"best_worst": BestWorst})
