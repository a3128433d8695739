r"""The Gaussian path :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` that every supported model follows.

A model family fixes only the coefficients and which combination of :math:`x_0` and :math:`\epsilon` its network predicts:

============== =========================== ==========================
kind           network predicts            coefficients
============== =========================== ==========================
epsilon        eps                         alpha^2 + sigma^2 = 1
v_prediction   alpha eps - sigma x0        alpha^2 + sigma^2 = 1
sample         x0                          any
flow           eps - x0                    alpha = 1 - sigma
============== =========================== ==========================

v-prediction: Salimans and Ho 2022, section 2.4. Flow matching with straight paths: Lipman et al. 2022; Liu et al. 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Coeffs:
    """alpha and sigma at one time per sample, both (B,), fp32 or fp64."""

    alpha: Tensor
    sigma: Tensor

    def __getitem__(self, rows: Any) -> Coeffs:
        return Coeffs(self.alpha[rows], self.sigma[rows])

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, (B,)."""
        return (self.alpha / self.sigma) ** 2

    def over(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma shaped to multiply ``x`` (B, ...)."""
        shape = (-1, *(1,) * (x.dim() - 1))
        return self.alpha.to(x).view(shape), self.sigma.to(x).view(shape)


def add_noise(x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
    """x_t (B, ...)."""
    a, s = c.over(x0)
    return a * x0 + s * eps


def target(kind: Kind, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
    """What the network is trained to predict, shaped as ``x0``."""
    a, s = c.over(x0)
    match kind:
        case "epsilon":
            return eps
        case "v_prediction":
            return a * eps - s * x0
        case "sample":
            return x0
        case "flow":
            return eps - x0


def split(kind: Kind, prediction: Tensor, x: Tensor, c: Coeffs) -> tuple[Tensor, Tensor]:
    """Read a prediction at ``x`` = x_t as the pair (x0, eps) that it implies."""
    a, s = c.over(x)
    match kind:
        case "epsilon":
            return (x - s * prediction) / a, prediction
        case "v_prediction":
            return a * x - s * prediction, s * x + a * prediction
        case "sample":
            return prediction, (x - a * prediction) / s
        case "flow":
            return x - s * prediction, x + a * prediction


def error_weight(kind: Kind, c: Coeffs) -> Tensor:
    """lambda(t), (B,): squared error of x0 = lambda(t) * squared error of ``kind``'s native target.

    Errors of two kinds therefore relate by the ratio of their weights: e_eps = SNR e_x0, e_v = e_eps / alpha^2,
    e_flow = e_x0 / sigma^2.
    """
    match kind:
        case "epsilon":
            return 1 / c.snr
        case "v_prediction" | "flow":
            return c.sigma**2
        case "sample":
            return torch.ones_like(c.sigma)


def denoise_error(prediction: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample, (B,), in fp32: half precision loses the differences that preferences are made of.

    ``weight`` (B, 1, H, W) multiplies the squares before the mean.
    """
    square = (prediction.float() - wanted.float()).square()
    return (square if weight is None else square * weight).flatten(1).mean(1)


def step_mean(x0: Tensor, eps: Tensor, c_next: Coeffs, k: Tensor) -> Tensor:
    """Mean of a one-step sampler, alpha_next x0 + k eps; ``k`` (B,) comes from a rule in :mod:`diffalign.rules`."""
    a, _ = c_next.over(x0)
    return a * x0 + k.to(x0).view(a.shape) * eps


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of N(mean, std^2) at ``x``, (B,), in fp32 and per dimension (the mean over dimensions, not the sum).

    ``std`` is (B,) and must be above 0: a deterministic step has no density.
    """
    s = std.float().view(-1, *(1,) * (x.dim() - 1))
    z = (x.float() - mean.float()) / s
    return (-0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def log_ratio(mean: Tensor, mean_old: Tensor, x: Tensor, std: Tensor) -> Tensor:
    r"""log N(x; mean, std^2) - log N(x; mean_old, std^2) per dimension, (B,): the logarithm of a policy ratio.

    .. math:: \frac{1}{D} \sum_d \frac{(\mu - \mu_{old})(2 x - \mu - \mu_{old})}{2 s^2}

    Equal to the difference of two :func:`log_density`, without the cancellation: it is exactly 0 where the means are equal.
    """
    m, old = _precise(mean), _precise(mean_old)
    return _over_two_variances((m - old) * (2 * _precise(x) - m - old), std)


def kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2) from N(other, std^2) per dimension, (B,): mean of (mean - other)^2 / (2 std^2)."""
    return _over_two_variances((_precise(mean) - _precise(other)).square(), std)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_two_variances(product: Tensor, std: Tensor) -> Tensor:
    return product.flatten(1).mean(1) / (2 * std.to(product).square())
