"""Compressibility: the size of a picture as a JPEG. The toy reward that shows a method optimises at all."""

from __future__ import annotations

import io
from typing import ClassVar

import torch

from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require, scored


class Compressibility:
    """-kB (1000 bytes) at quality 95. Hangs on the resolution and the build of Pillow."""

    sign: ClassVar[int] = -1
    card: ClassVar[Card] = Card(
        name="compressibility",
        summary="-size as a JPEG of quality 95",
        unit="kilobytes (1000 bytes)",
        citation="Black et al. 2023 (DDPO), arXiv 2305.13301",
        licence="none needed",
        needs=frozenset({"images"}),
        direction=-1,
        across_prompts=True,
    )

    @property
    def name(self) -> str:
        return self.card.name

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        sizes = []
        for image in batch.images:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=95)
            sizes.append(self.sign * buffer.tell() / 1000)
        return scored(self.name, torch.tensor(sizes))


class Incompressibility(Compressibility):
    """The same, the larger the better."""

    sign = 1
    card: ClassVar[Card] = Card(
        name="incompressibility",
        summary="size as a JPEG of quality 95",
        unit="kilobytes (1000 bytes)",
        citation="Black et al. 2023 (DDPO), arXiv 2305.13301",
        licence="none needed",
        needs=frozenset({"images"}),
        across_prompts=True,
    )
