"""Windows: which steps of a trajectory are stochastic and trained; the others follow the ODE.

A window is a pure function of (epoch, seed, prompt), so there is no state to save and every process finds the same one. It is
never drawn per image: members of a group whose noise enters at different steps are not comparable.

``steps`` counts the steps that can be trained, from the first: those whose transition has a density
(:func:`diffalign.rules.trainable`). A window always has its full length and never moves beyond them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator

from diffalign.seeds import bits
from diffalign.spec import Choice, Spec

REMEDY = "shorten or move it, or raise num_inference_steps"


class Window(Spec):
    """Where the trained steps begin, and how many there are."""

    @property
    def varies(self) -> bool:
        """Whether prompts of one epoch have different windows."""
        return False

    @abstractmethod
    def length(self, steps: int) -> int:
        """How many steps are trained, the same in every epoch."""

    @abstractmethod
    def start(self, epoch: int, steps: int, seed: int = 0, prompt: str = "") -> int:
        """Index of the first trained step; ``prompt`` is the id of a prompt."""

    def reach(self, steps: int) -> range:
        """The shortest span of steps that holds all that are trained in some epoch."""
        return range(steps)

    def check(self, steps: int) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: the window needs more steps than there are.
        """


class All(Window):
    """Every step that has a density (Flow-GRPO, DanceGRPO, DDPO)."""

    type: Literal["all"] = "all"

    def length(self, steps: int) -> int:
        return steps

    def start(self, epoch: int, steps: int, seed: int = 0, prompt: str = "") -> int:
        return 0


class Sized(Window):
    """A window of ``size`` steps."""

    size: int = Field(default=2, ge=1)

    def length(self, steps: int) -> int:
        return self.size

    def check(self, steps: int) -> None:
        if self.size > steps:
            raise ValueError(f"a window of size {self.size} does not fit into {steps} steps that can be trained: {REMEDY}")


class Fixed(Sized):
    """The same steps in every epoch."""

    type: Literal["fixed"] = "fixed"
    begin: int = Field(default=0, ge=0)
    """Index of the first, from 0."""

    def reach(self, steps: int) -> range:
        return range(self.begin, self.begin + self.size)

    def start(self, epoch: int, steps: int, seed: int = 0, prompt: str = "") -> int:
        return self.begin

    def check(self, steps: int) -> None:
        if self.begin + self.size > steps:
            last = self.begin + self.size - 1
            raise ValueError(
                f"a window of steps {self.begin} to {last} does not fit into 0 to {steps - 1}, which can be trained: {REMEDY}"
            )


class Random(Sized):
    """A start drawn for each epoch or each prompt of an epoch, for all images of a prompt (Flow-GRPO-Fast)."""

    type: Literal["random"] = "random"
    low: int = Field(default=0, ge=0)
    high: int | None = Field(default=None, ge=1)
    """The window lies in the steps from ``low`` to ``high`` - 1; up to the last that can be trained if not given."""
    per: Literal["epoch", "group"] = "epoch"

    @property
    def varies(self) -> bool:
        return self.per == "group"

    def reach(self, steps: int) -> range:
        return range(self.low, steps if self.high is None else self.high)

    def start(self, epoch: int, steps: int, seed: int = 0, prompt: str = "") -> int:
        places = (steps if self.high is None else self.high) - self.size - self.low + 1
        return self.low + bits(seed, "window", epoch, prompt if self.varies else "") % places

    def check(self, steps: int) -> None:
        high = steps if self.high is None else self.high
        if self.low + self.size > high or high > steps:
            where = f"between {self.low} and {high}"
            raise ValueError(f"a window of size {self.size} {where} does not fit into {steps} steps: {REMEDY}")


class Moving(Sized):
    """From the noisiest steps on: a place is held for some epochs, then the window moves by ``stride`` (MixGRPO, Li et al.
    2025, l <- min(l + s, T - w)).
    """

    size: int = Field(default=4, ge=1)
    stride: int = Field(default=1, ge=1)
    roll_back: bool = False
    """Begin again at the first step once the end is passed; otherwise the window stays at the end."""

    @abstractmethod
    def held(self, place: int, last: int) -> int:
        """Epochs that are spent with the window at ``place``, of 0 to ``last``."""

    def start(self, epoch: int, steps: int, seed: int = 0, prompt: str = "") -> int:
        last = steps - self.size
        places = list(range(0, last + 1, self.stride))
        if self.roll_back:
            epoch %= sum(self.held(place, last) for place in places)
        elif places[-1] < last:
            places.append(last)
        for place in places:
            epoch -= self.held(place, last)
            if epoch < 0:
                return place
        return places[-1]


class Progressive(Moving):
    """The same number of epochs everywhere."""

    type: Literal["progressive"] = "progressive"
    iterations: int = Field(default=25, ge=1)
    """Epochs at one place."""

    def held(self, place: int, last: int) -> int:
        return self.iterations


class Decay(Moving):
    """Epochs at a place fall linearly, from ``iterations`` at the first to ``least`` at the last."""

    type: Literal["decay"] = "decay"
    iterations: int = Field(default=10, ge=1)
    least: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.iterations:
            raise ValueError(f"least ({self.least}) must not be above iterations ({self.iterations})")
        return self

    def held(self, place: int, last: int) -> int:
        done = place / last if last else 0.0
        return max(self.least, int(self.iterations * (1 - done) + self.least * done))


class ExpDecay(Moving):
    """Epochs at a place fall exponentially: iterations exp(-rate max(0, place - threshold)), rounded up."""

    type: Literal["exp_decay"] = "exp_decay"
    iterations: int = Field(default=25, ge=1)
    """Epochs at the first places."""
    threshold: int = Field(default=13, ge=0)
    rate: float = Field(default=0.1, ge=0)

    def held(self, place: int, last: int) -> int:
        return math.ceil(self.iterations * math.exp(-self.rate * max(0, place - self.threshold)))


WINDOWS = Choice(
    Window,
    {"all": All, "fixed": Fixed, "random": Random, "progressive": Progressive, "decay": Decay, "exp_decay": ExpDecay},
)
