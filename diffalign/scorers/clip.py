"""CLIPScore in its variants, PickScore, and the decomposed score: cosines of one picture and one text embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.scorers.base import Card, Reward, Weight
from diffalign.scorers.encoders import TextEncoder, TransformersCLIP, clip_of, shared

OPENAI_L14 = Weight("openai/clip-vit-large-patch14")


class Similarity(Reward):
    """A function of the cosine between a picture and its prompt."""

    encoder: TextEncoder

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder = clip_of(folder, device)

    def value(self, cosine: Tensor) -> Tensor:
        """(B,) of (B,) cosines."""
        return cosine

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.value(self.encoder.cosine(features, prompts))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return self.encoder.truncated(prompts)


class CLIPScore(Similarity):
    """cos(image, prompt), between -1 and 1: what most papers of alignment mean by it."""

    card: ClassVar[Card] = Card(
        name="clip",
        summary="cos(image, prompt) under any CLIP or SigLIP",
        unit="cosine; 0.15 to 0.32 under OpenAI's L/14",
        citation="Radford et al. 2021, arXiv 2103.00020",
        licence="of the model; OpenAI's CLIP: MIT",
        weights=(OPENAI_L14,),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
        across_prompts=True,
    )


class CLIPScore100(Similarity):
    """max(100 cos, 0), without prefix: torchmetrics' scale."""

    card: ClassVar[Card] = Card(
        name="clip100",
        summary="max(100 cos(image, prompt), 0), the scale of torchmetrics",
        unit="100 x cosine; 15 to 32 under OpenAI's L/14",
        citation="Hessel et al. 2021, arXiv 2104.08718, as torchmetrics scales it",
        licence="of the model; OpenAI's CLIP: MIT",
        weights=(OPENAI_L14,),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
        across_prompts=True,
    )

    def value(self, cosine: Tensor) -> Tensor:
        return (100 * cosine).clamp(min=0)


class CLIPScoreHessel(Similarity):
    """2.5 max(cos, 0) of the prompt behind "A photo depicts ": the original CLIPScore."""

    card: ClassVar[Card] = Card(
        name="clipscore",
        summary='2.5 max(cos(image, "A photo depicts " + prompt), 0), the original CLIPScore',
        unit="2.5 x cosine; 0 to 2.5",
        citation="Hessel et al. 2021, arXiv 2104.08718",
        licence="of the model; OpenAI's CLIP: MIT",
        weights=(Weight("openai/clip-vit-base-patch32"),),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
        across_prompts=True,
    )

    def value(self, cosine: Tensor) -> Tensor:
        return 2.5 * cosine.clamp(min=0)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().head(features, [f"A photo depicts {p}" for p in prompts])

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return super().truncated([f"A photo depicts {p}" for p in prompts])


_transformers_crop = partial(TransformersCLIP, centre="floor")


class PickScore(Similarity):
    """exp(logit_scale) cos of a ViT-H/14 tuned on Pick-a-Pic; a softmax over candidates gives the preference."""

    card: ClassVar[Card] = Card(
        name="pickscore",
        summary="exp(logit_scale) cos(image, prompt) of a ViT-H/14 tuned on Pick-a-Pic v1",
        unit="100 x cosine; 17 to 24",
        citation="Kirstain et al. 2023, arXiv 2305.01569",
        licence="MIT (code; the weights state none)",
        weights=(Weight("yuvalkirstain/PickScore_v1"),),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
    )

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder = shared(_transformers_crop, folder, device)  # published with the processor of transformers

    def value(self, cosine: Tensor) -> Tensor:
        return self.encoder.scale * cosine


SENTENCE = re.compile(r"(?<=[.!?;])\s+")


class Decomposed(Similarity):
    """t' . image with t' = t - (1 - omega) (t . v) v, where v is the direction that all prompts of the batch share.

    What prompts share says nothing of one of them, so its part is weighed down (omega 0.3). Long prompts are embedded
    sentence by sentence, and the mean is taken. v is the batch's normalised mean text embedding: values of one batch
    belong together.
    """

    omega = 0.3
    card: ClassVar[Card] = Card(
        name="decomposed",
        summary="cos with the part that all prompts of the batch share weighed by 0.3, sentence by sentence",
        unit="cosine, smaller than CLIPScore's; depends on the batch",
        citation="Liu et al. 2024 (LongAlign), arXiv 2410.11817",
        licence="of the model; OpenAI's CLIP: MIT",
        weights=(OPENAI_L14,),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
    )

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = [SENTENCE.split(p.strip()) for p in prompts]
        means = [self.encoder.texts(sentences).mean(0) for sentences in parts]
        text = normalize(torch.stack(means), dim=-1)
        common = normalize(text.mean(0), dim=-1)
        text = text - (1 - self.omega) * (text @ common)[:, None] * common
        return (normalize(features, dim=-1) * text).sum(-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [any(self.encoder.truncated(SENTENCE.split(p.strip()))) for p in prompts]
