"""What a scorer is given and returns. Any callable f(images, prompts) is one too."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError


@dataclass(frozen=True)
class ScoreInput:
    """B images and the prompts they were made for."""

    images: Sequence[Image.Image]
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ScoreBatch:
    """``values`` name to (B,) fp32, higher is better, NaN where ``errors`` of that item says why.

    Values named in ``partial`` are NaN too where a prompt does not ask for them: a relation, of a single object.
    """

    values: dict[str, Tensor]
    errors: list[str | None] = field(default_factory=list)
    partial: frozenset[str] = frozenset()


class Scorer(Protocol):
    """Scores images against prompts."""

    name: str

    def __call__(self, batch: ScoreInput) -> ScoreBatch: ...


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


def import_scorer(name: str) -> Scorer:
    """A callable named ``pkg.mod:obj``; a class is instantiated without arguments."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"cannot import the scorer {name!r}: {e}") from e
    return Callback(found() if isinstance(found, type) else found, attribute)
