"""Models without their weights: from the configurations of a folder, or from those of large models known here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from diffalign.models.base import Model, ModelSpec

Parts = Mapping[str, tuple[str, str, Mapping[str, Any]]]
"""Name in the pipeline -> (library, class, configuration)."""

_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
}
_VAE_16 = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_NOISE = (
    "diffusers",
    "DDIMScheduler",
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
)

KNOWN: dict[str, tuple[str, Parts]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 64,
                    "block_out_channels": [320, 640, 1280, 1280],
                    "cross_attention_dim": 768,
                    "attention_head_dim": 8,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE | {"sample_size": 512}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "scheduler": _NOISE,
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "block_out_channels": [320, 640, 1280],
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE | {"scaling_factor": 0.13025}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "scheduler": _NOISE,
        },
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "num_layers": 24,
                    "num_attention_heads": 24,
                    "caption_projection_dim": 1536,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("diffusers", "AutoencoderKL", _VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        },
    ),
}
"""By hub id: what these models' own configurations say where it is not their classes' default."""


def read_parts(folder: Path) -> tuple[str, Parts]:
    """The pipeline class and the parts that a model's folder describes; weights are not opened."""
    from diffalign.models import detect

    pipeline = detect(folder)
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for name, value in index.items():
        for file in ("config.json", "scheduler_config.json"):
            if isinstance(value, list) and (path := folder / name / file).is_file():
                parts[name] = (value[0], value[1], json.loads(path.read_text()))
    return pipeline, parts


def skeleton(pipeline: str, parts: Parts, spec: ModelSpec, device: str = "meta") -> Model:
    """A model of these parts: on meta it has shapes and no weights, elsewhere random ones. Prompts read as nothing.

    Its dtypes are those that :func:`diffalign.models.load_model` gives; nothing is quantised.
    """
    import diffusers

    from diffalign.models import find_family

    family, cls = find_family(pipeline), getattr(diffusers, pipeline)
    signature = inspect.signature(cls.__init__).parameters
    made: dict[str, Any] = {
        n: None for n, p in signature.items() if n != "self" and p.default is p.empty
    } | family.load_options
    for name in {family.net_name, "vae", "scheduler", *family.encoders} & parts.keys():
        trained = name == family.net_name and spec.lora is None
        dtype = torch.float32 if name in ("vae", "scheduler") or trained else getattr(torch, spec.dtype)
        with torch.device("cpu" if name == "scheduler" else device), _default_dtype(dtype):
            made[name] = _build(*parts[name])
        if name in family.encoders:
            reads = getattr(made[name].config, "max_position_embeddings", 512)  # a T5 has no limit of its own
            made[name.replace("text_encoder", "tokenizer")] = _Blank(reads)
        if name != "scheduler":
            _cast(made[name], dtype)
    model: Model = family(cls(**made), spec.model_copy(update={"quantization": "none", "attention": None}))
    return model


def _build(library: str, kind: str, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    return cls.from_config(dict(config)) if library == "diffusers" else cls(cls.config_class.from_dict(dict(config)))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast as loading does: what stands in the file, and no buffer that is computed."""
    stored = module.state_dict().keys()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build in this dtype at once: in fp32 first, the largest would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Blank:
    """Reads every prompt as a row of zeros, as long as a tokenizer would fill it up."""

    bos_token_id = eos_token_id = pad_token_id = 0
    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: list[str], max_length: int | None = None, padding: Any = None, **options: Any) -> Any:
        # the stock pipelines ask for the longest prompt to warn of what they cut
        length = 1 if padding == "longest" else max_length or self.model_max_length
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def tokenize(self, text: str) -> list[str]:
        return []
