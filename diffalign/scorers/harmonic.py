"""lambda-Harmonic: the weighted harmonic mean of likeness to a subject and to the prompt, under ALIGN (RPO)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.errors import ModelError
from diffalign.scorers.base import Card, Reward, ScoreBatch, ScoreInput, Weight, require, scored
from diffalign.scorers.encoders import Encoder, projected, shared
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import load_pretrained


class AlignEncoder(Encoder):
    """ALIGN with the image processor saved beside it, which has steps of its own (EfficientNet's)."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AlignModel, AutoImageProcessor, AutoTokenizer

        net = load_pretrained(AlignModel, folder)
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise ModelError(f"{folder}: no processor: {' '.join(str(e).split())[:200]}", hint="give ALIGN's folder") from e
        super().__init__(net, Preprocess(self.processor.size["height"], "squash"), device)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor([i.convert("RGB") for i in images], return_tensors="pt").pixel_values
        return projected(self.net.get_image_features(pixel_values=pixels.to(self.device)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], limit: int) -> Tensor:
        """(B, D) of prompts, cut at ``limit`` tokens."""
        words = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return projected(self.net.get_text_features(**words.to(self.device)))


class Harmonic(Reward):
    """1 / (lambda / s_I + (1 - lambda) / s_T) with s = (cos + 1) / 2: s_I to the references, s_T to the prompt."""

    weight = 0.3
    encoder: AlignEncoder
    card: ClassVar[Card] = Card(
        name="harmonic",
        summary="weighted harmonic mean of likeness to references (0.3) and prompt (0.7) under ALIGN",
        unit="0 to 1",
        citation="Miao et al. 2024 (RPO), arXiv 2407.12164",
        licence="none stated for the weights",
        weights=(Weight("kakaobrain/align-base"),),
        geometry="squash",
        size=289,
        max_tokens=64,
        needs=frozenset({"images", "prompts", "references"}),
        across_prompts=True,
    )

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder = shared(AlignEncoder, folder, device)

    @torch.no_grad()
    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        mine = normalize(self.encoder.images(batch.images), dim=-1)
        text = normalize(self.encoder.texts(batch.prompts, self.card.max_tokens or 0), dim=-1)
        values = []
        for x, t, group in zip(mine, text, batch.references or (), strict=True):
            theirs = normalize(self.encoder.look(list(group)), dim=-1) if len(group) else x.new_full((1, len(x)), torch.nan)
            likeness, meaning = ((theirs @ x).mean() + 1) / 2, (t @ x + 1) / 2
            values.append(1 / (self.weight / likeness + (1 - self.weight) / meaning))
        return scored(self.name, torch.stack(values) if values else mine.new_empty(0), self.truncated(batch.prompts))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [len(self.encoder.tokenizer(p, verbose=False).input_ids) > (self.card.max_tokens or 0) for p in prompts]
