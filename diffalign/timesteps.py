"""How training times are drawn and weighted."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.path import Coeffs, Kind, error_weight
from diffalign.spec import Choice, Spec, read_with

NOISE_ALONE = 1e-6
"""An SNR below this is that of a schedule that ends at 0: diffusers writes alpha^2 = 2^-24 for it, and flows end there too."""
Weighting = Literal["none", "min_snr", "epsilon", "low_snr", "sigmoid"]


class TimestepPolicy(Spec):
    """Draws times as fractions of the schedule, 0 clean and 1 noise, and weights their errors."""

    weighting: Weighting = "none"
    """lambda(t) on every error: none; min_snr, min(SNR, gamma) times the error of x0 (Hang et al. 2023: min(SNR, gamma) / SNR
    for noise, / (SNR + 1) for v); epsilon, the error of the noise whatever the model predicts ((1 - t)^2 in flow matching);
    low_snr, 1 + sigma / alpha over its largest value (Rethinking-DPO), for schedules that do not end in noise alone; sigmoid,
    sigmoid(bias - log SNR) (Kingma and Gao 2023; CaPO)."""
    gamma: float = Field(default=5.0, gt=0)
    """gamma of min_snr."""
    bias: float = 0.0
    """Of sigmoid."""

    @model_validator(mode="after")
    def _read(self) -> Self:
        read_with(self, "weighting", "min_snr", "gamma")
        read_with(self, "weighting", "sigmoid", "bias")
        return self

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` times in [0, 1), fp32 on the CPU, one from each n-th of the distribution."""
        q = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        return self.at(q).clamp(0, 1 - 2**-24)

    @abstractmethod
    def at(self, q: Tensor) -> Tensor:
        """The time below which a share ``q`` of all draws falls."""

    def weight(self, c: Coeffs, kind: Kind = "epsilon", noisiest: Coeffs | None = None) -> Tensor:
        """lambda(t), (B,); ``noisiest`` are the coefficients at the end of the schedule, which low_snr asks for.

        Raises:
            ConfigError: low_snr where the schedule ends in noise alone: there sigma / alpha has no largest value.
        """
        match self.weighting:
            case "none":
                return torch.ones_like(c.alpha)
            case "min_snr":
                if kind == "epsilon":  # the same, and finite where alpha is 0
                    return (self.gamma / c.snr).clamp(max=1.0)
                return c.snr.clamp(max=self.gamma) * error_weight(kind, c)
            case "epsilon":
                return error_weight(kind, c) / error_weight("epsilon", c)
            case "low_snr":
                end = c if noisiest is None else noisiest
                if (end.snr < NOISE_ALONE).any():
                    raise ConfigError(
                        "timesteps.weighting: low_snr is 1 + sigma / alpha over its largest value, but this model's schedule "
                        "ends in noise alone, where alpha is 0",
                        hint="take none, epsilon, min_snr or sigmoid",
                    )
                return 1 + (c.sigma / c.alpha) / (end.sigma / end.alpha).max()
            case "sigmoid":
                return torch.sigmoid(self.bias - c.snr.log())


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

    def at(self, q: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * q


class LogitNormal(TimestepPolicy):
    """sigmoid of a normal draw (Esser et al. 2024, section 3.1), which favours the middle of the path, then shifted."""

    type: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    shift: float = Field(default=1.0, gt=0)
    """s in t -> s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23): above 1 for more noise."""

    def at(self, q: Tensor) -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(q.double().clamp(1e-12, 1 - 1e-12))).float()
        return self.shift * t / (1 + (self.shift - 1) * t)


class Skewed(TimestepPolicy):
    """Bins of time whose mass falls by ``gamma_rank`` from one to the next, the noisiest first (Rethinking-DPO)."""

    type: Literal["skewed"] = "skewed"
    gamma_rank: float = Field(default=0.9, gt=0, lt=1)
    bins: int = Field(default=10, ge=2)

    def at(self, q: Tensor) -> Tensor:
        mass = self.gamma_rank ** torch.arange(self.bins - 1, -1, -1, dtype=torch.double)
        edges = torch.cat([torch.zeros(1), (mass / mass.sum()).cumsum(0)]).double()
        i = torch.searchsorted(edges, q.double(), right=True).clamp(1, self.bins) - 1
        return ((i + (q - edges[i]) / (edges[i + 1] - edges[i])) / self.bins).float()


class Steps(TimestepPolicy):
    """Only these times, as often each: the few of a distilled model, such as 0.249, 0.499, 0.749 and 0.999."""

    type: Literal["steps"] = "steps"
    times: tuple[float, ...] = Field(default=(0.249, 0.499, 0.749, 0.999), min_length=1)

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not all(0 <= t < 1 for t in self.times):
            raise ValueError(f"times are fractions of the schedule in [0, 1), got {self.times}")
        return self

    def at(self, q: Tensor) -> Tensor:
        exact = torch.tensor(sorted(self.times), dtype=torch.double)
        times = exact.float()  # never below what was written: 0.249 of 1000 steps is the step 249
        times = torch.where(times.double() < exact, times.nextafter(torch.ones(())), times)
        return times[(q * len(times)).long().clamp(max=len(times) - 1)]


TIMESTEPS = Choice(TimestepPolicy, {"uniform": Uniform, "logit_normal": LogitNormal, "skewed": Skewed, "steps": Steps})
