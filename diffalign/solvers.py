"""Multi-step ODE solvers in (alpha, sigma). They carry a history and have no density: for steps that are not trained."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.path import Coeffs

Before = tuple[Tensor, Coeffs, Tensor]
"""x0 of the step before, (B, ...), the coefficients that it was made at, and (B,) whether it may be used."""


def dpm_2m(x: Tensor, x0: Tensor, c: Coeffs, c_next: Coeffs, before: Before | None) -> Tensor:
    r"""One step of DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, algorithm 2), from x_t, (B, ...).

    With :math:`\lambda = \log(\alpha / \sigma)`, steps :math:`h` now and :math:`h_0` before,
    :math:`x_s = \frac{\sigma_s}{\sigma_t} x + (\alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t}) D` and
    :math:`D = \hat x_0 + \frac{h}{2 h_0} (\hat x_0 - \hat x_0^{before})`. The exponentials of lambda are written out, so sigma
    may be 1 at the start (where the step before has infinite length and no weight) and 0 at the end (where the step itself
    has, and is of first order). First order, which is DDIM, is also taken where there is nothing before.
    """
    d = x0
    if before is not None:
        x0_before, c_before, usable = before
        weight = (_log_snr(c_next) - _log_snr(c)) / (2 * (_log_snr(c) - _log_snr(c_before)))
        weight = torch.where(usable & weight.isfinite(), weight, 0.0)
        d = x0 + _wide(weight, x) * (x0 - x0_before)
    shrink = c_next.sigma / c.sigma
    return _wide(shrink, x) * x + _wide(c_next.alpha - c.alpha * shrink, x) * d


def _log_snr(c: Coeffs) -> Tensor:
    """lambda, half the logarithm of the signal-to-noise ratio, in fp64: its differences are small."""
    return c.alpha.double().log() - c.sigma.double().log()


def _wide(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.to(like).view(-1, *(1,) * (like.dim() - 1))
