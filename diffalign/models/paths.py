"""The two kinds of path that a family's pipeline can be on, with the schedule of the pipeline's own scheduler."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.base import ModelSpec, Phase
from diffalign.models.pipeline import PipelineModel
from diffalign.path import Coeffs


class NoisePrediction(PipelineModel):
    """A discrete variance-preserving schedule; ``t`` is an index into it."""

    kinds = ("epsilon", "v_prediction", "sample")

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        super().__init__(pipeline, spec)
        if not hasattr(self.scheduler, "alphas_cumprod"):
            name = type(self.scheduler).__name__
            raise ModelError(f"{spec.path}: the scheduler {name} is not of noise prediction", hint="it has no alphas_cumprod")
        kind = self.scheduler.config.prediction_type
        if kind not in self.kinds:
            raise ModelError(f"{spec.path}: prediction type {kind!r} is not supported", hint=", ".join(self.kinds))
        self.kind = kind
        abar = self.scheduler.alphas_cumprod.double()
        self._alpha, self._sigma = abar.sqrt().float(), (1 - abar).sqrt().float()

    def stage(self, phase: Phase, device: torch.device | None = None) -> Self:
        super().stage(phase, device)
        self._alpha, self._sigma = self._alpha.to(self.device), self._sigma.to(self.device)
        return self

    def timestep(self, u: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Fractions of the schedule in [0, 1) to integer timesteps, whatever the size."""
        return (u.double() * len(self._alpha)).long().to(self.device)

    def coeffs(self, t: Tensor) -> Coeffs:
        return Coeffs(self._alpha[t], self._sigma[t])

    def solver(self, steps: int) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return scheduler

    def grid(self, steps: int) -> tuple[Tensor, Coeffs]:
        """See :meth:`diffalign.models.base.Model.grid`. Spacing, offset and the last alpha are those of DDIM.

        Where they do not divide the schedule, diffusers' DDIM steps to a level one off the next timestep; here a step ends
        where the next begins.

        Raises:
            ModelError: the scheduler clips or thresholds x0, which the rules do not.
        """
        from diffusers import DDIMScheduler

        config = self.scheduler.config
        if config.get("clip_sample") or config.get("thresholding"):
            raise ModelError(f"{self.path}: its scheduler clips x0", hint="set clip_sample and thresholding to false")
        ddim = DDIMScheduler.from_config(config)
        ddim.set_timesteps(steps)
        t, end = ddim.timesteps.to(self.device), ddim.final_alpha_cumprod.double().to(self.device)
        c = self.coeffs(t)
        last = Coeffs(end.sqrt().float()[None], (1 - end).sqrt().float()[None])
        return t, Coeffs(torch.cat([c.alpha, last.alpha]), torch.cat([c.sigma, last.sigma]))


class FlowMatching(PipelineModel):
    """A straight path from data to noise; ``t`` = 1000 sigma, a float in [0, 1000].

    The scheduler's shift moves training times towards noise as it moves the steps of sampling: Esser et al. 2024,
    section 5.3.2, with a constant shift, or one that grows with the number of image tokens.
    """

    kinds = ("flow",)
    kind = "flow"

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        super().__init__(pipeline, spec)
        if (name := type(self.scheduler).__name__) != "FlowMatchEulerDiscreteScheduler":
            raise ModelError(f"{spec.path}: the scheduler {name} is not supported", hint="FlowMatchEulerDiscreteScheduler")
        self.steps = self.scheduler.config.num_train_timesteps

    def timestep(self, u: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Fractions of the schedule in [0, 1) to shifted times in [0, 1000)."""
        sigma, shift = u.double(), self.scheduler.shift
        if self.scheduler.config.use_dynamic_shifting:
            sigma = self.scheduler.time_shift(self._mu(size), 1.0, sigma)
        else:
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return (self.steps * sigma).float().to(self.device)

    def coeffs(self, t: Tensor) -> Coeffs:
        sigma = t.float() / self.steps
        return Coeffs(1 - sigma, sigma)

    def solver(self, steps: int) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        mu = {"mu": self._mu()} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(steps, sigmas=self._sigmas(steps), **mu)
        return scheduler

    def grid(self, steps: int) -> tuple[Tensor, Coeffs]:
        """See :meth:`diffalign.models.base.Model.grid`. The sigmas are the scheduler's, never computed a second time: its
        own shift may have been applied to them twice.
        """
        scheduler = self.solver(steps)
        sigma = scheduler.sigmas.float().to(self.device)
        return scheduler.timesteps.float().to(self.device), Coeffs(1 - sigma, sigma)

    def _sigmas(self, steps: int) -> Any:
        """Unshifted steps of sampling, where the pipeline has its own."""
        return None

    def _mu(self, size: tuple[int, int] | None = None) -> float:
        """The logarithm of the shift, linear in the number of image tokens."""
        c, (height, width) = self.scheduler.config, size or self.latent_shape[1:]
        tokens = (height // self.patch) * (width // self.patch)
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return float(c.base_shift + slope * (tokens - c.base_image_seq_len))
