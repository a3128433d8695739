"""Subject fidelity: how much a picture looks like the pictures of the subject it was asked for (DreamBooth's protocol)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from diffalign.scorers.base import Card, Reward, ScoreBatch, ScoreInput, Weight, require, scored
from diffalign.scorers.encoders import Encoder, TransformersViT, clip_of, shared


class SubjectFidelity(Reward):
    """Mean cosine of a picture's features and those of each of its references."""

    @torch.no_grad()
    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        pictures = normalize(self.encoder.images(batch.images), dim=-1)
        unique = {id(r): r for group in batch.references or () for r in group}  # one subject, many pictures of it
        known = dict(zip(unique, normalize(self.encoder.look(list(unique.values())), dim=-1), strict=True)) if unique else {}
        values = [
            torch.stack([known[id(r)] for r in group]).mean(0) @ x if len(group) else x.new_tensor(torch.nan)
            for x, group in zip(pictures, batch.references or (), strict=True)
        ]
        return scored(self.name, torch.stack(values) if values else pictures.new_empty(0))


class ClipI(SubjectFidelity):
    """CLIP-I, under the projected embedding of CLIP."""

    card: ClassVar[Card] = Card(
        name="clip-i",
        summary="mean cosine to the reference pictures under CLIP B/32",
        unit="cosine; 0.6 to 0.9",
        citation="Ruiz et al. 2022 (DreamBooth), arXiv 2208.12242",
        licence="MIT",
        weights=(Weight("openai/clip-vit-base-patch32"),),
        geometry="crop",
        size=224,
        needs=frozenset({"images", "references"}),
        across_prompts=True,
    )

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder = clip_of(folder, device)


class Dino(SubjectFidelity):
    """DINO, under the class token of a self-supervised ViT, with the preprocessing saved beside it."""

    card: ClassVar[Card] = Card(
        name="dino",
        summary="mean cosine to the reference pictures under DINO ViT-S/16",
        unit="cosine; 0.6 to 0.9",
        citation="Ruiz et al. 2022 (DreamBooth), arXiv 2208.12242",
        licence="Apache-2.0",
        weights=(Weight("facebook/dino-vits16"),),
        geometry="squash",
        size=224,
        needs=frozenset({"images", "references"}),
        across_prompts=True,
    )

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder: Encoder = shared(TransformersViT, folder, device)
