"""SPO's step-aware preference model: a PickScore whose image tower is told how noisy a preview's state was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, Weight, require, scored
from diffalign.scorers.clip import Similarity
from diffalign.scorers.encoders import CLIPTexts, tokenizer_of
from diffalign.scorers.mps import H14_TOKENIZER, VIT_H
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights, stripped

FREQUENCIES = 256


@dataclass(frozen=True)
class Interpolated(Preprocess):
    """torch's bicubic resize without antialiasing, sizes rounded, overshoots cut: what SPO's code does with previews, which it
    has not cut to [0, 1] before, nor rounded to bytes.
    """

    eight_bit: bool = False

    def resized(self, height: int, width: int) -> tuple[int, int]:
        scale = self.size / min(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def smooth(self, x: Tensor) -> Tensor:
        size = self.resized(*x.shape[-2:])
        if size != tuple(x.shape[-2:]):
            x = interpolate(x, size, mode="bicubic", align_corners=False).clamp(0, 1)
        return self._normalise(self._fit(x))


def modulation(width: int, parts: int) -> nn.Sequential:
    """From the time's embedding to ``parts`` shifts, scales and gates."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class TimedEncoder(CLIPTexts):
    """A CLIP whose layers are shifted, scaled and gated by the time (DiT's adaLN), as is what is pooled."""

    def __init__(self, net: nn.Module, tokenizer: Path, side: int, device: str) -> None:
        super().__init__(net, Interpolated(side, centre="round"), device)
        self.tokenizer = tokenizer_of(tokenizer)
        self.max_tokens = self.net.config.text_config.max_position_embeddings

    def features(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """(B, D) of pixels (B, 3, S, S) at times (B,), 0 to 999; of finished pictures, 0, if not given."""
        from diffusers.models.embeddings import get_timestep_embedding

        tower = self.net.vision_model
        t = torch.zeros(len(x)) if times is None else times.float()
        said = get_timestep_embedding(t.to(x.device), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.net.t_embedder.mlp(said)
        h = tower.pre_layrnorm(tower.embeddings(x))
        for layer in tower.encoder.layers:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
            y = layer.layer_norm1(h) * (1 + scale) + shift
            h = h + gate * layer.self_attn(hidden_states=y, attention_mask=None)[0]
            h = h + gate_mlp * layer.mlp(layer.layer_norm2(h) * (1 + scale_mlp) + shift_mlp)
        shift, scale = tower.adaLN_modulation(time).chunk(2, dim=-1)
        found: Tensor = self.net.visual_projection(tower.post_layernorm(h[:, 0]) * (1 + scale) + shift)
        return found.float()

    @torch.no_grad()
    def previews(self, images: Sequence[Image.Image], times: Tensor) -> Tensor:
        """Features of previews, which are seen once and not kept."""
        return self.features(self.preprocess.exact(images).to(self.device), times)


class StepAware(Similarity):
    """exp(logit_scale) cos(preview, prompt), by a tower that knows the time."""

    config: ClassVar[dict[str, Any]] = VIT_H
    encoder: TimedEncoder
    card: ClassVar[Card] = Card(
        name="step-aware",
        summary="exp(logit_scale) cos(preview, prompt) at the time of the preview, for SD 1.5",
        unit="100 x cosine",
        citation="Liang et al. 2024 (SPO), arXiv 2406.04314",
        licence="none stated for the weights; of PickScore",
        weights=(
            Weight("SPO-Diffusion-Models/Step-Aware_Preference_Models", ("sd-v1-5_step-aware_preference_model.bin",)),
            H14_TOKENIZER,
        ),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
    )

    @classmethod
    def network(cls) -> nn.Module:
        """The empty network."""
        from transformers import CLIPConfig, CLIPModel

        net: Any = CLIPModel(CLIPConfig(**cls.config))
        width = cls.config["vision_config"]["hidden_size"]
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        net.t_embedder = nn.ModuleDict({"mlp": mlp})
        net.vision_model.adaLN_modulation = modulation(width, 2)
        for layer in net.vision_model.encoder.layers:
            layer.adaLN_modulation = modulation(width, 6)
        return net  # type: ignore[no-any-return]

    def __init__(self, path: Path, tokenizer: Path, device: str = "cpu") -> None:
        found = choose(path, *self.card.weights[0].files)
        net = self.network()
        state = stripped(read_weights(found), "model.")
        fit(net, {k: v for k, v in state.items() if not k.endswith("position_ids")}, found)
        self.encoder = TimedEncoder(net, tokenizer, self.config["vision_config"]["image_size"], device)

    def value(self, cosine: Tensor) -> Tensor:
        return self.encoder.scale * cosine

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        if batch.times is None:
            return super().__call__(batch)
        require(self.card, batch)
        values = self.head(self.encoder.previews(batch.images, batch.times), batch.prompts)
        return scored(self.name, values, self.truncated(batch.prompts))


class StepAwareSDXL(StepAware):
    """The same, tuned for previews of SDXL."""

    card: ClassVar[Card] = replace(
        StepAware.card,
        name="step-aware-sdxl",
        summary="exp(logit_scale) cos(preview, prompt) at the time of the preview, for SDXL",
        weights=(
            replace(StepAware.card.weights[0], files=("sdxl_step-aware_preference_model.bin",)),
            StepAware.card.weights[1],
        ),
    )
