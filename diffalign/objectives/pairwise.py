"""Losses on pairs of a preferred and a less preferred image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import LossOutput, Need, Objective, PairTerms, require


def rewards(terms: PairTerms, scale: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards of winner and loser, (B,) each: r = scale (e_ref - e_policy)."""
    winner = require(terms.ref_winner, "ref_winner") - terms.winner
    loser = require(terms.ref_loser, "ref_loser") - require(terms.loser, "loser")
    return scale * winner, scale * loser


class Sigmoid(Objective):
    """Diffusion-DPO: -log sigmoid(r_w - r_l), with r = kappa beta (e_ref - e_policy).

    Wallace et al. 2023, eq. 14, with the mean over dimensions in place of the sum and T omega absorbed in beta, as in
    the authors' code; its factor 1/2 is ``kappa``.
    """

    type: Literal["sigmoid"] = "sigmoid"
    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference; not comparable across resolutions, latent sizes or prediction types."""
    kappa: float = Field(default=0.5, gt=0)
    """1/2 in the authors' code and in diffusers' SDXL script, 1 in diffusers' SD script."""

    needs: ClassVar[frozenset[Need]] = frozenset({"loser", "reference"})
    paper: ClassVar[str] = "Wallace et al. 2023, arXiv 2311.12908"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        r_w, r_l = rewards(terms, self.kappa * self.beta)
        return LossOutput(-logsigmoid(r_w - r_l), state=state)


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

    needs: ClassVar[frozenset[Need]] = frozenset({"loser"})
    paper: ClassVar[str] = "Hong et al. 2024, arXiv 2406.06424"

    def __call__(self, terms: PairTerms, state: dict[str, Tensor]) -> LossOutput:
        margin = self.num_train_timesteps * (self._phi(terms.winner) - self._phi(require(terms.loser, "loser")))
        return LossOutput(terms.winner - self.beta * logsigmoid(margin), {"mapo_margin": margin.detach()}, state)

    def _phi(self, error: Tensor) -> Tensor:
        """Decreasing in the error, 1 at 0; written with expm1, and its limit where it is 0/0."""
        u = self.snr_value * error
        safe = u.clamp(min=1e-6)
        return torch.where(u < 1e-6, 1 - u / 2, safe * (-safe).exp() / -torch.expm1(-safe))
