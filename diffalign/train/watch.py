"""Watching for a reward that is exploited: held-out scores and looks of fixed pictures, and limits on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.appearance import NAMES as LOOKS
from diffalign.appearance import appearance
from diffalign.data.files import atomic, write_json
from diffalign.data.images import to_pil
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.models import Model
from diffalign.path import add_noise
from diffalign.sampling import Sampler, generate, item_seed
from diffalign.scorers import Scorer
from diffalign.spec import Spec
from diffalign.train.evaluate import Evaluation, evaluate

Judge = Callable[[Tensor, Sequence[str]], Tensor]
"""A reward, (B,), of pixels (B, 3, H, W) in [0, 1] and their prompts."""
PREFIX = "watch/"
NORM = "prediction_norm"
DISTANCE = "reference_distance"
STATISTICS = ("diversity", *LOOKS, NORM, DISTANCE)
"""Values that need no scorer."""
PROBED = 8
"""Prompts at which the prediction is measured, at each of these fractions of the schedule."""
FRACTIONS = (0.125, 0.375, 0.625, 0.875)
SHOWN, SIDE = 8, 128
"""Prompts in the strip of pictures, and the most pixels of a side of each."""


class Limit(Spec):
    """How far a watched value may go, by one of three bounds."""

    below: float | None = None
    """Crossed by values below this."""
    above: float | None = None
    """Crossed by values above this."""
    drop: float | None = Field(default=None, gt=0)
    """Crossed by values that have fallen from the start by more than this share of it."""
    action: Literal["warn", "stop"] = "warn"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(x is not None for x in (self.below, self.above, self.drop)) != 1:
            raise ValueError("a limit is one of below, above and drop")
        return self

    def bound(self) -> dict[str, float]:
        """The one that is set."""
        return self.model_dump(exclude_none=True, exclude={"action"})

    def crossed(self, value: float, start: float) -> str | None:
        """What is wrong with a value; None where nothing is. What is NaN has crossed no limit."""
        if self.below is not None and value < self.below:
            return f"is {value:.4g}, below {self.below:g}"
        if self.above is not None and value > self.above:
            return f"is {value:.4g}, above {self.above:g}"
        if self.drop is not None and start - value > self.drop * abs(start):
            return f"fell from {start:.4g} to {value:.4g}, by more than {100 * self.drop:g} % of what it was"
        return None


class Limits:
    """Which limits were crossed when. Each speaks once."""

    def __init__(self, limits: Mapping[str, Limit] | None = None) -> None:
        self.limits = dict(limits or {})
        self.start: dict[str, float] = {}
        """What the first look saw, of each value the first that had it."""
        self.events: list[dict[str, Any]] = []

    def check(self, step: int, values: Mapping[str, float]) -> list[dict[str, Any]]:
        """New events of a look at ``values``, by their full names; the first look is the start."""
        already = "" if self.start else ", before the first step"
        self.start = {**values, **self.start}
        fired = {e["limit"] for e in self.events}
        new = []
        for name, limit in self.limits.items():
            full = PREFIX + name
            if name in fired or full not in values:
                continue
            if why := limit.crossed(values[full], self.start[full]):
                bounds = limit.bound()
                said = f"{full} {why}{already}"
                new.append({"step": step, "event": limit.action, "limit": name, "message": said, **bounds})
        self.events += new
        return new

    @property
    def stopped(self) -> str | None:
        """Why training ends."""
        return next((f"step {e['step']}: {e['message']}" for e in self.events if e["event"] == "stop"), None)

    def state(self) -> dict[str, Any]:
        return {"start": self.start, "events": self.events}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to what :meth:`state` gave. Events of limits that have changed since, or are gone, are forgotten."""
        self.start = dict(state.get("start", {}))
        now = [{"limit": name, "event": limit.action, **limit.bound()} for name, limit in self.limits.items()]
        self.events = [e for e in state.get("events", []) if any(rule.items() <= e.items() for rule in now)]


class Watcher:
    """Looks at a model through the same prompts and seeds every time, with the sampler that people will use."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        scorers: Sequence[Scorer],
        sampling: Sampler,
        folder: Path,
        *,
        per_prompt: int = 2,
        seed: int = 0,
        reward: Judge | None = None,
        check: Callable[[Mapping[str, float]], object] = lambda values: None,
    ) -> None:
        """``reward`` is that of training, (B,) of pixels (B, 3, H, W) in [0, 1] and prompts.

        ``check`` is told the values of each look before anything is written.
        """
        self.model, self.prompts, self.scorers, self.sampling = model, list(prompts), list(scorers), sampling
        self.folder, self.per_prompt, self.seed, self.reward, self.check = folder, per_prompt, seed, reward, check
        self._fixed: tuple[list[Tensor], Tensor] | None = None
        """x_t, and what the model before training predicts there, (F, B, C, H, W) on the CPU."""

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Measure the weights that are in place, and keep a strip of the pictures as ``samples/watch-STEP.png``.

        Raises:
            DataError: a scorer failed on a picture.
        """
        seen = evaluate(self.model, self.prompts, self.scorers, self.sampling, per_prompt=self.per_prompt, seed=self.seed)
        scores, looks = self._scores(seen), self._looks(seen.images) | self._probe()
        if both := scores.keys() & looks.keys():
            raise ConfigError(f"watch.scorers: {min(both)} is watched anyway", hint="give your scorer another name")
        values = scores | looks
        found = {PREFIX + name: value for name, value in values.items() if math.isfinite(value)}
        self.check(found)
        self._keep(step, seen.images)
        return found

    def _scores(self, seen: Evaluation) -> dict[str, float]:
        """Mean and deviation of every held-out value, and of the training reward, over the pictures that have it."""
        values = dict(seen.values)
        if self.reward is not None:
            pixels, said = seen.images.flatten(0, 1), [p for p in seen.prompts for _ in range(self.per_prompt)]
            size, device = self.sampling.batch_size, next(self.model.net.parameters()).device
            batches = [(pixels[i : i + size].to(device), said[i : i + size]) for i in range(0, len(said), size)]
            parts = [self.reward(some.float() / 255, prompts).cpu() for some, prompts in batches]
            if "reward" in values:
                raise ConfigError(
                    "watch.scorers: reward is what training is rewarded by", hint="give your scorer another name"
                )
            values["reward"] = torch.cat(parts)
        out: dict[str, float] = {}
        for name, value in values.items():
            if len(known := value[value.isfinite()]):
                out |= {name: known.mean().item(), f"{name}_std": known.std(correction=0).item()}
        return out

    def _looks(self, images: Tensor) -> dict[str, float]:
        from diffalign import stats

        pixels = images.double() / 255
        out = {name: value.mean().item() for name, value in appearance(pixels.flatten(0, 1)).items()}
        if images.shape[1] > 1:
            out["diversity"] = stats.diversity(pixels)
        return out

    def _probe(self) -> dict[str, float]:
        """How far the prediction f has gone from f_ref, that of the model before training, at the same x_t.

        The mean ratio of their norms, 1 of the model itself, and the mean over dimensions of (f - f_ref)^2, 0 of it: a step of
        noise s whose mean moves by k times the prediction has the KL k^2 / (2 s^2) times that to the reference, per dimension.
        """
        if self._fixed is None:
            with self.model.weights("reference"):
                noisy = self._noisy()
                self._fixed = noisy, self._predictions(noisy)
        noisy, base = self._fixed
        here = self._predictions(noisy).double()
        ratio = here.flatten(2).norm(dim=2) / base.double().flatten(2).norm(dim=2)
        return {NORM: ratio.mean().item(), DISTANCE: (here - base.double()).square().mean().item()}

    def _noisy(self) -> list[Tensor]:
        """x_t at each of ``FRACTIONS``: the base's own pictures with noise that belongs to prompt and fraction."""
        model, some = self.model, self.prompts[:PROBED]
        pixels = generate(model, some, self.sampling, seed=self.seed)[:, 0]
        x0 = torch.cat([model.encode_images(part.float() / 255) for part in torch.split(pixels, self.sampling.batch_size)])
        out = []
        for n, u in enumerate(FRACTIONS):
            draws = [torch.Generator().manual_seed(item_seed(self.seed, f"{p.id}|{NORM}", n)) for p in some]
            eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in draws]).to(x0)
            out.append(add_noise(x0, eps, model.coeffs(model.timestep(torch.full((len(some),), u)))))
        return out

    def _predictions(self, noisy: Sequence[Tensor]) -> Tensor:
        """(F, B, C, H, W) with the weights that are in place, text encoders included."""
        model = self.model
        model.net.eval()
        cond = model.encode_prompts([p.text for p in self.prompts[:PROBED]])
        rows = torch.split(torch.arange(len(noisy[0])), self.sampling.batch_size)

        def predicted(x: Tensor, u: float) -> Tensor:
            t = model.timestep(torch.full((len(x),), u))
            return torch.cat([model.predict(x[some], t[some], cond[some]).cpu() for some in rows])

        return torch.stack([predicted(x, u) for x, u in zip(noisy, FRACTIONS, strict=True)])

    def _keep(self, step: int, images: Tensor) -> None:
        """The first picture of the first prompts, side by side."""
        from PIL import Image

        pictures = to_pil(images[:SHOWN, 0])
        for picture in pictures:
            picture.thumbnail((SIDE, SIDE))
        width, height = pictures[0].size
        strip = Image.new("RGB", (width * len(pictures), height))
        for i, picture in enumerate(pictures):
            strip.paste(picture, (i * width, 0))
        atomic(strip_of(self.folder, step), partial(strip.save, format="PNG"))
        write_json(self.folder / "samples" / "watch.json", [p.text for p in self.prompts[:SHOWN]])


def strip_of(folder: Path, step: int) -> Path:
    """Where the strip of a step is kept."""
    return folder / "samples" / f"watch-{step:06d}.png"
