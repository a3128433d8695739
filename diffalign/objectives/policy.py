"""Policy gradients on the steps of stochastic trajectories.

A ratio is exp of the mean over dimensions of log p - log p_old, as in all published code: the D-th root of the true one, with
a spread of r / sqrt(D) and a bias of -r^2 / 2, r = rms((mu - mu_old) / std). Hence clip ranges of 1e-4, and hence the guard.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.objectives.base import Data, LossOutput, Need, Objective, StepTerms, require

CODE = "the authors' code, written again in the test"
LARGEST = 20.0
"""Of |log ratio|: beyond e^20 there is nothing to learn, and infinity times an advantage of 0 is not a number."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp, finite."""
    return log_ratio.clamp(-LARGEST, LARGEST).exp()


def surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's max(-A rho, -A clip(rho, 1 - low, 1 + high)), (B,): no gradient once rho went far enough the right way."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clip_metrics(ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Share of ratios outside of the band, and of rows that still teach."""
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    stopped = (advantage > 0) & (ratio > 1 + high) | (advantage < 0) & (ratio < 1 - low)
    return {"ratio/clipped": outside.float().detach(), "rows_trained": ((advantage != 0) & ~stopped).float().detach()}


class PolicyGradient(Objective):
    """What all losses on steps share: the KL to the reference, exact for steps from the same x_t with the same std.

    It stands on every row that is given, also where the advantage is 0.
    """

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference, mean (mu - mu_ref)^2 / (2 std^2). Flow-GRPO's own leaves the step's length out of
    std, so that its 0.04 is 0.04 |dt| here."""

    data: ClassVar[Data] = "steps"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference"}) if self.beta else frozenset()

    def with_kl(self, loss: Tensor, terms: StepTerms) -> Tensor:
        """``loss`` plus beta KL(policy || reference)."""
        return loss + self.beta * require(terms.kl_ref, "kl_ref") if self.beta else loss


class Reinforce(PolicyGradient):
    """REINFORCE (DDPO-SF): -A log rho, whose gradient is -A times that of log p. One update a rollout: it has no clip."""

    type: Literal["reinforce"] = "reinforce"

    paper: ClassVar[str] = "Black et al. 2023 (DDPO), arXiv 2305.13301"
    checked: ClassVar[str] = "the score of an explicit Gaussian by autograd"

    def __call__(self, terms: StepTerms, state: dict[str, Tensor]) -> LossOutput:
        seen = {"rows_trained": (terms.advantage != 0).float()}
        return LossOutput(self.with_kl(-terms.advantage * terms.log_ratio, terms), seen, state)


class Clipped(PolicyGradient):
    """Losses with PPO's clip."""

    clip_range: float = Field(default=1e-4, gt=0, lt=1)
    """How far the ratio may go from 1. It must stay above the difference between the passes of rollout and training."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Above 1, where it differs."""

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's surrogate and what is logged of it."""
        ratio, high = ratio_of(log_ratio), self.clip_range_high or self.clip_range
        return surrogate(ratio, advantage, self.clip_range, high), clip_metrics(ratio, advantage, self.clip_range, high)


class PPO(Clipped):
    """PPO's clip (DDPO-IS, Flow-GRPO, DanceGRPO): max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL to the reference."""

    type: Literal["ppo"] = "ppo"

    paper: ClassVar[str] = "Black et al. 2023 (DDPO), arXiv 2305.13301; Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470"
    checked: ClassVar[str] = f"{CODE}; at rho = 1 the gradient is reinforce's"

    def __call__(self, terms: StepTerms, state: dict[str, Tensor]) -> LossOutput:
        loss, seen = self.clipped(terms.log_ratio, terms.advantage)
        return LossOutput(self.with_kl(loss, terms), seen, state)


class GRPOGuard(Clipped):
    """GRPO-Guard: PPO on log rho = (log p - log p_old + KL_old) std, divided by |dt|: no bias, and one size at all steps.

    The authors' code means KL_old over the batch as well, through an empty tuple of dimensions; here it is each row's own.
    """

    type: Literal["grpo_guard"] = "grpo_guard"
    clip_range: float = Field(default=2e-6, gt=0, lt=1)

    paper: ClassVar[str] = "Wang et al. 2025 (GRPO-Guard), eq. 8, arXiv 2510.22319"
    checked: ClassVar[str] = f"{CODE}, row by row; the bias by drawing from the Gaussian"

    def __call__(self, terms: StepTerms, state: dict[str, Tensor]) -> LossOutput:
        loss, seen = self.clipped((terms.log_ratio + terms.kl_old) * terms.std, terms.advantage)
        return LossOutput(self.with_kl(loss / terms.dt, terms), seen, state)


class FlowDPPO(PolicyGradient):
    """Flow-DPPO: -A rho, without rows with KL_old >= tau that are pushed further away: A and log rho of one sign."""

    type: Literal["flow_dppo"] = "flow_dppo"
    tau: float = Field(default=1e-5, gt=0)
    """Largest KL of a step to the policy that sampled."""

    paper: ClassVar[str] = "Ping et al. 2026 (Flow-DPPO), arXiv 2606.11025"
    checked: ClassVar[str] = f"{CODE} (UniRL), and the same in verl-omni and Flow-Factory; the cases of the mask"

    def __call__(self, terms: StepTerms, state: dict[str, Tensor]) -> LossOutput:
        a, ratio = terms.advantage, ratio_of(terms.log_ratio)
        outward = (a > 0) & (terms.log_ratio > 0) | (a < 0) & (terms.log_ratio < 0)
        dropped = (terms.kl_old >= self.tau) & outward
        seen = {"ratio/clipped": dropped.float(), "rows_trained": ((a != 0) & ~dropped).float()}
        return LossOutput(self.with_kl(torch.where(dropped, 0, -a * ratio), terms), seen, state)
