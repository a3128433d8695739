"""How training times are drawn and weighted."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.path import Coeffs
from diffalign.spec import Choice, Spec

Weighting = Literal["none", "min_snr"]


class TimestepPolicy(Spec):
    """Draws times as fractions of the schedule, 0 clean and 1 noise, and weights their errors."""

    weighting: Weighting = "none"
    """lambda(t) on every error: none, or min_snr (Hang et al. 2023, for noise prediction: min(SNR, gamma) / SNR)."""
    gamma: float = Field(default=5.0, gt=0)
    """gamma of min_snr."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` times in [0, 1), fp32 on the CPU."""

    def weight(self, c: Coeffs) -> Tensor:
        """lambda(t), (B,)."""
        if self.weighting == "none":
            return torch.ones_like(c.alpha)
        return (self.gamma / c.snr).clamp(max=1.0)


class Uniform(TimestepPolicy):
    """Uniform over [low, high), the choice of Diffusion-DPO."""

    type: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0.0, lt=1.0)
    high: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = self.low + (self.high - self.low) * torch.rand(n, generator=generator)
        return u.clamp(max=1 - 2**-24)


class LogitNormal(TimestepPolicy):
    """sigmoid of a normal draw (Esser et al. 2024, section 3.1), which favours the middle of the path."""

    type: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator)).clamp(max=1 - 2**-24)


TIMESTEPS = Choice(TimestepPolicy, {"uniform": Uniform, "logit_normal": LogitNormal})
