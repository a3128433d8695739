"""Rewards of samples while training: any scorers, weighted; what fails is never a silent 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffalign.data.files import atomic
from diffalign.data.images import to_pil, to_uint8
from diffalign.errors import ConfigError, DiffalignError
from diffalign.scorers import Callback, Card, ScoreInput, Scorer
from diffalign.scorers.base import isolated
from diffalign.spec import Spec, read_with


class RewardSpec(Spec):
    """The ``online.reward`` section."""

    scorers: list[str] = Field(default=["shapes"], min_length=1)
    """As ``evaluate.scorers``: of the built-in world, of the list, served over HTTP, or a callable ``pkg.mod:obj``."""
    weights: dict[str, float] = Field(default={"score": 0.8, "cleanliness": 0.2}, min_length=1)
    """Which of the scorers' values count, and how much; null takes out one that the file below has."""
    confidence: str | None = None
    """A further value of the scorers, above 0, that advantages are multiplied by: how far each sample's reward is relied on,
    such as :func:`diffalign.advantages.certainty` of its features (PrefPaint)."""
    on_error: Literal["fail", "retry", "drop"] = "fail"
    """Of a value that is missing or not finite: stop with the sample saved; ask again, then stop; or leave out its group."""
    retries: int = Field(default=3, ge=1)
    wait_seconds: float = Field(default=1.0, ge=0)
    """Before the first retry; doubled before each further one."""

    @field_validator("weights", mode="before")
    @classmethod
    def _taken_out(cls, weights: Any) -> Any:
        return {k: w for k, w in weights.items() if w is not None} if isinstance(weights, dict) else weights

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.confidence in self.weights:
            raise ValueError(f"confidence: {self.confidence} is among the weights: a value is a reward or a confidence")
        read_with(self, "on_error", "retry", "retries", "wait_seconds")
        return self


class Rewards:
    """Pictures and prompts to (names, B) values in the order of ``weights``, then the confidence if there is one; NaN only
    where ``on_error`` is drop.

    Raises:
        ConfigError: a weight is of a value that none of the callables gives.
    """

    def __init__(self, spec: RewardSpec, scorers: Sequence[Scorer], folder: Path) -> None:
        self.spec, self.scorers, self.folder = spec, list(scorers), folder
        weights = dict(spec.weights) if spec.confidence is None else {**spec.weights, spec.confidence: 0.0}
        self.names = list(weights)
        self.weights = torch.tensor(list(weights.values()), dtype=torch.double)
        self.calls = 0
        """Pictures that were scored."""
        self.why = ""
        """What the last failure said."""
        if all(isinstance(scorer, Callback) for scorer in self.scorers):  # of others the configuration was read
            self._check_names([scorer.name for scorer in self.scorers])

    def __call__(self, pixels: Tensor, prompts: Sequence[str], times: Tensor | None = None) -> Tensor:
        """(names, B) fp32 of pictures (B, 3, H, W), uint8 or in [0, 1]; of previews with the times of their states.

        Raises:
            ConfigError: a weight is of a value that none of the scorers gives.
            DiffalignError: a value is missing or not finite; the picture is saved under ``failed/``.
        """
        pictures = to_pil((pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)).cpu())
        batch = ScoreInput(pictures, list(prompts), times=times)
        values, errors = self._ask(batch)
        for attempt in range(self.spec.retries if self.spec.on_error == "retry" else 0):
            bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
            if not bad:
                break
            time.sleep(self.spec.wait_seconds * 2**attempt)
            some = None if times is None else times[bad]
            again, why = self._ask(ScoreInput([pictures[i] for i in bad], [prompts[i] for i in bad], times=some))
            values[:, bad] = again
            errors |= {i: why[n] for n, i in enumerate(bad) if n in why}
        bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            self.why = errors.get(bad[0], "it is not finite")
        if bad and self.spec.on_error != "drop":
            file = self.folder / "failed" / "sample.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic(file, lambda to: pictures[bad[0]].save(to, format="PNG"))
            raise DiffalignError(
                f"reward: no value for {prompts[bad[0]]!r}: {self.why}; the sample is {file}",
                hint="mend the scorer, or set online.reward.on_error to retry or drop",
            )
        return values.where(values.isfinite(), torch.nan)

    def total(self, values: Tensor) -> Tensor:
        """The weighted sum of (names, ...) values."""
        return torch.einsum("n,n...->...", self.weights.to(values), values)

    def check_left(self, total: Tensor) -> None:
        """Refuse a rollout of which nothing is left to learn from: rewards (..., K), NaN where one failed.

        Raises:
            DiffalignError: every group of K lacks a reward.
        """
        if total.isnan().any(-1).all():
            raise DiffalignError(
                f"reward: every group of this rollout lacks a value; the last failure of this process: {self.why or 'none'}",
                hint="mend the scorer, and go on with resume_from=latest",
            )

    def judge(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) the weighted sum of pictures that are not trained on: they do not count as calls."""
        calls = self.calls
        total = self.total(self(pixels, prompts).double())
        self.calls = calls
        return total

    def _check_names(self, given: Sequence[str]) -> None:
        if unknown := [name for name in self.names if name not in given]:
            key = "confidence" if unknown[0] == self.spec.confidence else "weights"
            raise ConfigError(f"online.reward.{key}: no scorer gives {unknown[0]!r}", hint=f"given: {', '.join(given)}")

    def _ask(self, batch: ScoreInput) -> tuple[Tensor, dict[int, str]]:
        self.calls += len(batch)
        values: dict[str, Tensor] = {}
        errors: dict[int, str] = {}
        idle = ""
        for scorer in self.scorers:
            given = isolated(scorer, batch)
            values |= given.values
            errors |= {i: f"{scorer.name}: {e}" for i, e in enumerate(given.errors) if e}
            if not given.values.keys() & set(self.names):
                idle = ", ".join(given.values)
        if not errors:
            self._check_names(list(values))
            if idle:
                raise ConfigError(f"online.reward.weights: all that one scorer gives has none: {idle}", hint="drop the scorer")
        missing = torch.full((len(batch),), torch.nan)
        found = torch.stack([values.get(name, missing) for name in self.names])
        if self.spec.confidence is not None:
            for i in (found[-1] <= 0).nonzero().flatten().tolist():
                errors[i] = f"{self.spec.confidence} is {found[-1, i]:g}, and a confidence is above 0"
                found[-1, i] = torch.nan
        return found, errors


class Contrast(Spec):
    """The ``direct.reward.contrast`` section: (1 + k) r(x, "positive. prompt") - r(x, "negative. prompt") for each scorer.

    SRPO's relative reward (Shen et al. 2025): of what two prompts share, only k times remains.
    """

    positive: str = Field(min_length=1)
    """Control words before the prompt, as in "Realistic photo"."""
    negative: str = Field(min_length=1)
    k: float = Field(default=0.0, ge=0.0)


class GradientRewardSpec(Spec):
    """The ``direct.reward`` section."""

    scorers: list[str] = Field(default=["clip:shapes-clip"], min_length=1)
    """As ``evaluate.scorers``, of those that give gradients."""
    weights: dict[str, float] = {}
    """Factors of the scorers, by their names; 1 where none is given. Losses see each product for itself."""
    contrast: Contrast | None = None


def differentiable(card: Card | None) -> bool:
    """Whether a scorer with this card gives a gradient from pixels and prompts alone."""
    return card is not None and card.differentiable and not card.needs - {"images", "prompts"}


GRADIENTS = "use clip, pickscore, hpsv2, imagereward or aesthetic-v2; the section online learns from any scorer"


class GradientRewards:
    """Pixels and prompts to weighted rewards (B, R) with a gradient, one column for each of R scorers.

    Raises:
        ConfigError: a scorer gives no gradient or needs more than images and prompts, or the weights name others.
    """

    def __init__(self, spec: GradientRewardSpec, scorers: Sequence[Scorer]) -> None:
        self.spec = spec
        by_name: dict[str, Any] = {scorer.name: scorer for scorer in scorers}
        for name, scorer in by_name.items():
            if not differentiable(getattr(scorer, "card", None)):
                raise ConfigError(f"direct.reward.scorers: {name} gives no gradient from pixels and prompts", hint=GRADIENTS)
        if odd := sorted(spec.weights.keys() - by_name.keys()):
            raise ConfigError(f"direct.reward.weights: no scorer gives {odd[0]!r}", hint=f"given: {', '.join(by_name)}")
        self.scorers = by_name
        self.calls = 0
        """Pictures that were scored."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, R), and each scorer's values (B,) before its weight, of pixels (B, 3, H, W) in [0, 1].

        Raises:
            DiffalignError: a value is not finite.
        """
        self.calls += len(pixels)
        values = {name: self._one(scorer, pixels, prompts).to(pixels.device) for name, scorer in self.scorers.items()}
        for name, value in values.items():
            if not value.isfinite().all():
                said = prompts[int((~value.isfinite()).nonzero()[0])]
                raise DiffalignError(
                    f"reward: {name} of {said!r} is not finite", hint="resume from a checkpoint at a lower rate"
                )
        weighted = [self.spec.weights.get(name, 1.0) * value for name, value in values.items()]
        return torch.stack(weighted, 1), {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def judge(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) the weighted sum of pictures that are not trained on: they do not count as calls."""
        calls = self.calls
        weighted, _ = self(pixels, prompts)
        self.calls = calls
        return weighted.double().sum(1)

    def _one(self, scorer: Any, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        c = self.spec.contrast
        if c is None:
            return scorer.score_pixels(pixels, prompts)
        for_, against = (scorer.score_pixels(pixels, [f"{words}. {p}" for p in prompts]) for words in (c.positive, c.negative))
        return (1 + c.k) * for_ - against
