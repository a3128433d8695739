"""Losses on pairs without a reference: s = -kappa beta e takes the place of the reward."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from diffalign.objectives.base import LossOutput, Need, Objective, PairTerms, Rewarded, require
from diffalign.objectives.pairwise import CODE, TRL

LOSER: frozenset[Need] = frozenset({"loser"})


class MaPO(Objective):
    """Margin-aware preference optimisation, without a reference: e_w - beta log sigmoid(T (phi(e_w) - phi(e_l))).

    phi(e) = s e / (exp(s e) - 1), the likelihood proxy of the authors' code; Hong et al. 2024, arXiv 2406.06424.
    """

    type: Literal["mapo"] = "mapo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the margin beside the winner's error."""
    snr_value: float = Field(default=0.5, gt=0)
    """s in phi."""
    num_train_timesteps: int = Field(default=1000, gt=0)
    """T, the scale of the margin."""

    needs: ClassVar[frozenset[Need]] = LOSER
    paper: ClassVar[str] = "Hong et al. 2024, arXiv 2406.06424"
    checked: ClassVar[str] = CODE

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        margin = self.num_train_timesteps * (self._phi(terms.winner) - self._phi(require(terms.loser, "loser")))
        return LossOutput(terms.winner - self.beta * logsigmoid(margin), {"mapo_margin": margin.detach()}, state)

    def _phi(self, error: Tensor) -> Tensor:
        """Decreasing in the error, 1 at 0; written with expm1, and its limit where it is 0/0."""
        u = self.snr_value * error
        safe = u.clamp(min=1e-6)
        return torch.where(u < 1e-6, 1 - u / 2, safe * (-safe).exp() / -torch.expm1(-safe))


class ReferenceFree(Rewarded):
    """A function of s_w - s_l = kappa beta (e_l - e_w). The scale of e decides: it does not transfer between models."""

    beta: float = Field(default=500.0, gt=0)

    needs: ClassVar[frozenset[Need]] = LOSER

    def margin(self, terms: PairTerms) -> Tensor:
        """s_w - s_l, (B,)."""
        return self.scale * (require(terms.loser, "loser") - terms.winner)


class SimPO(ReferenceFree):
    """SimPO: -log sigmoid(s_w - s_l - gamma). Add ``sft``: nothing else holds the winner."""

    type: Literal["simpo"] = "simpo"
    simpo_gamma: float = Field(default=0.5, ge=0)
    """The margin that is asked for."""

    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2405.14734"
    checked: ClassVar[str] = TRL

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(-logsigmoid(self.margin(terms) - self.simpo_gamma), state=state)


class CPO(ReferenceFree):
    """Contrastive PO: -log sigmoid(s_w - s_l) + alpha e_w."""

    type: Literal["cpo"] = "cpo"
    cpo_alpha: float = Field(default=1.0, ge=0)

    paper: ClassVar[str] = "Xu et al. 2024, arXiv 2401.08417"
    checked: ClassVar[str] = TRL

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(-logsigmoid(self.margin(terms)) + self.cpo_alpha * terms.winner, state=state)


class ORPO(ReferenceFree):
    """Odds-ratio PO: e_w - lambda log sigmoid(lo_w - lo_l), lo = log p / (1 - p) with p = exp(-kappa beta e)."""

    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=10.0, gt=0)
    orpo_lambda: float = Field(default=0.1, gt=0)

    paper: ClassVar[str] = "Hong et al. 2024, arXiv 2403.07691"
    checked: ClassVar[str] = TRL

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        odds = self._log_odds(terms.winner) - self._log_odds(require(terms.loser, "loser"))
        return LossOutput(terms.winner - self.orpo_lambda * logsigmoid(odds), state=state)

    def _log_odds(self, error: Tensor) -> Tensor:
        log_p = -self.scale * error.clamp(min=1e-6)
        return log_p - (-torch.expm1(log_p)).log()


class RePO(ReferenceFree):
    """RePO: max(0, gamma - (s_w - s_l)), nothing once the margin is reached. Add ``sft``."""

    type: Literal["repo"] = "repo"
    gamma: float = Field(default=0.5, gt=0)

    paper: ClassVar[str] = "Wu et al. 2025, arXiv 2503.07426"
    checked: ClassVar[str] = "the authors' formula by hand"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        return LossOutput(relu(self.gamma - self.margin(terms)), state=state)
