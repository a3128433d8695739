"""Losses that only imitate: the winner, or the reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import LossOutput, Need, Objective, PairTerms, require


class SFT(Objective):
    """The winner's denoise error: fine-tuning on what was preferred, the control of every preference method."""

    type: Literal["sft"] = "sft"

    needs: ClassVar[frozenset[Need]] = frozenset()
    paper: ClassVar[str] = "Ho et al. 2020, eq. 14 (the simple loss)"
    checked: ClassVar[str] = "by hand"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(terms.winner, state=state)


class KL(Objective):
    """The KL to the reference on winners at t, in closed form: 1/2 |f - f_ref|^2; an anchor beside another loss."""

    type: Literal["kl"] = "kl"

    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "distance"})
    paper: ClassVar[str] = "the KL of Gaussians of equal variance"
    checked: ClassVar[str] = "torch.distributions"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(0.5 * require(terms.distance, "distance"), state=state)
