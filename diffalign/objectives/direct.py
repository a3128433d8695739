"""Losses on rewards that the gradient reaches through the decoder and the last steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import relu

from diffalign.objectives.base import Data, LossOutput, Objective, RewardTerms


class DRaFT(Objective):
    """Direct reward fine-tuning: -R, of several rewards minus their sum."""

    type: Literal["draft"] = "draft"

    data: ClassVar[Data] = "rewards"
    paper: ClassVar[str] = "Clark et al. 2023 (DRaFT), arXiv 2309.17400; Prabhudesai et al. 2023 (AlignProp), arXiv 2310.03739"
    checked: ClassVar[str] = "by hand"

    def __call__(self, terms: RewardTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(-_rows(terms.reward).sum(1), state=state)


class ReFL(Objective):
    """ReFL: max(0, target - R), summed over rewards (IterComp): no gradient beyond the target. Published with weight 1e-3."""

    type: Literal["refl"] = "refl"
    target: float = 2.0
    """In the reward's unit: ImageReward 2, DreamReward 4, SRPO 0.7; AlignProp's |R - 10| on aesthetics is 10."""

    data: ClassVar[Data] = "rewards"
    paper: ClassVar[str] = "Xu et al. 2023 (ImageReward), arXiv 2304.05977; Zhang et al. 2024 (IterComp), arXiv 2410.07171"
    checked: ClassVar[str] = "the authors' formula by hand"

    def __call__(self, terms: RewardTerms, state: dict[str, Tensor]) -> LossOutput:
        short = relu(self.target - _rows(terms.reward))
        return LossOutput(short.sum(1), {"rows_trained": (short > 0).any(1).float()}, state)


def _rows(reward: Tensor) -> Tensor:
    """(B, R)."""
    return reward.reshape(len(reward), -1)
