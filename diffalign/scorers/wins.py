"""Rewards by comparison: a vision-language model sees two pictures of a prompt at a time; the value is the share of wins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import torch

from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require
from diffalign.scorers.vlm import CHOICE, Judge, Pairwise, first_or_second, image_1_or_2

VERDICT = (
    'Both images were made for "{prompt}". Compare them, then write "Image 1 is better", "Image 2 is better" or "Both images '
    'are equally good".'
)


class Wins(Judge):
    """The mean over the other pictures of its prompt in the batch of P(it is better): Pref-GRPO's reward.

    All pairs are asked in both orders, K (K - 1) requests for K pictures. A pair that is not answered counts for neither; a
    picture with answers for fewer than half of its pairs has no value.
    """

    card: ClassVar[Card] = Card(
        name="vlm-wins",
        summary="the share of its group that it beats, by a vision-language model that sees two; for online.reward",
        unit="0 to 1",
        citation="Wang et al. 2025 (Pref-GRPO), arXiv 2508.20751; the default template is ours",
        licence="of the model",
    )
    default: ClassVar[str] = CHOICE
    tokens: ClassVar[int] = 4

    def read(self, answer: str) -> float:
        """The share of the first of two pictures; see :class:`diffalign.scorers.vlm.Pairwise`."""
        return first_or_second(answer)

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(batch.prompts):
            groups[prompt].append(i)
        pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
        judge = Pairwise(self.endpoint, self.template, self.read, self.tokens)
        left, right = ([batch.images[pair[side]] for pair in pairs] for side in (0, 1))
        shares, why = judge(left, right, [batch.prompts[i] for i, _ in pairs])
        beaten = torch.full((len(batch), len(batch)), torch.nan)
        for (i, j), share in zip(pairs, shares, strict=True):
            beaten[i, j], beaten[j, i] = share, 1 - share
        others = torch.tensor([len(groups[prompt]) - 1 for prompt in batch.prompts])
        enough = (2 * (~beaten.isnan()).sum(1) >= others) & (others > 0)
        values = beaten.nanmean(1).where(enough, torch.nan)
        reasons = {i: e for pair, e in zip(pairs, why, strict=True) if e for i in pair}
        alone = "no other picture of its prompt in the batch"
        errors = [None if v == v else reasons.get(i, alone) for i, v in enumerate(values.tolist())]
        return ScoreBatch({self.name: values}, errors)


class UnifiedRewardWins(Wins):
    """The same in the words of UnifiedReward's comparisons. Give the template that it was trained with."""

    card: ClassVar[Card] = Card(
        name="unifiedreward-wins",
        summary="the share of its group that it beats, by UnifiedReward's verdicts on two; for online.reward",
        unit="0 to 1",
        citation="Wang et al. 2025 (Pref-GRPO), arXiv 2508.20751; the default template is ours",
        licence="MIT (code); of the model",
    )
    default = VERDICT
    tokens = 2048

    def read(self, answer: str) -> float:
        return image_1_or_2(answer)


COMPARING = (Wins.card.name, UnifiedRewardWins.card.name)


def comparing(names: Sequence[str]) -> list[str]:
    """Those of the scorers that compare the pictures of a prompt with each other, also as members of others."""
    return [name for name in names if any(f"{kind}:" in name for kind in COMPARING)]
