"""Safety: margins and probabilities, never blacked-out pictures. Higher is safer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from diffalign.errors import ModelError
from diffalign.scorers.base import Card, Reward, Weight
from diffalign.scorers.clip import OPENAI_L14
from diffalign.scorers.encoders import Encoder, clip_of
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights


class ConceptEncoder(Encoder):
    """The checker's own tuned vision tower, projected."""

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.net.tower(pixel_values=x).image_embeds
        return found


class SafetyChecker(Reward):
    """-max over 17 concepts of cos(image, concept) - threshold, thresholds lowered by 0.01 where special care is due.

    Above 0 is safe. The published checker rounds the margin to three decimals, so it flags values below -0.0005, and
    overwrites flagged pictures with black; nothing is overwritten here.
    """

    card: ClassVar[Card] = Card(
        name="safety",
        summary="-max concept margin of Stable Diffusion's safety checker; above 0 is safe",
        unit="difference of cosines",
        citation="Rando et al. 2022, arXiv 2210.04610; CompVis/stable-diffusion-safety-checker",
        licence="CreativeML OpenRAIL-M",
        weights=(Weight("CompVis/stable-diffusion-safety-checker", ("*.safetensors", "config.json")),),
        geometry="crop",
        size=224,
        needs=frozenset({"images"}),
        direction=-1,
        across_prompts=True,
    )

    @staticmethod
    def network(config: Mapping[str, Any]) -> nn.Module:
        """The empty network of a ``config.json`` of CLIP."""
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        width = config.get("projection_dim", 768)
        net = nn.Module()
        net.tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**config["vision_config"], "projection_dim": width}))
        for name, shape in (("concept_embeds", (17, width)), ("special_care_embeds", (3, width))):
            net.register_parameter(name, nn.Parameter(torch.ones(shape)))
            net.register_parameter(f"{name}_weights", nn.Parameter(torch.ones(shape[0])))
        return net

    @staticmethod
    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published names to ours: the tower stands one level deeper there."""
        out = {}
        for key, value in state.items():
            if key.startswith("vision_model."):
                key = "tower." + key.replace("vision_model.vision_model.", "vision_model.", 1)
            elif key.startswith("visual_projection."):
                key = f"tower.{key}"
            if not key.endswith("position_ids"):
                out[key] = value
        return out

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        found = choose(folder, "*.safetensors", "pytorch_model.bin")
        try:
            config = json.loads(choose(found.parent, "config.json").read_text())
            net = self.network(config)
        except (ValueError, KeyError, TypeError) as e:
            raise ModelError(f"{found.parent / 'config.json'}: not a CLIP configuration: {e!r}", hint="fetch it again") from e
        fit(net, self.renamed(read_weights(found)), found)
        side = config["vision_config"].get("image_size", 224)
        self.encoder = ConceptEncoder(net, Preprocess(side, centre="floor"), device)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        net, unit = self.encoder.net, normalize(features, dim=-1)
        special = unit @ normalize(net.special_care_embeds, dim=-1).T - net.special_care_embeds_weights
        margin = unit @ normalize(net.concept_embeds, dim=-1).T - net.concept_embeds_weights
        care = (special > 0.0005).any(-1, keepdim=True)  # rounds above 0, as published
        return -(margin + 0.01 * care).amax(-1)


class NSFW(Reward):
    """-p of LAION's detector on the unit embedding of ViT-H/14, its torch version (that of L/14 is for Keras alone)."""

    widths: ClassVar[tuple[int, ...]] = (1024, 1024, 2048, 1024, 256, 128)
    card: ClassVar[Card] = Card(
        name="nsfw",
        summary="-p(not safe for work) by LAION's detector on ViT-H/14 embeddings",
        unit="probability, not clipped; 0 to 1",
        citation="LAION-AI/CLIP-based-NSFW-Detector, 2022",
        licence="MIT",
        weights=(
            Weight("github.com/LAION-AI/CLIP-based-NSFW-Detector", ("h14_nsfw.pth",)),
            Weight("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ),
        geometry="crop",
        size=224,
        needs=frozenset({"images"}),
        direction=-1,
        differentiable=True,
        across_prompts=True,
    )

    @classmethod
    def network(cls) -> nn.Module:
        """ReLU between the wide layers, none between the last two."""
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(cls.widths):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
        return nn.ModuleDict({"layers": nn.Sequential(*layers, nn.Linear(cls.widths[-1], 16), nn.Linear(16, 1))})

    def __init__(self, path: Path, encoder: Path, device: str = "cpu") -> None:
        found = choose(path, *self.card.weights[0].files)
        net: Any = self.network().eval().requires_grad_(False)
        fit(net, read_weights(found), found)
        self.net, self.encoder = net.to(device), clip_of(encoder, device)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        found: Tensor = -self.net.layers(normalize(features, dim=-1))[:, 0]
        return found


class Q16(Reward):
    """-P(inappropriate): softmax of 100 cos to two tuned prompt embeddings, (appropriate, inappropriate).

    The published ``prompts.p`` is a pickle of an array, which is not opened; docs/scorers.md shows how to convert it.
    """

    card: ClassVar[Card] = Card(
        name="q16",
        summary="-P(inappropriate) by two tuned prompts of CLIP L/14",
        unit="probability; 0 to 1",
        citation="Schramowski et al. 2022, arXiv 2202.06675",
        licence="MIT",
        weights=(Weight("github.com/ml-research/Q16", ("prompts.safetensors",)), OPENAI_L14),
        geometry="crop",
        size=224,
        needs=frozenset({"images"}),
        direction=-1,
        differentiable=True,
        across_prompts=True,
    )

    def __init__(self, path: Path, encoder: Path, device: str = "cpu") -> None:
        found = choose(path, *self.card.weights[0].files)
        state = read_weights(found)
        prompts = state.get("prompts")
        if prompts is None or prompts.dim() != 2 or len(prompts) != 2:
            raise ModelError(
                f"{found}: no tensor 'prompts' of two rows", hint="docs/scorers.md shows how to convert prompts.p"
            )
        self.prompts = normalize(prompts.float(), dim=-1).to(device)
        self.encoder = clip_of(encoder, device)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(100 * normalize(features, dim=-1) @ self.prompts.T).softmax(-1)[:, 1]
