"""Losses on finished samples, noised again: no trajectory, no density, any sampler."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from diffalign.objectives.base import Data, GroupTerms, ImageTerms, LossOutput, Need, Objective, require
from diffalign.objectives.listwise import Listwise
from diffalign.objectives.policy import CODE, clip_metrics, ratio_of, surrogate


class NFT(Objective):
    """DiffusionNFT: c / beta [p |R+|^2 / w+ + (1 - p) |R-|^2 / w-] + kl |f - f_ref|^2, p = 1/2 + A / (2 c) held in [0, 1].

    R is the residual x0_hat - x0 and R_old that of the policy that sampled; R+ = beta R + (1 - beta) R_old and
    R- = (1 + beta) R_old - beta R; w = mean |R|, at least 1e-5, in fp64 and held constant. Where the policy is still the one
    that sampled the gradient is A / w times that of mean R^2, whatever beta.
    """

    type: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0)
    """How far the two implied policies stand from the old one: 1, or 0.1 for several rewards and text."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """c: advantages beyond it are cut."""
    kl: float = Field(default=1e-4, ge=0)
    """Weight of the distance to the reference."""

    data: ClassVar[Data] = "images"
    paper: ClassVar[str] = "Zheng et al. 2025, arXiv 2509.16117"
    checked: ClassVar[str] = f"{CODE}; on-policy the gradient is A / w times the error's"
    held: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"residual", "old", "distance", "reference"}) if self.kl else frozenset({"residual", "old"})

    def __call__(self, terms: ImageTerms, state: dict[str, Tensor]) -> LossOutput:
        now, old = require(terms.residual, "residual"), require(terms.residual_old, "residual_old").detach()
        positive = (0.5 + terms.advantage / (2 * self.advantage_clip)).clamp(0, 1)
        toward = _normalised(self.beta * now + (1 - self.beta) * old)
        away = _normalised((1 + self.beta) * old - self.beta * now)
        loss = self.advantage_clip / self.beta * (positive * toward + (1 - positive) * away)
        return LossOutput(loss + self.kl * require(terms.distance, "distance") if self.kl else loss, state=state)


def _normalised(residual: Tensor) -> Tensor:
    """mean R^2 / mean |R|, (B,), the divisor in fp64 and without gradient."""
    r = residual.flatten(1)
    w = r.detach().double().abs().mean(1).clamp(min=1e-5)
    return (r.square().mean(1) / w).to(r.dtype)


Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


class AWM(Objective):
    """AWM: max(-A rho, -A clip(rho, 1 +- eps)) + beta |f - f_ref|^2 + near |f - f_avg|^2, rho = exp(l_old - l), l the weighted
    denoise error.

    l is e, t e, t^2 e, t (sqrt(e + 1e-10) - 1e-5), or t ((e + 1e-10)^p - 1e-10^p) / p, with t the time that the network is
    told: on a flow path sigma, which the scheduler's shift has moved.
    """

    type: Literal["awm"] = "awm"
    weighting: Weighting = "ghuber"
    power: float = Field(default=0.25, gt=0, le=1)
    """p of ghuber."""
    clip_range: float = Field(default=1.0, gt=0)
    """Of rho; the authors' 1 is far outside."""
    beta: float = Field(default=1e-3, ge=0)
    """Weight of the distance to the reference."""
    near: float = Field(default=0.0, ge=0)
    """Weight of the distance to ``online.average``, an average of the policy."""

    data: ClassVar[Data] = "images"
    paper: ClassVar[str] = "Xue et al. 2025 (AWM), arXiv 2509.25050"
    checked: ClassVar[str] = CODE

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        found: frozenset[Need] = frozenset({"old", "distance", "reference"}) if self.beta else frozenset({"old"})
        return found | {"average"} if self.near else found

    def weighted(self, error: Tensor, t: Tensor) -> Tensor:
        """l(e, t), (B,)."""
        tiny = 1e-10
        match self.weighting:
            case "uniform":
                return error
            case "t":
                return error * t
            case "t2":
                return error * t.square()
            case "huber":
                return ((error + tiny).sqrt() - tiny**0.5) * t
            case "ghuber":
                return ((error + tiny) ** self.power - tiny**self.power) * t / self.power

    def __call__(self, terms: ImageTerms, state: dict[str, Tensor]) -> LossOutput:
        t = require(terms.time, "time").to(terms.error)
        log_ratio = self.weighted(require(terms.old, "old"), t) - self.weighted(terms.error, t)
        ratio = ratio_of(log_ratio)
        loss = surrogate(ratio, terms.advantage, self.clip_range, self.clip_range)
        seen = clip_metrics(ratio, terms.advantage, self.clip_range, self.clip_range)
        if self.beta:
            loss = loss + self.beta * require(terms.distance, "distance")
        if self.near:
            loss = loss + self.near * require(terms.distance_average, "distance_average")
        return LossOutput(loss, seen, state)


class RWR(Objective):
    """Reward-weighted regression: sum_k w_k e_k with w = softmax(R / alpha) over the K images of a prompt: only imitation."""

    type: Literal["rwr"] = "rwr"
    alpha: float = Field(default=1.0, gt=0)
    """Temperature of the rewards."""

    data: ClassVar[Data] = "groups"
    needs: ClassVar[frozenset[Need]] = frozenset({"scores"})
    paper: ClassVar[str] = "Lee et al. 2023, arXiv 2302.12192; as a baseline in Black et al. 2023, arXiv 2305.13301"
    checked: ClassVar[str] = "by hand; equal scores are the mean error"

    def __call__(self, terms: GroupTerms, state: dict[str, Tensor]) -> LossOutput:
        weights = (terms.scores / self.alpha).softmax(-1)
        return LossOutput((weights * terms.error).sum(-1), {"weight/largest": weights.amax(-1)}, state)


class DGPO(Listwise):
    """DGPO: -log sigmoid(mean_k A_k r_k) on a group's advantages A, centred, so that the partition function cancels.

    Its gradient is beta times that of the published sigma(mean_k A_k beta (e_k - e_ref_k)) mean_k A_k e_k, the sigma held.
    """

    type: Literal["dgpo"] = "dgpo"
    beta: float = Field(default=100.0, gt=0)
    kappa: float = Field(default=1.0, gt=0)

    paper: ClassVar[str] = "Luo et al. 2025 (DGPO), arXiv 2510.08425"
    checked: ClassVar[str] = "Flow-Factory's code, written again in the test: the same gradient over beta"

    def utility(self, r: Tensor, scores: Tensor) -> Tensor:
        advantages = scores - scores.mean(-1, keepdim=True)
        return softplus(-(advantages * r).mean(-1))


class CRD(Listwise):
    """Centred reward distillation: mean_k of the cross entropy of sigmoid(r_k - mean r) with sigmoid(R_k - mean R)."""

    type: Literal["crd"] = "crd"
    beta: float = Field(default=1.0, gt=0)
    kappa: float = Field(default=1.0, gt=0)

    paper: ClassVar[str] = "arXiv 2603.14128"
    checked: ClassVar[str] = "Flow-Factory's code with uniform weights, the mean of r held as there"
    held: ClassVar[bool] = True

    def utility(self, r: Tensor, scores: Tensor) -> Tensor:
        wanted = (scores - scores.mean(-1, keepdim=True)).sigmoid()
        return binary_cross_entropy_with_logits(r - r.detach().mean(-1, keepdim=True), wanted, reduction="none").mean(-1)
