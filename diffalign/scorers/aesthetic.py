"""Aesthetic predictors on frozen image embeddings. Their heads have no activations, so each is one dot product."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.errors import ModelError
from diffalign.scorers.base import Card, Reward, Weight
from diffalign.scorers.clip import OPENAI_L14
from diffalign.scorers.encoders import clip_of
from diffalign.scorers.weights import choose, read_weights


def folded(state: Mapping[str, Tensor], widths: Sequence[int], where: str) -> tuple[Tensor, Tensor]:
    """A chain of linear layers as one: weight (D,) and bias (), in fp64. ``widths`` are those of the layers, 1 last.

    Dropout between the layers, which some ports forget to switch off, is gone with them.

    Raises:
        ModelError: the layers are not those.
    """
    weights = {k: v.double() for k, v in state.items() if k.endswith("weight")}
    order = sorted(weights, key=lambda k: int(re.findall(r"\d+", k)[-1]) if re.search(r"\d", k) else 0)
    expected = [(b, a) for a, b in itertools.pairwise(widths)]
    shapes = [tuple(weights[k].shape) for k in order]
    biases = [k.removesuffix("weight") + "bias" for k in order]
    if shapes != expected or set(state) != {*order, *biases}:
        raise ModelError(f"{where}: not the layers of this scorer: {shapes or sorted(state)[:3]}, not {expected}")
    total, offset = torch.eye(widths[0], dtype=torch.double), torch.zeros(widths[0], dtype=torch.double)
    for key, bias in zip(order, biases, strict=True):
        total, offset = weights[key] @ total, weights[key] @ offset + state[bias].double()
    return total[0], offset[0]


class Aesthetic(Reward):
    """weight . unit(image embedding) + bias."""

    widths: ClassVar[tuple[int, ...]] = (768, 1)
    prefix: ClassVar[str] = ""

    def __init__(self, path: Path, encoder: Path, device: str = "cpu") -> None:
        found = choose(path, *self.card.weights[0].files)
        if "relu" in found.name.lower():
            raise ModelError(f"{found}: this head has activations", hint="give the linearMSE file")
        state = {k: v for k, v in read_weights(found).items() if re.match(self.prefix, k)}
        weight, bias = folded(state, self.widths, str(found))
        self.weight, self.bias = weight.float().to(device), bias.float().to(device)
        self.encoder = clip_of(encoder, device)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        if features.shape[-1] != len(self.weight):
            raise ModelError(
                f"{self.name}: the head reads {len(self.weight)} features, the encoder gives {features.shape[-1]}",
                hint=f"the encoder must be {self.card.weights[1].source}",
            )
        return normalize(features, dim=-1) @ self.weight + self.bias

    def measure(self) -> dict[str, float]:
        return {"bias": self.bias.item(), "weight norm": self.weight.norm().item()}


class AestheticV1(Aesthetic):
    """LAION's first predictor: one linear layer."""

    card: ClassVar[Card] = Card(
        name="aesthetic-v1",
        summary="linear in the unit embedding of OpenAI's CLIP L/14",
        unit="1 to 10; 4 to 6.5",
        citation="LAION-AI/aesthetic-predictor, 2022",
        licence="MIT",
        weights=(Weight("github.com/LAION-AI/aesthetic-predictor", ("sa_0_4_vit_l_14_linear.pth",)), OPENAI_L14),
        geometry="crop",
        size=224,
        needs=frozenset({"images"}),
        differentiable=True,
        across_prompts=True,
        published={"bias": 3.529, "weight norm": 28.44},
    )


class AestheticV2(Aesthetic):
    """LAION's improved predictor (sac+logos+ava1, linearMSE): five linear layers."""

    widths = (768, 1024, 128, 64, 16, 1)
    prefix = r"(mlp\.)?layers\."  # the safetensors copy holds the encoder as well
    card: ClassVar[Card] = Card(
        name="aesthetic-v2",
        summary="linear in the unit embedding of OpenAI's CLIP L/14 (five layers, folded)",
        unit="1 to 10; 5 to 6.5 for images of Stable Diffusion",
        citation="Schuhmann 2022, christophschuhmann/improved-aesthetic-predictor",
        licence="Apache-2.0",
        weights=(Weight("RE-N-Y/laion-aesthetic", ("*.safetensors", "sac+logos+ava1-l14-linearMSE.pth")), OPENAI_L14),
        geometry="crop",
        size=224,
        needs=frozenset({"images"}),
        differentiable=True,
        across_prompts=True,
        published={"bias": 5.2366, "weight norm": 17.996},
    )


class AestheticV25(Aesthetic):
    """Aesthetic predictor v2.5: five linear layers on SigLIP. The weights stand under the AGPL, so use is by consent."""

    widths = (1152, 1024, 128, 64, 16, 1)
    prefix = r"scoring_head\."
    card: ClassVar[Card] = Card(
        name="aesthetic-v2.5",
        summary="linear in the unit embedding of SigLIP so400m at 384 px (five layers, folded)",
        unit="1 to 10; above 5.5 is great",
        citation="discus0434/aesthetic-predictor-v2-5, 2024",
        licence="AGPL-3.0",
        weights=(
            Weight("github.com/discus0434/aesthetic-predictor-v2-5", ("aesthetic_predictor_v2_5.pth",)),
            Weight("google/siglip-so400m-patch14-384"),
        ),
        geometry="squash",
        size=384,
        needs=frozenset({"images"}),
        differentiable=True,
        across_prompts=True,
        gated=True,
        published={"bias": 1.939, "weight norm": 25.45},
    )
