"""Losses that only imitate."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import LossOutput, Need, Objective, PairTerms


class SFT(Objective):
    """The winner's denoise error: fine-tuning on what was preferred, the control of every preference method."""

    type: Literal["sft"] = "sft"

    needs: ClassVar[frozenset[Need]] = frozenset()
    paper: ClassVar[str] = "Ho et al. 2020, eq. 14 (the simple loss)"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(terms.winner, state=state)
