"""Latents of images that keep a gradient to the weights: a rollout's chain of steps, differentiated where a method says.

The gradient has two ways through a step: through what the network makes of x_t, and through x_t itself, which x_next holds a
multiple of. The methods of direct reward fine-tuning differ in which steps and which ways are open.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.models import Cond, Model
from diffalign.path import Coeffs, add_noise, split, step_mean
from diffalign.rollout import check_rule, conditions, epoch_seed
from diffalign.rules import ODE, RULES, Rule
from diffalign.sampling import Item, generators
from diffalign.spec import Choice, Spec

Bare = Callable[[], AbstractContextManager[None]]


class ChainSettings(Spec):
    """The ``direct.sampling`` section: how images are made. What is trained is what is sampled, guidance included."""

    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """1 samples the conditional model itself; above 1, classifier-free guidance, of which both halves are trained."""
    rule: Annotated[Rule, RULES] = ODE()
    """The step: ode and cps for all models, ddim for noise prediction, flow_sde and dance_sde for flows."""


@dataclass
class Chain:
    """B images on their way from noise, a step at a time; a ``Through`` drives it. Steps count from the noisiest, 0."""

    model: Model
    settings: ChainSettings
    cond: Cond
    negative: Cond | None
    draws: list[torch.Generator]
    """One per image, from which its start and all its later noise come."""
    timesteps: Tensor
    grid: Coeffs
    """(T + 1,)"""
    bare: Bare = nullcontext
    """Runs with the network as it is, outside what distributes it: for passes without a gradient."""
    passes: int = 0
    """Denoiser passes of one image so far, a backward counted as two forwards."""

    @classmethod
    def begin(
        cls, model: Model, items: Sequence[Item], settings: ChainSettings, seed: int, step: int, bare: Bare = nullcontext
    ) -> Self:
        """Noise belongs to (seed, step, prompt, k), whatever batch or process an item falls into.

        Raises:
            ConfigError: the rule or the guidance does not fit the model.
        """
        check_rule(model, settings.rule, settings.guidance_scale, [item.prompt for item in items])
        draws = generators(items, epoch_seed(seed, step))
        return cls(
            model, settings, *conditions(model, items, settings), draws, *model.grid(settings.num_inference_steps), bare
        )

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def noise(self) -> Tensor:
        """(B, C, H, W), fresh from each image's own generator."""
        return torch.stack([torch.randn(self.model.latent_shape, generator=g) for g in self.draws]).to(self.timesteps.device)

    def denoised(self, x: Tensor, n: int, trained: bool = True, detached: bool = False) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network sees in ``x`` at step ``n``.

        Not ``trained``, its output is a constant; ``detached``, its input is. What of ``x`` stands in x0 and eps beside the
        output keeps its gradient in any case.
        """
        s, rows = self.settings, len(x)
        t, c = self.timesteps[n].expand(rows), self.grid[[n] * rows]
        guided = s.guidance_scale > 1 and self.model.takes_negative
        self.passes += rows * (2 if guided else 1) * (3 if trained else 1)
        if trained:
            out = self.model.predict(x.detach() if detached else x, t, self.cond, s.guidance_scale, self.negative)
        else:
            with torch.no_grad(), self.bare():
                out = self.model.predict(x, t, self.cond, s.guidance_scale, self.negative)
            torch.clear_autocast_cache()  # older torch would give its constant copies of the weights to the next pass
        return split(self.model.kind, out, x, c)

    def step(self, x: Tensor, n: int, trained: bool = False, detached: bool = False) -> Tensor:
        """x after step ``n``, by the rule."""
        x0, eps = self.denoised(x, n, trained, detached)
        c, c_next = self.grid[[n] * len(x)], self.grid[[n + 1] * len(x)]
        k, d = self.settings.rule(c, c_next)
        moved = step_mean(x0, eps, c_next, k)
        return moved + d.to(x0).view(-1, 1, 1, 1) * self.noise() if d.any() else moved

    def run(self, trained: Sequence[bool] = (), detached: bool = False, end: int | None = None) -> Tensor:
        """From noise through steps 0 to ``end`` (all, if not given), of which those ``trained`` have a network gradient."""
        x = self.noise()
        for n in range(self.steps if end is None else end):
            x = self.step(x, n, n < len(trained) and trained[n], detached)
        return x


class Through(Spec):
    """Where the gradient enters: the ``direct.through`` section."""

    def check(self, steps: int) -> None:
        """Raises ValueError where it does not fit the number of steps."""

    @abstractmethod
    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        """Latents (M B, C, H, W) to be decoded and scored, M images for each of the chain's B; ``g`` is the batch's own."""


class Last(Through):
    """DRaFT-K (Clark et al. 2023): through the last K steps; with all steps, full back-propagation (DRaFT)."""

    type: Literal["last"] = "last"
    steps: int = Field(default=1, ge=1)
    """K."""

    def check(self, steps: int) -> None:
        if self.steps > steps:
            raise ValueError(f"through.steps {self.steps} is more than sampling.num_inference_steps {steps}")

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        return chain.run([n >= chain.steps - self.steps for n in range(chain.steps)])


class Between(Through):
    """One draw, or several, of a step between two."""

    low: int = Field(default=0, ge=0)
    high: int = Field(default=0, ge=0)
    """Included; steps count from the noisiest, 0."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"through.high {self.high} is below through.low {self.low}")
        return self

    def check(self, steps: int) -> None:
        if self.high >= steps:
            raise ValueError(
                f"through.high {self.high} must be below sampling.num_inference_steps {steps}: steps count from 0"
            )

    def draw(self, g: torch.Generator) -> int:
        return int(torch.randint(self.low, self.high + 1, (), generator=g))


class Random(Between):
    """AlignProp (Prabhudesai et al. 2023): a step is trained if its index has reached a threshold that is drawn for it anew.

    The network's output is a constant at the other steps, but the latents that pass by it keep their gradient, so that
    trained steps may lie before constant ones. The last step is always trained.
    """

    type: Literal["random"] = "random"

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        return chain.run([n >= self.draw(g) for n in range(chain.steps)])


class Strided(Through):
    """DRTune's and LongAlign's: every n-th step from a random one, the network's input always constant."""

    type: Literal["strided"] = "strided"
    every: int = Field(default=10, ge=1)

    def check(self, steps: int) -> None:
        if self.every > steps:
            raise ValueError(f"through.every {self.every} is more than sampling.num_inference_steps {steps}")

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        first = int(torch.randint(self.every, (), generator=g))
        return chain.run([n % self.every == first for n in range(chain.steps)], detached=True)


class Renoised(Through):
    """DRaFT-LV (Clark et al. 2023): the last step, and again from the image noised anew to that step's level.

    All 1 + ``draws`` images of a prompt are scored; their mean has less variance than one alone.
    """

    type: Literal["renoised"] = "renoised"
    draws: int = Field(default=2, ge=1)

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        last = chain.steps - 1
        images = [chain.step(chain.run(end=last), last, trained=True)]
        start = images[0].detach()
        for _ in range(self.draws):
            x = add_noise(start, chain.noise(), chain.grid[[last] * len(start)])
            images.append(chain.denoised(x, last)[0])
        return torch.cat(images)


class Preview(Between):
    """ReFL (Xu et al. 2023): to a random step without a gradient; there the network's x0 stands for the image."""

    type: Literal["preview"] = "preview"

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        n = self.draw(g)
        return chain.denoised(chain.run(end=n), n)[0]


class Single(Between):
    r"""SRPO's Direct-Align (Shen et al. 2025): one step of a finished image, at any time, and back by the noise that is known.

    :math:`x_t = \alpha x_0 + \sigma \epsilon`, a step to :math:`x_s` with a gradient, and
    :math:`(x_s - \sigma_s \epsilon) / \alpha_s`, which is :math:`x_0` where the network is right.
    """

    type: Literal["single"] = "single"

    def __call__(self, chain: Chain, g: torch.Generator) -> Tensor:
        n = self.draw(g)
        start = chain.run()
        eps, rows = chain.noise(), len(start)
        x0, eps_hat = chain.denoised(add_noise(start, eps, chain.grid[[n] * rows]), n)
        c_next = chain.grid[[n + 1] * rows]
        a, s = c_next.over(start)
        return (step_mean(x0, eps_hat, c_next, c_next.sigma) - s * eps) / a


THROUGH = Choice(
    Through,
    {"last": Last, "random": Random, "strided": Strided, "renoised": Renoised, "preview": Preview, "single": Single},
)
