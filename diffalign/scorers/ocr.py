"""Text rendering: what an OCR engine reads in the picture against what the prompt asks to be written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from PIL import Image

from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require, scored

QUOTED = re.compile(r'"([^"]+)"')


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def similarity(read: str, target: str) -> float:
    """1 - distance / length of the target, in [0, 1], without case and spaces; 1 where the target is part of what was read."""
    read, target = (re.sub(r"\s", "", s.lower()) for s in (read, target))
    distance = 0 if target in read else min(levenshtein(read, target), len(target))
    return 1 - distance / len(target)


class OCR:
    """Likeness of the text read to the first "quoted text" of the prompt. The engine is ``f(images) -> B strings``.

    A prompt without quoted text has no value, and says so, rather than 0.
    """

    card: ClassVar[Card] = Card(
        name="ocr",
        summary='1 - edit distance / length, of the text read and the first "quoted text" of the prompt',
        unit="share of characters; 0 to 1",
        citation="Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470",
        licence="of the engine",
        across_prompts=True,
        plugin="f(images) -> one string an image",
    )

    def __init__(self, engine: Callable[[Sequence[Image.Image]], Sequence[str]]) -> None:
        self.engine = engine

    @property
    def name(self) -> str:
        return self.card.name

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        targets = [m[1] if (m := QUOTED.search(p)) and m[1].strip() else None for p in batch.prompts]
        read = self.engine(batch.images)
        values = [torch.nan if t is None else similarity(r, t) for r, t in zip(read, targets, strict=True)]
        out = scored(self.name, torch.tensor(values))
        said = [
            "the prompt has no text in double quotes" if t is None else e for t, e in zip(targets, out.errors, strict=True)
        ]
        return ScoreBatch(out.values, said)
