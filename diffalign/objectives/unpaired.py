"""Losses on single images that are good or bad."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.objectives.base import Data, LabelTerms, LossOutput, Need, Objective, Rewarded, require
from diffalign.objectives.pairwise import CODE

REFERENCE: frozenset[Need] = frozenset({"reference"})


class Labelled(Rewarded):
    """A function of the reward r of one image and its label."""

    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[Need]] = REFERENCE

    def reward(self, terms: LabelTerms) -> Tensor:
        """r = kappa beta (e_ref - e), (B,)."""
        return self.scale * (require(terms.ref, "ref") - terms.error)


def running(state: dict[str, Tensor], now: Tensor, decay: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A baseline: the running mean of the batches before, 0 at first, and the state with this batch in it.

    The mean of the batch itself would be noise where batches are small, and would change with their size.
    """
    before = state.get("baseline", torch.zeros_like(now[0]))
    return before, {"baseline": now.detach().mean().lerp(before, decay)}


class KTO(Labelled):
    """Diffusion-KTO: w_d (1 - sigmoid(r - z)) on good images, w_u (1 - sigmoid(z - r)) on bad, z = max(0, mean r)."""

    type: Literal["kto"] = "kto"
    desirable_weight: float = Field(default=1.0, ge=0)
    undesirable_weight: float = Field(default=1.0, ge=0)
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean behind z."""

    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.04465"
    checked: ClassVar[str] = f"{CODE}, at the batch's own z (kappa 1); equal to apo_zero at z = 0"

    def __call__(self, terms: LabelTerms, state: dict[str, Tensor]) -> LossOutput:
        r = self.reward(terms)
        mean, state = running(state, r, self.decay)
        z = mean.clamp(min=0)
        good, bad = self.desirable_weight * (z - r).sigmoid(), self.undesirable_weight * (r - z).sigmoid()
        return LossOutput(torch.where(terms.good, good, bad), {"rewards": r.detach()}, state)


class BCO(Labelled):
    """Binary classifier optimisation: -log sigmoid(r - delta) on good, -log sigmoid(delta - r) on bad, delta = mean r."""

    type: Literal["bco"] = "bco"
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the running mean delta."""

    paper: ClassVar[str] = "Jung et al. 2024, arXiv 2404.04656"
    checked: ClassVar[str] = "the paper's formula by hand; at delta = 0 equal to ddo"

    def __call__(self, terms: LabelTerms, state: dict[str, Tensor]) -> LossOutput:
        r = self.reward(terms)
        delta, state = running(state, r, self.decay)
        return LossOutput(torch.where(terms.good, softplus(delta - r), softplus(r - delta)), {"rewards": r.detach()}, state)


class NPO(Labelled):
    """Negative PO: -2 log sigmoid(-r) on bad images, retain e on good ones."""

    type: Literal["npo"] = "npo"
    retain: float = Field(default=1.0, ge=0)
    """Weight of the plain loss on good images."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2404.05868"
    checked: ClassVar[str] = "the authors' formula by hand, times beta"

    def __call__(self, terms: LabelTerms, state: dict[str, Tensor]) -> LossOutput:
        r = self.reward(terms)
        return LossOutput(torch.where(terms.good, self.retain * terms.error, 2 * softplus(r)), {"rewards": r.detach()}, state)


class DDO(Labelled):
    """Direct discriminative optimisation: -log sigmoid(r) on data, -alpha log sigmoid(-r) on the reference's own samples."""

    type: Literal["ddo"] = "ddo"
    alpha: float = Field(default=4.0, gt=0)
    """Weight of the model's own samples."""

    paper: ClassVar[str] = "Zheng et al. 2025, arXiv 2503.01103"
    checked: ClassVar[str] = "by hand; alpha = 1 is bco_pair at delta = 0"

    def __call__(self, terms: LabelTerms, state: dict[str, Tensor]) -> LossOutput:
        r = self.reward(terms)
        return LossOutput(torch.where(terms.good, softplus(-r), self.alpha * softplus(r)), {"rewards": r.detach()}, state)


class PMPO(Objective):
    """PMPO: alpha e on good images, -(1 - alpha) e on bad ones, and beta |f - f_ref|^2 on all of them."""

    type: Literal["pmpo"] = "pmpo"
    alpha: float = Field(default=0.75, gt=0, le=1)
    beta: float = Field(default=1.0, gt=0)
    """Weight of the KL to the reference, in closed form: without it, bad images are pushed away without end."""

    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[Need]] = REFERENCE | {"distance"}
    paper: ClassVar[str] = "Abdolmaleki et al. 2024, eq. 10, arXiv 2410.04166"
    checked: ClassVar[str] = "the paper's formula by hand"

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.beta <= 1 - self.alpha:
            raise ValueError(f"beta ({self.beta}) must be above 1 - alpha ({1 - self.alpha:g}), or the loss has no floor")
        return self

    def __call__(self, terms: LabelTerms, state: dict[str, Tensor]) -> LossOutput:
        signed = torch.where(terms.good, self.alpha * terms.error, (self.alpha - 1) * terms.error)
        return LossOutput(signed + self.beta * require(terms.distance, "distance"), state=state)
