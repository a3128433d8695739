"""How the pictures of one example share time, noise and caption."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.data.pairs import Picture
from diffalign.errors import DataError
from diffalign.models import Cond, Model
from diffalign.path import Coeffs, split
from diffalign.sampling import item_seed
from diffalign.spec import Spec, read_with
from diffalign.timesteps import TimestepPolicy


class Coupling(Spec):
    """The ``coupling`` section."""

    noise: Literal["shared", "independent", "inverted", "stored", "replay"] | None = None
    """``shared``: one (t, eps) for all pictures of a pair or group, the default; ``independent``: each its own, as single
    images have anyway; ``inverted``: the noise to which the policy itself leads each picture (SmPO, InPO), at one t;
    ``stored``: the noise that each picture was made from (PNAPO), at one t, known of a dataset folder by diffalign;
    ``replay``: losers are states of the policy's own trajectories for the winner's caption, at one t, with the noise that it
    predicted there as the target (Diffusion-DRO); only winners are read."""
    draws: int = Field(default=1, ge=1)
    """Times per example, one from each n-th of their distribution; errors are averaged before the loss (VRPO)."""
    captions: Literal["shared", "own"] = "shared"
    """``own``: each picture with its own caption (DCPO, or one picture with two captions: TDPO); pairs need the column
    ``rejected_prompt``."""
    inversion_steps: int = Field(default=10, ge=1)
    """Steps from the clean picture to its time, of ``inverted``."""
    renoise: int = Field(default=0, ge=0)
    """Refinements of each of these steps (Garibi et al. 2024, ReNoise)."""
    replay_steps: int = Field(default=20, ge=1)
    """Steps of a whole trajectory, of ``replay``."""
    replay_every: int = Field(default=1, ge=1)
    """Optimizer steps until the policy that makes them is copied anew."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.noise == "replay" and (self.draws > 1 or self.captions == "own"):
            raise ValueError("noise: replay takes one draw and the winner's caption: drop draws and captions")
        read_with(self, "noise", "inverted", "inversion_steps", "renoise")
        read_with(self, "noise", "replay", "replay_steps", "replay_every")
        return self


def draw(
    coupling: Coupling, times: TimestepPolicy, pictures: int, shape: torch.Size, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """u (K, S) and eps (K, S, C, H, W) of K pictures and S draws."""
    n = coupling.draws
    if coupling.noise == "independent":
        apart = [(times.draw(n, generator), torch.randn(n, *shape, generator=generator)) for _ in range(pictures)]
        return torch.stack([u for u, _ in apart]), torch.stack([e for _, e in apart])
    u, eps = times.draw(n, generator), torch.randn(n, *shape, generator=generator)
    return u.expand(pictures, n), eps.expand(pictures, n, *shape)


def require_first_noise(picture: Picture, model: Model, size: tuple[int, int]) -> None:
    """Refuse a picture whose :func:`first_noise` is not that of its latents when it is trained at ``size`` (h, w).

    Raises:
        DataError: it is not known, or the picture was made at another size.
    """
    if picture.made is None:
        raise DataError(
            f"{picture.where}: its first noise is not known", hint="coupling.noise: stored needs images by diffalign"
        )
    if not picture.shape == tuple(size) == tuple(model.resolution):
        made, here, wanted = (f"{w} x {h}" for h, w in (picture.shape, model.resolution, size))
        raise DataError(
            f"{picture.where}: it is {made}, this model makes {here}, and it would be trained at {wanted}: noise has one size",
            hint="coupling.noise: stored needs images of the same kind of model, without data.resolution and data.buckets",
        )


def first_noise(picture: Picture, model: Model) -> Tensor:
    """The noise that a picture was sampled from, (C, H, W)."""
    assert picture.made is not None, "see require_first_noise"
    return torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(item_seed(*picture.made)))


@torch.no_grad()
def invert(model: Model, x0: Tensor, u: Tensor, cond: Cond, steps: int, renoise: int = 0) -> Tensor:
    """The eps (B, C, H, W) in x_t = alpha x0 + sigma eps where a deterministic sampler, run backwards to ``u`` (B,), ends.

    Each step goes from one noise level to the next along the prediction there; a refinement predicts again where it
    arrived and takes the mean of the two.
    """
    size = (x0.shape[-2], x0.shape[-1])

    def at(j: int) -> tuple[Tensor, Coeffs]:
        t = model.timestep((u * j / steps).clamp(min=1e-3), size)
        return t, model.coeffs(t)

    def noise(x: Tensor, t: Tensor, c: Coeffs) -> Tensor:
        return split(model.kind, model.predict(x, t, cond), x, c)[1]

    def moved(x: Tensor, eps: Tensor, c: Coeffs, c_next: Coeffs) -> Tensor:
        (a, s), (a_next, s_next) = c.over(x), c_next.over(x)
        return a_next * (x - s * eps) / a + s_next * eps

    x = x0
    for j in range(steps):
        (t, c), (t_next, c_next) = at(j), at(j + 1)
        eps = noise(x, t, c)
        there = moved(x, eps, c, c_next)
        for _ in range(renoise):
            eps = (eps + noise(there, t_next, c_next)) / 2
            there = moved(x, eps, c, c_next)
        x = there
    a, s = at(steps)[1].over(x0)
    return (x - a * x0) / s
