"""ImageReward and CycleReward: BLIP-large reads picture and prompt together, an MLP reads its class token.

The published code carries its own copy of BLIP, which no longer imports. The networks here are those of transformers,
filled through a map of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.scorers.base import Card, Reward, Weight
from diffalign.scorers.encoders import Encoder
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights

TOKENIZER = Weight("google-bert/bert-base-uncased", ("vocab.txt",))

VISION_NAMES = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"^blocks\.(\d+)\.attn", r"encoder.layers.\1.self_attn"),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"^blocks\.(\d+)", r"encoder.layers.\1"),
    (r"^norm\.", "post_layernorm."),
]


class BlipEncoder(Encoder):
    """The vision tower: (B, tokens, width) after the last layer norm."""

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.net.vision(pixel_values=x).last_hidden_state
        return found


class BlipReward(Reward):
    """A function of the class token of the text tower, which looks at the picture across."""

    vision: ClassVar[dict[str, Any]] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,  # transformers' default is 1e-5
    }
    text: ClassVar[dict[str, Any]] = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "is_decoder": True,
    }

    @staticmethod
    def mlp(width: int) -> nn.Sequential:
        """The layers behind the class token."""
        raise NotImplementedError

    @classmethod
    def network(cls) -> nn.ModuleDict:
        """The empty network."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        return nn.ModuleDict({
            "vision": BlipVisionModel(BlipVisionConfig(**cls.vision)),
            "text": BlipTextModel(BlipTextConfig(**cls.text), add_pooling_layer=False),
            "mlp": cls.mlp(cls.text["hidden_size"]),
        })  # fmt: skip

    @staticmethod
    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published names to ours. The two projections of BLIP's pretraining and the position ids are not used."""
        out = {}
        for key, value in state.items():
            if key.startswith("blip.visual_encoder."):
                key = key.removeprefix("blip.visual_encoder.")
                for old, new in VISION_NAMES:
                    key, found = re.subn(old, new, key)
                    if found:
                        break
                out[f"vision.{key}"] = value
            elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
                out["text." + key.removeprefix("blip.text_encoder.")] = value
            elif key.startswith("mlp.layers."):
                out["mlp." + key.removeprefix("mlp.layers.")] = value
            elif not key.startswith(("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.")):
                out[key] = value  # unexpected, and named as such by the one who fits
        return out

    def __init__(self, path: Path, vocabulary: Path, device: str = "cpu") -> None:
        from tokenizers import BertWordPieceTokenizer

        found = choose(path, "*.safetensors", *self.card.weights[0].files)
        net = self.network()
        fit(net, self.renamed(read_weights(found)), found)
        self.encoder = BlipEncoder(net, Preprocess(self.vision["image_size"]), device)
        words = choose(vocabulary, *TOKENIZER.files)
        try:
            # [DEC] and [ENC], which BLIP adds, are never in a prompt, so BERT's own tokens are the same
            self.tokenizer = BertWordPieceTokenizer(str(words), lowercase=True)
        except Exception as e:  # tokenizers raises plain Exception
            raise ModelError(f"{words}: not BERT's vocabulary: {e}", hint="give vocab.txt of bert-base-uncased") from e

    @property
    def limit(self) -> int:
        """Tokens that are read, start and end included."""
        return self.card.max_tokens or 0

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        self.tokenizer.enable_truncation(self.limit)
        self.tokenizer.enable_padding(length=self.limit)
        tokens = self.tokenizer.encode_batch(list(prompts))
        ids, mask = (
            torch.tensor(x, device=features.device) for x in zip(*((t.ids, t.attention_mask) for t in tokens), strict=True)
        )
        hidden = self.encoder.net.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
            is_decoder=False,  # no causal mask, cross-attention kept
        ).last_hidden_state
        return self.encoder.net.mlp(hidden[:, 0].float())[:, 0]

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        return [len(t.ids) > self.limit for t in self.tokenizer.encode_batch(list(prompts))]


class ImageReward(BlipReward):
    """(mlp(cls) - mean) / std, with the mean and deviation of the training set. The MLP has no activations."""

    mean, std = 0.16717362830052426, 1.0333394966054072

    card: ClassVar[Card] = Card(
        name="imagereward",
        summary="(MLP of BLIP's class token - 0.167) / 1.033",
        unit="standard deviations of the training set; -2.3 to 2",
        citation="Xu et al. 2023, arXiv 2304.05977",
        licence="Apache-2.0",
        weights=(Weight("THUDM/ImageReward", ("ImageReward.pt",)), TOKENIZER),
        geometry="crop",
        size=224,
        max_tokens=35,
        differentiable=True,
    )

    @staticmethod
    def mlp(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return (super().head(features, prompts) - self.mean) / self.std


class CycleReward(BlipReward):
    """mlp(cls) with GELU, not standardised. The weights of T2I and I2T have the same form; give them as the argument."""

    card: ClassVar[Card] = Card(
        name="cyclereward",
        summary="MLP of BLIP's class token, trained on cycle consistency (Combo)",
        unit="unbounded",
        citation="Bahng et al. 2025, arXiv 2506.02095",
        licence="MIT",
        weights=(Weight("carolineec/CycleReward-Combo", ("*.safetensors", "*.pth")), TOKENIZER),
        geometry="crop",
        size=224,
        max_tokens=128,
        differentiable=True,
    )

    @staticmethod
    def mlp(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(width, 1024),
            nn.GELU(),
            nn.Linear(1024, 128),
            nn.GELU(),
            nn.Linear(128, 64),
            nn.GELU(),
            nn.Linear(64, 16),
            nn.GELU(),
            nn.Linear(16, 1),
        )
