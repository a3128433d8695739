"""The shipped models' architectures: tiny, but made of the stock classes that the large ones are made of."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.shapes.scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 20
LATENT_CHANNELS = 6
SECOND_DIM = 8
"""Width of the flow pipeline's second text encoder, which is there because the stock pipeline has two."""
_GLUE = ("a", "on", "is", "to", "the", "picture", "background", ",")


def words() -> list[str]:
    """Every word of every caption."""
    relation_words = {w for rel in RELATIONS for w in rel.split()}
    return sorted({*_GLUE, *COLOURS, *BACKGROUNDS, *SHAPES, *relation_words})


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE (Radford et al. 2019), so that any text has tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def tokenizer(folder: str | Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world is one token; other text falls back to bytes."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    symbols = _byte_symbols()
    merges: dict[tuple[str, str], str] = {}  # in the order of their rank
    for word in words():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            ranks = {pair: i for i, pair in enumerate(merges)}
            known = [pair for pair in itertools.pairwise(parts) if pair in ranks]
            a, b = min(known, key=ranks.__getitem__) if known else (parts[0], parts[1])
            merges[a, b] = a + b
            at = list(itertools.pairwise(parts)).index((a, b))
            parts[at : at + 2] = [a + b]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merges.values(), "<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def vae(channels: tuple[int, ...] = (32, 48, 64)) -> AutoencoderKL:
    """32 x 32 pixels to 6 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def text_encoder(vocab_size: int, hidden: int = 128, layers: int = 3) -> CLIPTextModel:
    """A CLIP text transformer over 20 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=hidden,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config)


def second_text_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    """As small as it gets; never trained."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=SECOND_DIM,
        intermediate_size=SECOND_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=SECOND_DIM,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModelWithProjection(config)


def unet(channels: tuple[int, ...] = (64, 128), text_dim: int = 128, layers: int = 1) -> UNet2DConditionModel:
    """An epsilon-prediction UNet over 8 x 8 latents with cross-attention at both resolutions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=text_dim,
        attention_head_dim=4,  # by the library's naming: the number of heads
        norm_num_groups=16,
    )


def scheduler(**overrides: Any) -> Any:
    """The noise schedule of Stable Diffusion 1.x, sampled with DDIM."""
    from diffusers import DDIMScheduler

    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }
    return DDIMScheduler(**(settings | overrides))


def pipeline(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, **scheduler_overrides: Any) -> StableDiffusionPipeline:
    """Assemble a stock pipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(**scheduler_overrides),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def transformer(width: int = 192, layers: int = 3, heads: int = 4, text_dim: int = 128 + SECOND_DIM) -> SD3Transformer2DModel:
    """An MMDiT over the 16 squares of 2 x 2 latents; its gates and its last layer start at zero (Peebles and Xie 2023)."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        caption_projection_dim=width,
        pooled_projection_dim=text_dim,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    modulations = [getattr(b, n).linear for b in net.transformer_blocks for n in ("norm1", "norm1_context")]
    for layer in (*modulations, net.norm_out.linear, net.proj_out):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    return net


def projected(text: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder as the SD3 pipeline wants it: that reads the last layer but one, so one that adds nothing goes on top.

    The pooled vector is the last token of the same words.
    """
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = text.config.to_dict() | {"num_hidden_layers": text.config.num_hidden_layers + 1}
    out = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    out.text_model.load_state_dict(text.state_dict(), strict=False)
    top = out.text_model.encoder.layers[-1]
    for layer in (top.self_attn.out_proj, top.mlp.fc2):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    nn.init.eye_(out.text_projection.weight)
    return out


def flow_pipeline(
    transformer: Any, vae: Any, text: Any, second: Any, tokenizer: Any, shift: float
) -> StableDiffusion3Pipeline:
    """Assemble a stock pipeline without a T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def clip(vocab_size: int, hidden: int = 96, layers: int = 3) -> CLIPModel:
    """A CLIP over 32 x 32 pictures: the learned reward."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "projection_dim": hidden,
    }
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    text = {**tower, **ends, "vocab_size": vocab_size, "max_position_embeddings": MAX_TOKENS}
    vision = {**tower, "image_size": 32, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=hidden))


def clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """No resizing and no cropping: pictures are 32 x 32 already."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    half = [0.5, 0.5, 0.5]
    image = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=half, image_std=half)
    return CLIPProcessor(image, tokenizer)
