"""Rollouts for online alignment: trajectories of images, and the same transitions again with a gradient.

Inside a window of steps a trajectory is a chain of Gaussians, x_next ~ N(mean, std^2), by a rule of :mod:`diffalign.rules`;
outside it follows the ODE. What is kept of a trained step is all that a ratio of policies needs, in fp32 and as it was used:
a state that is rounded after it was scored has another likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.models import Cond, Model
from diffalign.path import Coeffs, split, step_mean
from diffalign.rules import CPS, ODE, RULES, Rule, noisy, trainable
from diffalign.sampling import Item, Sampler, encode_once, generators
from diffalign.seeds import seed_of
from diffalign.solvers import dpm_2m
from diffalign.windows import WINDOWS, All, Window

FEW = 15
"""With fewer steps than this, the last one of a solver of second order is of the first order, as in its authors' code."""


class RolloutSettings(Sampler):
    """How trajectories are made."""

    num_inference_steps: int = Field(default=10, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """1 samples and trains the conditional model itself; above 1, classifier-free guidance in both."""
    rule: Annotated[Rule, RULES] = CPS(noise_level=0.8)
    """Of the steps in the window: ddim for noise prediction, flow_sde and dance_sde for flows, cps and ode for both."""
    window: Annotated[Window, WINDOWS] = All()
    """Which steps are stochastic and trained."""
    solver: Literal["euler", "dpm++"] = "euler"
    """Of the steps outside the window: one-step (DDIM without noise, Euler on flows), or DPM-Solver++(2M)."""
    compress: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the steps after the window that are made, with solver dpm++ (MixGRPO-Flash: 0.4)."""
    same_noise: bool = False
    """Start all images of a prompt from one latent (DanceGRPO)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.window.check(self.num_inference_steps)
        if self.same_noise and not noisy(self.rule):
            raise ValueError(
                f"same_noise starts all images of a prompt alike, and rule {self.rule.model_dump(mode='json')} adds no noise: "
                "they would be one image; drop same_noise"
            )
        if self.compress < 1 and self.solver == "euler":
            raise ValueError(
                "compress below 1 needs solver dpm++: a first-order solver is too coarse for the steps that are left"
            )
        if self.compress < 1 and isinstance(self.window, All):
            raise ValueError("compress below 1 is of the steps after the window, and window all leaves none: choose another")
        if self.compress < 1 and self.window.varies:
            raise ValueError("compress below 1 needs one window for all prompts of an epoch (window.per: epoch)")
        return self


class Guided(Protocol):
    """What the prompts are encoded for."""

    @property
    def guidance_scale(self) -> float: ...


@dataclass(frozen=True)
class Trajectories:
    """B images with S trained steps each. States are fp32 and as the model's latents; S may be 0."""

    x0: Tensor
    """(B, C, H, W), the latents of the images."""
    states: Tensor
    """(B, S + 1, C, H, W), before the first of the trained steps and after each: one begins where the last one ended."""
    mean: Tensor
    """(B, S, C, H, W), of x_next as the model that made the rollout has it."""
    t: Tensor
    """(B, S), native timesteps as the model takes them."""
    c: Coeffs
    """(B, S), before a step."""
    c_next: Coeffs
    """(B, S), after it."""
    std: Tensor
    """(B, S)."""
    steps: Tensor
    """(B, S), index of the step, 0 the noisiest."""

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Any) -> Self:
        """Some images, by a slice, a list or a mask."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def x(self) -> Tensor:
        """(B, S, C, H, W), before a step."""
        return self.states[:, :-1]

    @property
    def x_next(self) -> Tensor:
        """(B, S, C, H, W), after it."""
        return self.states[:, 1:]

    def put(self, rows: list[int], slots: list[int], x: Tensor, x_next: Tensor, **step: Tensor | Coeffs) -> None:
        """Write one step of some rows into their slots; what is given has no axis of steps."""
        self.states[rows, slots], self.states[rows, [slot + 1 for slot in slots]] = x[rows], x_next[rows]
        for name, value in step.items():
            for whole, part in zip(_tensors(getattr(self, name)), _tensors(value), strict=True):
                whole[rows, slots] = part[rows]

    def state(self) -> dict[str, Any]:
        """As tensors by name, for a checkpoint."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: [p.alpha, p.sigma] if isinstance(p, Coeffs) else p for n, p in parts.items()}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """What :meth:`state` gave."""
        parts: dict[str, Any] = {n: Coeffs(*p) if isinstance(p, list) else p for n, p in state.items()}
        return cls(**parts)

    def to(self, device: torch.device) -> Self:
        def move(part: Any) -> Any:
            return Coeffs(part.alpha.to(device), part.sigma.to(device)) if isinstance(part, Coeffs) else part.to(device)

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Arrival:
    """n rows of a batch that take a step with noise, x_next ~ N(mean, std^2)."""

    rows: list[int]
    slots: list[int]
    """Where the step stands among the trained ones of each."""
    mean: Tensor
    """(n, C, H, W)"""
    std: Tensor
    """(n,)"""
    draws: list[torch.Generator]
    then: int
    """Index of the grid that is arrived at."""


Advance = Callable[[Arrival], Tensor]
"""Draws x_next (n, C, H, W)."""


def _drawn(at: Arrival) -> Tensor:
    z = torch.stack([torch.randn(at.mean.shape[1:], generator=g) for g in at.draws]).to(at.mean)
    return at.mean + _wide(at.std, z) * z


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's images; :func:`diffalign.sampling.sample` with it starts from the same noise."""
    return seed_of(seed, "epoch", epoch)


def check(model: Model, settings: RolloutSettings, prompts: Sequence[Prompt] = ()) -> int:
    """How many steps of a trajectory can be trained, which every window lies in.

    Raises:
        ConfigError: the rule is not defined on the model's path, the window reaches steps that have no density, or prompts
            have negatives that the model's distilled guidance cannot take.
    """
    rule = settings.rule
    check_rule(model, rule, settings.guidance_scale, prompts)
    steps = trainable(rule, model.grid(settings.num_inference_steps)[1])
    try:
        settings.window.check(steps)
    except ValueError as e:
        raise ConfigError(f"window: {e}", hint=f"rule {getattr(rule, 'type', rule)} has no density on the others") from e
    return steps


def check_rule(model: Model, rule: Rule, guidance_scale: float, prompts: Sequence[Prompt] = ()) -> None:
    """Refuse a rule that is not defined on the model's path, and negatives that its distilled guidance cannot take.

    Raises:
        ConfigError: says which.
    """
    path = "flow" if model.kind == "flow" else "noise"
    if path not in rule.on:
        name = getattr(rule, "type", type(rule).__name__)
        fit = [name for name, other in RULES.options.items() if path in getattr(other, "on", ())]
        raise ConfigError(f"rule {name} is not defined for {model.kind} models", hint=f"use {', '.join(fit)}")
    if guidance_scale > 1 and not model.takes_negative and any(p.negative for p in prompts):
        raise ConfigError(
            f"{model.path} cannot be guided by two passes: its guidance is distilled into a number that it is told",
            hint="drop the negative prompts; guidance_scale is that number",
        )


def evaluations(model: Model, items: Sequence[Item], settings: RolloutSettings, seed: int, epoch: int) -> int:
    """How often :func:`rollout` evaluates the network for each image, guidance counted once."""
    steps = trainable(settings.rule, model.grid(settings.num_inference_steps)[1])
    return len(_course(items, settings, seed, epoch, steps)[1]) - 1


def conditions(model: Model, items: Sequence[Item], settings: Guided) -> tuple[Cond, Cond | None]:
    """The encoded prompts of some items and what guidance starts from, for :func:`rollout` and :func:`replay` alike: in full
    precision, as they are sampled, whatever the training around it has.
    """
    negatives = [item.prompt.negative or None for item in items]
    with torch.autocast(next(model.net.parameters()).device.type, enabled=False):
        cond = encode_once(model, [item.prompt.text for item in items])
        if settings.guidance_scale == 1 or not (model.takes_negative or any(negatives)):
            return cond, None
        return cond, encode_once(model, negatives)


@torch.no_grad()
def rollout(
    model: Model,
    items: Sequence[Item],
    settings: RolloutSettings,
    seed: int,
    epoch: int,
    cond: Cond | None = None,
    negative: Cond | None = None,
    advance: Advance | None = None,
    steps_kept: bool = True,
) -> Trajectories:
    """Trajectories of one batch of items; each draws from a generator of its own, by (seed, epoch, prompt, k).

    Without ``cond`` the prompts are encoded here; with it, ``negative`` is what :func:`conditions` gave beside it. ``advance``
    draws the states after trained steps; one draw each if not given. Where no step is replayed, none needs to be kept.

    Raises:
        ConfigError: see :func:`check`.
    """
    steps = check(model, settings, [item.prompt for item in items])
    if cond is None:
        cond, negative = conditions(model, items, settings)
    timesteps, grid = model.grid(settings.num_inference_steps)
    starts, nodes = _course(items, settings, seed, epoch, steps)
    size, rows = settings.window.length(steps), len(items)
    draws, x = _start(model, items, settings, epoch_seed(seed, epoch), timesteps.device)
    out = _blank(x, timesteps, size if steps_kept else 0)
    before = (x, grid[[0] * rows], torch.zeros(rows, dtype=torch.bool, device=x.device))
    for now, then in pairwise(nodes):
        t, c, c_next = timesteps[now].expand(rows), grid[[now] * rows], grid[[then] * rows]
        x0, eps = denoised(model, x, t, c, cond, settings, negative)
        if settings.solver == "dpm++":
            coarse_end = then == nodes[-1] and len(nodes) <= FEW
            x_next = dpm_2m(x, x0, c, c_next, None if coarse_end else before)
        else:
            x_next = step_mean(x0, eps, c_next, ODE()(c, c_next)[0])
        inside = [row for row, start in enumerate(starts) if start <= now < start + size]
        if inside:
            k, d = settings.rule(c, c_next)
            mean = step_mean(x0, eps, c_next, k)
            slots = [now - starts[row] for row in inside]
            x_next[inside] = (advance or _drawn)(
                Arrival(inside, slots, mean[inside], d[inside], [draws[r] for r in inside], then)
            )
            if steps_kept:
                steps_now = torch.full_like(out.steps[:, 0], now)
                out.put(inside, slots, x, x_next, mean=mean, t=t, c=c, c_next=c_next, std=d, steps=steps_now)
        outside = torch.ones_like(before[2])
        outside[inside] = False
        before, x = (x0, c, outside), x_next
    return replace(out, x0=x)


def replay(
    model: Model, some: Trajectories, slot: int, cond: Cond, settings: RolloutSettings, negative: Cond | None = None
) -> Tensor:
    """The mean of trained step ``slot`` by the current weights, (B, C, H, W), with a gradient.

    It is computed as :func:`rollout` does: with the same weights, rows, precision and kernels it is equal bit for bit.
    ``cond`` and ``negative`` have one row for each of ``some``.
    """
    c, c_next = some.c[:, slot], some.c_next[:, slot]
    x0, eps = denoised(model, some.x[:, slot], some.t[:, slot], c, cond, settings, negative)
    return step_mean(x0, eps, c_next, settings.rule(c, c_next)[0])


def denoised(
    model: Model, x: Tensor, t: Tensor, c: Coeffs, cond: Cond, settings: RolloutSettings, negative: Cond | None
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the model sees in x_t: the one evaluation that rollout and replay share."""
    return split(model.kind, model.predict(x, t, cond, settings.guidance_scale, negative), x, c)


def _start(
    model: Model, items: Sequence[Item], settings: RolloutSettings, seed: int, device: torch.device
) -> tuple[list[torch.Generator], Tensor]:
    """The items' generators and their initial latents. What is drawn later does not depend on ``same_noise``."""
    draws = generators(items, seed)
    x = [torch.randn(model.latent_shape, generator=g) for g in draws]
    if settings.same_noise:
        first = generators([Item(item.prompt, 0) for item in items], seed)
        x = [torch.randn(model.latent_shape, generator=g) for g in first]
    return draws, torch.stack(x).to(device)


def _course(
    items: Sequence[Item], settings: RolloutSettings, seed: int, epoch: int, steps: int
) -> tuple[list[int], list[int]]:
    """Where the window of each item starts, of ``steps`` that can be trained, and the indices of the grid that are visited."""
    starts = [settings.window.start(epoch, steps, seed, item.prompt.id) for item in items]
    return starts, _nodes(settings.num_inference_steps, max(starts) + settings.window.length(steps), settings.compress)


def _nodes(steps: int, end: int, compress: float) -> list[int]:
    """Indices of the grid that are visited: all up to the ``end`` of the window, then a share of the rest, evenly."""
    rest = steps - end
    made = max(1, round(compress * rest)) if rest else 0
    return [*range(end + 1), *(end + round(n * rest / made) for n in range(1, made + 1))]


def _blank(x: Tensor, timesteps: Tensor, size: int) -> Trajectories:
    """Room for ``size`` trained steps of each row of ``x``."""
    states, mean = (x.new_zeros(len(x), n, *x.shape[1:]) for n in (size + 1 if size else 0, size))
    alpha, sigma, alpha_next, sigma_next, std = (x.new_zeros(len(x), size) for _ in range(5))
    c, c_next, t = Coeffs(alpha, sigma), Coeffs(alpha_next, sigma_next), timesteps.new_zeros(len(x), size)
    return Trajectories(x, states, mean, t, c, c_next, std, t.new_zeros(t.shape, dtype=torch.long))


def _tensors(part: Tensor | Coeffs) -> list[Tensor]:
    return [part.alpha, part.sigma] if isinstance(part, Coeffs) else [part]


def _wide(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.view(-1, *(1,) * (like.dim() - 1))
