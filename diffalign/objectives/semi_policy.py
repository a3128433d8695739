"""Losses on (data, own sample) pairs that ask first which of the two is the better."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import PairTerms
from diffalign.objectives.pairwise import Pairwise


class SePPO(Pairwise):
    """SePPO: -log sigmoid(r_w - s r_l), s = sign(r_w) without gradient: is the reference's own sample a loser or a winner?

    The winner is the anchor. Where the policy fits it better than the reference does (r_w > 0), the reference's sample is
    taken for a loser, and else for another winner. At one time and noise the comparison is a noisy one: ``coupling.draws``
    averages it. At the very start r_w is 0, and only the winner pulls.
    """

    type: Literal["seppo"] = "seppo"

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2410.05255"
    checked: ClassVar[str] = "by hand; equal to sigmoid where r_w > 0. The paper's criterion is known from its reviews"

    def utility(self, win: Tensor, lose: Tensor, terms: PairTerms) -> Tensor:
        return -logsigmoid(win - win.detach().sign() * lose)
