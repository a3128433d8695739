"""The ``online`` section: learning from the model's own samples, scored as they come."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffalign.advantages import Advantages
from diffalign.oversample import Oversample
from diffalign.pairs import PAIR_RULES, BestWorst, PairRule
from diffalign.rollout import RolloutSettings
from diffalign.spec import Spec
from diffalign.train.rewards import RewardSpec

OLD = "old"
AVERAGE = "average"
STANDARDS = 4
"""Samples of the reference per prompt that a reward is compared with (PAR)."""


Credit = Literal["image", "steps", "trajectory", "state"]
"""``image``: finished images, noised again. ``steps``: all their trained steps, each for itself, go by the finished images
(D3PO); ``trajectory``: the same steps as one, whose errors are summed (PRDP). ``state``: ``group_size`` candidates of each
trained step from one state, compared by what the model makes of them; one at random goes on (SPO, TailorPO)."""


class Behaviour(Spec):
    """The sections ``online.old`` and ``online.average``: weights that follow the policy slowly, averaged once per rollout.

    w <- d w + (1 - d) policy with d = min(rate max(0, n - flat), most) before the n-th rollout (DiffusionNFT, AWM).
    """

    rate: float = Field(default=0.001, ge=0)
    most: float = Field(default=0.5, ge=0, lt=1)
    flat: int = Field(default=0, ge=0)

    def decay(self, epoch: int) -> float:
        return min(self.rate * max(0, epoch - self.flat), self.most)


class Online(Spec):
    """The ``online`` section: what is sampled, how it is scored, and what is made of the scores."""

    prompts: str = "shapes:train"
    """A prompt file, a hub dataset, or a split of the built-in world."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Prompts in the pool, which goes by in shuffled epochs: all there are if not given, 2000 of the built-in world."""
    prompts_per_rollout: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=1)
    updates: int = Field(default=1, ge=1)
    """Optimizer steps in which the images of a rollout are used once."""
    inner_epochs: int = Field(default=1, ge=1)
    """How often they are used."""
    repeats: int = Field(default=1, ge=1)
    """Noises and times that each image is seen at in one use, by losses of the forward process (NFT: 9)."""
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSpec = RewardSpec()
    advantages: Advantages = Advantages()
    rule: Annotated[PairRule, PAIR_RULES] = BestWorst()
    """Picks the pairs of each group, for losses on pairs."""
    oversample: Oversample | None = None
    """Preview more seeds of a prompt than ``group_size``, and sample those that previews set apart."""
    credit: Credit = "image"
    """What a pair is of, for losses on pairs."""
    old: Behaviour | None = None
    """Sample from an average of the past; the policy itself if not given."""
    average: Behaviour | None = None
    """A further average, which samples nothing, for losses that hold the policy near it (AWM's ``near``)."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        size, images = self.rollout.batch_size, self.prompts_per_rollout * self.group_size
        if size % self.group_size and self.group_size % size:
            raise ValueError(f"rollout.batch_size {size} must hold whole groups of {self.group_size}, or divide one")
        if images % size:
            raise ValueError(
                f"{images} images per rollout (prompts_per_rollout x group_size) are no multiple of rollout.batch_size "
                f"{size}: change one of them"
            )
        if self.oversample is not None:
            if self.oversample.candidates < self.group_size:
                raise ValueError(f"oversample.candidates {self.oversample.candidates} is below group_size {self.group_size}")
            if self.rollout.same_noise:
                raise ValueError("oversample chooses noises, and rollout.same_noise has one for a prompt: drop one of them")
            if size % self.group_size:
                raise ValueError(f"oversample needs whole groups: make rollout.batch_size a multiple of {self.group_size}")
        return self

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps from one rollout to the next."""
        return self.updates * self.inner_epochs

    @property
    def blocks(self) -> int:
        """Batches that make up a rollout, over all processes."""
        return self.prompts_per_rollout * self.group_size // self.rollout.batch_size
