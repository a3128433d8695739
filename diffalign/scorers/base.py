"""What a scorer is given, what it returns, and what its numbers mean. Any callable f(images, prompts) is one too."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from diffalign.scorers.encoders import Encoder


@dataclass(frozen=True)
class ScoreInput:
    """B images and the prompts they were made for; some scorers need references (B lists) or metadata (B mappings)."""

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    references: Sequence[Sequence[Image.Image]] | None = None
    metadata: Sequence[Mapping[str, Any]] | None = None
    features: Tensor | None = None
    """(B, D) of the encoder of the scorer that is asked, where they are known from before; the images are not looked at."""
    times: Tensor | None = None
    """(B,) of previews the time that the network was told, 0 to 999 as schedules count them; 0 if not given: pictures are
    finished."""

    def __len__(self) -> int:
        return len(self.images)

    def part(self, s: slice) -> ScoreInput:
        """Some of the images with all that belongs to them."""
        rest = (None if x is None else x[s] for x in (self.references, self.metadata, self.features, self.times))
        return ScoreInput(self.images[s], self.prompts[s], *rest)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScoreBatch:
    """``values`` name to (B,) fp32, higher is better, NaN where ``errors`` of that item says why.

    Values named in ``partial`` are NaN too where a prompt does not ask for them: a relation, of a single object.
    ``truncated`` says of each prompt whether its end was not read; empty where a scorer reads all or nothing of it.
    """

    values: dict[str, Tensor]
    errors: list[str | None] = field(default_factory=list)
    partial: frozenset[str] = frozenset()
    truncated: list[bool] = field(default_factory=list)


class Scorer(Protocol):
    """Scores images against prompts."""

    name: str

    def __call__(self, batch: ScoreInput) -> ScoreBatch: ...


def isolated(scorer: Scorer, batch: ScoreInput) -> ScoreBatch:
    """Score; where that fails, halve the batch until the failing pictures are alone with their reason.

    Half a batch is also what a device needs that ran out of memory.
    """
    try:
        found = scorer(batch)
        values = {k: v.detach().float().cpu() for k, v in found.values.items()}
        errors, truncated = found.errors or [None] * len(batch), found.truncated or [False] * len(batch)
        return ScoreBatch(values, errors, found.partial, truncated)
    except Exception as e:  # scorers raise what they like
        if len(batch) == 1:
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            return ScoreBatch({scorer.name: torch.tensor([torch.nan])}, [reason], truncated=[False])
    middle = len(batch) // 2
    a, b = (isolated(scorer, batch.part(s)) for s in (slice(middle), slice(middle, None)))
    values = {
        name: torch.cat([half.values.get(name, torch.full((len(half.errors),), torch.nan)) for half in (a, b)])
        for name in {**a.values, **b.values}
    }
    # a failing picture has a value under the scorer's own name alone: the others lack that one without being wrong
    partial = a.partial | b.partial | (a.values.keys() ^ b.values.keys())
    return ScoreBatch(values, a.errors + b.errors, partial, a.truncated + b.truncated)


@dataclass(frozen=True)
class Weight:
    """Where one file (or folder, if ``files`` is empty) of a scorer is published.

    ``files`` are names or patterns, the preferred one first; ``digest`` is that of the published first file, as
    ``md5:...`` or ``sha256:...``, where it is known.
    """

    source: str
    files: tuple[str, ...] = ()
    digest: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether ``source`` is a hub id, owner/name, and not a site to fetch the file from by hand."""
        return self.source.count("/") == 1


@dataclass(frozen=True)
class Card:
    """What must be known before two numbers of a scorer are put side by side."""

    name: str
    summary: str
    """The formula, in one line."""
    unit: str
    """Of the native number; and its usual range."""
    citation: str
    licence: str
    weights: tuple[Weight, ...] = ()
    geometry: Literal["crop", "pad", "squash", "area", "native"] = "native"
    """crop: shortest side, then the centre. pad: longest side, then black. squash: both sides. area: nearly as it is, of
    ``size`` squared pixels. native: as it is."""
    size: int | None = None
    max_tokens: int | None = None
    needs: frozenset[str] = frozenset({"images", "prompts"})
    direction: Literal[1, -1] = 1
    """-1: the native number is better when lower, so its negative is returned."""
    differentiable: bool = False
    across_prompts: bool = False
    """Whether values of different prompts may be compared; if not, report differences within a prompt."""
    version: str = "1"
    """Rises whenever the same file gives other numbers."""
    verified: bool = False
    """Whether the published weights gave the published numbers through this code."""
    gated: bool = False
    """Whether the licence must be accepted by name before use."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the published weights have, and that ``measure`` gives of the weights at hand."""
    plugin: str | None = None
    """What the argument ``pkg.mod:obj`` must be, of scorers that bring no network of their own."""


def scored(name: str, values: Tensor, truncated: Sequence[bool] = ()) -> ScoreBatch:
    """A batch of one value; what is not finite becomes NaN with an error."""
    v = values.detach().float().cpu().flatten()
    errors = [None if ok else f"{name} is {x}" for ok, x in zip(v.isfinite().tolist(), v.tolist(), strict=True)]
    return ScoreBatch({name: v.where(v.isfinite(), torch.nan)}, errors, truncated=list(truncated))


def require(card: Card, batch: ScoreInput) -> None:
    """Refuse a batch that lacks what a scorer needs, or whose parts differ in length.

    Raises:
        DataError: names the scorer and the part.
    """
    for part in sorted(card.needs):
        given = getattr(batch, part)
        if given is None:
            raise DataError(f"the scorer {card.name} needs {part}", hint=f"fill ScoreInput.{part}")
        if len(given) != len(batch):
            raise DataError(f"the scorer {card.name} was given {len(batch)} images, but {len(given)} {part}")


class Reward:
    """A scorer that is an image encoder and a head: exact on pictures, differentiable on pixels where the card says so."""

    card: ClassVar[Card]
    encoder: Encoder

    @property
    def name(self) -> str:
        return self.card.name

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) values of the encoder's features of B images and their B prompts."""
        raise NotImplementedError

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than what the scorer reads."""
        return []

    def measure(self) -> dict[str, float]:
        """What :attr:`Card.published` is compared with."""
        return {}

    @torch.no_grad()
    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        known = batch.features
        features = self.encoder.images(batch.images) if known is None else known.to(self.encoder.device)
        values = self.head(features, batch.prompts)
        return scored(self.name, values, self.truncated(batch.prompts))

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) values of pixels (B, 3, H, W) in [0, 1] with gradients, close to those of the same pictures."""
        if not self.card.differentiable:
            raise ConfigError(f"the scorer {self.name} gives no gradients")
        return self.head(self.encoder.pixels(pixels), prompts)


class Callback:
    """A plain ``f(images, prompts) -> B numbers`` as a scorer."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        values = torch.as_tensor(self.function(batch.images, batch.prompts), dtype=torch.float32).flatten()
        if len(values) != len(batch):
            raise ConfigError(f"the scorer {self.name!r} returned {len(values)} values for {len(batch)} images")
        return ScoreBatch({self.name: values})


def import_object(name: str) -> Any:
    """What ``pkg.mod:obj`` names; a class is instantiated without arguments."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"cannot import {name!r}: {e}") from e
    return found() if isinstance(found, type) else found


def import_scorer(name: str) -> Scorer:
    """A scorer or a callable named ``pkg.mod:obj``. What has a card takes a :class:`ScoreInput`."""
    found = import_object(name)
    if hasattr(found, "card"):
        scorer: Scorer = found
        return scorer
    return Callback(found, name.partition(":")[2])
