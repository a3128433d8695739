"""From a group of scored images of one prompt to preference pairs: the rules of published pipelines, as pure functions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, permutations, product
from typing import Literal, Self

from pydantic import Field, model_validator

from diffalign.errors import ConfigError
from diffalign.spec import Choice, Spec


@dataclass(frozen=True)
class Group:
    """Images of one prompt: the reward of each, higher is better, and the scores that it is made of or a rule asks for."""

    reward: Sequence[float]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)

    def order(self) -> list[int]:
        """Positions from the best to the worst; equal rewards by position."""
        return sorted(range(len(self)), key=lambda i: (-self.reward[i], i))

    def preference(self, chosen: int, rejected: int) -> Preference:
        return Preference(chosen, rejected, self.reward[chosen] - self.reward[rejected])


@dataclass(frozen=True)
class Preference:
    """Positions in the group, and the difference of their rewards."""

    chosen: int
    rejected: int
    margin: float


class PairRule(Spec):
    """Chooses pairs within one prompt's images."""

    min_margin: float = Field(default=0.0, ge=0.0)
    """Pairs whose rewards differ by this or less are ties."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Scores that the rule reads beside the reward."""
        return ()

    @abstractmethod
    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        """Pairs of a group of two images or more, whatever their margin; what the rule turns down is counted by reason."""

    def __call__(self, group: Group, dropped: Counter[str] | None = None) -> list[Preference]:
        """The pairs that are no ties; none where the group decides nothing."""
        counts: Counter[str] = Counter() if dropped is None else dropped
        if len(group) < 2:
            counts["fewer than two images"] += 1
            return []
        found = list(self.candidates(group, counts))
        kept = [p for p in found if p.margin > self.min_margin]
        if len(kept) < len(found):
            counts["margin too small"] += len(found) - len(kept)
        return kept


class BestWorst(PairRule):
    """The best image against the worst, where they differ enough; equal scores go by position."""

    type: Literal["best_worst"] = "best_worst"

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        best = max(range(len(group)), key=lambda i: (group.reward[i], -i))
        worst = min(range(len(group)), key=lambda i: (group.reward[i], i))
        yield group.preference(best, worst)


class BestSigma(PairRule):
    """The best against the image nearest to mean - 2 deviations of the group, not the very worst (Xiao et al. 2025)."""

    type: Literal["best_sigma"] = "best_sigma"
    sigmas: float = Field(default=2.0, gt=0)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        best, *others = group.order()
        mean, std = _moments(group.reward)
        aim = mean - self.sigmas * std
        yield group.preference(best, min(others, key=lambda i: (abs(group.reward[i] - aim), i)))


class TopBottom(PairRule):
    """The k best against the k worst: the best with the very worst and so on, or each with each."""

    type: Literal["top_bottom"] = "top_bottom"
    k: int = Field(default=2, ge=1)
    """At most half of the group."""
    cross: bool = False
    """Each with each."""

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        order, k = group.order(), min(self.k, len(group) // 2)
        top, bottom = order[:k], order[::-1][:k]
        for i, j in product(top, bottom) if self.cross else zip(top, bottom, strict=True):
            yield group.preference(i, j)


class AllPairs(PairRule):
    """Every two images that differ enough (Curriculum-DPO, CycleReward)."""

    type: Literal["all"] = "all"

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        for i, j in combinations(group.order(), 2):
            yield group.preference(i, j)


class Adjacent(PairRule):
    """Neighbours in the ranking: the hardest pairs."""

    type: Literal["adjacent"] = "adjacent"

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        order = group.order()
        for i, j in pairwise(order):
            yield group.preference(i, j)


class RankThenSift(PairRule):
    """Neighbours by position are compared by ``rank_by``; the best winner meets the worst loser by reward (UnifiedReward)."""

    type: Literal["rank_then_sift"] = "rank_then_sift"
    rank_by: str

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.rank_by,)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        score = group.scores[self.rank_by]
        winners, losers = [], []
        for i in range(0, len(group) - 1, 2):
            if score[i] == score[i + 1]:  # the published script makes the first one the winner
                dropped["equal in the first comparison"] += 1
                continue
            first = score[i] > score[i + 1]
            winners.append(i if first else i + 1)
            losers.append(i + 1 if first else i)
        if winners:
            best = max(winners, key=lambda i: (group.reward[i], -i))
            yield group.preference(best, min(losers, key=lambda i: (group.reward[i], i)))


class Pareto(PairRule):
    """The winner is at least as good by every score and better by one (VisionReward's MPO)."""

    type: Literal["pareto"] = "pareto"
    scores: list[str] = []
    """Those of the reward if empty."""

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        columns = [group.scores[n] for n in self.scores or group.scores]
        for i, j in combinations(group.order(), 2):
            signs = {(c[i] > c[j]) - (c[i] < c[j]) for c in columns}
            if signs == {0} or {1, -1} <= signs:
                dropped["better by one score, not by another" if len(signs) > 1 else "equal by every score"] += 1
            else:
                yield group.preference(i, j) if 1 in signs else group.preference(j, i)


class Angle(PairRule):
    """The direction of (gain in x, gain in y) lies between two angles: 0 to 90 wants both gains (DreamBoothDPO).

    Gains are in deviations of the group. The form is ours: the paper's code could not be read.
    """

    type: Literal["angle"] = "angle"
    x: str
    y: str
    low: float = Field(default=0.0, ge=-180, le=180)
    high: float = Field(default=90.0, ge=-180, le=180)

    @model_validator(mode="after")
    def _half(self) -> Self:
        if not 0 < self.high - self.low < 180:
            raise ValueError("high - low must lie between 0 and 180 degrees, or a pair could be read both ways")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.x, self.y)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        x, y = (_standard(group.scores[n]) for n in (self.x, self.y))
        found = 0
        for i, j in permutations(group.order(), 2):
            dx, dy = x[i] - x[j], y[i] - y[j]
            if (dx or dy) and self.low <= math.degrees(math.atan2(dy, dx)) <= self.high:
                found += 1
                yield group.preference(i, j)
        if lost := len(group) * (len(group) - 1) // 2 - found:
            dropped["outside the angle"] += lost


class Threshold(PairRule):
    """Pairs with sigmoid(gap / temperature) > threshold (RS-DPO, Khaki et al. 2024)."""

    type: Literal["threshold"] = "threshold"
    temperature: float = Field(default=1.0, gt=0)
    threshold: float = Field(default=0.8, ge=0.5, lt=1)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        for i, j in combinations(group.order(), 2):
            one = group.preference(i, j)
            if sigmoid(one.margin / self.temperature) > self.threshold:
                yield one
            else:
                dropped["too unsure"] += 1


class Agreement(PairRule):
    """Pairs whose order at least so many scores share."""

    type: Literal["agreement"] = "agreement"
    scores: list[str] = []
    """Those of the reward if empty."""
    at_least: int | None = Field(default=None, ge=1)
    """More than half of them; all if not given."""

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        columns = [group.scores[n] for n in self.scores or group.scores]
        wanted = len(columns) if self.at_least is None else self.at_least
        if not len(columns) / 2 < wanted <= len(columns):
            raise ConfigError(f"rule.at_least: {wanted} is not more than half of {len(columns)} scores, or more than all")
        for i, j in combinations(group.order(), 2):
            if sum(c[i] > c[j] for c in columns) >= wanted:
                yield group.preference(i, j)
            elif sum(c[i] < c[j] for c in columns) >= wanted:
                yield group.preference(j, i)
            else:
                dropped["too few scores agree"] += 1


class Confident(PairRule):
    """Best against worst where both stand out: max softmax(scale r) and max softmax(-scale r) exceed 2 / n (HPS v1)."""

    type: Literal["confident"] = "confident"
    scale: float = Field(default=100.0, gt=0)
    """100 for cosines."""
    min_images: int = Field(default=4, ge=2)

    def candidates(self, group: Group, dropped: Counter[str]) -> Iterator[Preference]:
        if len(group) < self.min_images:
            dropped["too few images for confidence"] += 1
            return
        order = group.order()
        for sign, end in ((1, "best"), (-1, "worst")):
            logits = [sign * self.scale * r for r in group.reward]
            top = max(logits)
            if 1 / sum(math.exp(x - top) for x in logits) <= 2 / len(group):
                dropped[f"the {end} does not stand out"] += 1
                return
        yield group.preference(order[0], order[-1])


PAIR_RULES = Choice(
    PairRule,
    {
        "best_worst": BestWorst, "best_sigma": BestSigma, "top_bottom": TopBottom, "all": AllPairs, "adjacent": Adjacent,
        "rank_then_sift": RankThenSift, "pareto": Pareto, "angle": Angle, "threshold": Threshold, "agreement": Agreement,
        "confident": Confident,
    },
)  # fmt: skip


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def capped(
    pairs: Iterable[Preference], per_image: int | None, per_prompt: int | None, dropped: Counter[str]
) -> list[Preference]:
    """At most so many pairs of one image and of one prompt, the widest first; in the order in which they came."""
    pairs = list(pairs)
    used: Counter[int] = Counter()
    kept: set[int] = set()
    for n in sorted(range(len(pairs)), key=lambda n: (-pairs[n].margin, n)):
        if per_prompt is not None and len(kept) >= per_prompt:
            dropped["enough pairs of the prompt"] += 1
        elif per_image is not None and max(used[pairs[n].chosen], used[pairs[n].rejected]) >= per_image:
            dropped["enough pairs of the image"] += 1
        else:
            kept.add(n)
            used.update((pairs[n].chosen, pairs[n].rejected))
    return [p for n, p in enumerate(pairs) if n in kept]


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation, of the population."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def _standard(values: Sequence[float]) -> list[float]:
    """In deviations of the group; 0 where all are equal."""
    _, std = _moments(values)
    return [v / std if std else 0.0 for v in values]
