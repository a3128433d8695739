"""Ours and the stock pipeline, image by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_families import FAMILIES

from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.models import LoRA, Model
from diffalign.recipes import TrainConfig, train
from diffalign.sampling import Item, Sampler, generate, generators
from diffalign.spec import validate, with_overrides
from diffalign.train.tracking import read_metrics

PROMPTS = ["a red circle on a grey background", "a blue square left of a pink cross, navy background"]
RANK_2 = LoRA(rank=2, alpha=4)
T5 = [name for name in FAMILIES if name.startswith(("sd3", "flux", "pixart"))]


def open_stock(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    # diffusers wants to be told of a part that its own save_pretrained left out
    parts = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if parts.get(name) == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe: Any, latents: torch.Tensor, guidance: float, negative: Any = None) -> torch.Tensor:
    """Three steps of the stock pipeline for PROMPTS, uint8."""
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    more: dict[str, Any] = {"guidance_scale": guidance, "height": height, "width": width}
    kind = type(pipe).__name__
    if kind == "FluxPipeline":
        if not pipe.transformer.config.guidance_embeds and guidance > 1:
            more |= {"true_cfg_scale": guidance, "negative_prompt": ""}
        latents = pipe._pack_latents(latents, *latents.shape)
    elif kind.startswith("PixArt"):
        more |= {"use_resolution_binning": False, "clean_caption": False}
    elif kind == "StableDiffusion3Pipeline" and pipe.text_encoder_3 is None:
        more |= {"max_sequence_length": 0}
    if negative is not None:
        more["negative_prompt"] = negative
    return to_uint8(pipe(PROMPTS, latents=latents, num_inference_steps=3, output_type="pt", **more).images)


def our_images(model: Model, guidance: float, negative: Any = (None, None)) -> torch.Tensor:
    prompts = [Prompt(p, n) for p, n in zip(PROMPTS, negative, strict=True)]
    return generate(model, prompts, Sampler(num_inference_steps=3, guidance_scale=guidance), seed=5)[:, 0]


def our_latents(model: Model, negative: Any = (None, None)) -> torch.Tensor:
    items = [Item(Prompt(p, n), 0) for p, n in zip(PROMPTS, negative, strict=True)]
    return torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators(items, 5)])


def same(ours: torch.Tensor, theirs: torch.Tensor, guidance: float) -> None:
    """Bit-equal without guidance. With it the kernels see other batches: the stock pipelines encode the empty prompt once
    per image and we once, and FLUX's guides by two passes: the rounding of a pixel may tip over.
    """
    assert ours.float().std() > 1  # not one flat colour, which would equal anything
    differ = (ours.int() - theirs.int()).abs()
    assert differ.max() <= (guidance > 1)
    assert differ.float().mean() < 1e-3


def disturb(model: Any, seed: int = 1) -> None:
    """Stand in for training: move every trainable weight."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.named_weights.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


def run(folder: Path, name: str, csv: Path, out: Path, *more: str) -> list[dict[str, float]]:
    base = {"objective": {"type": "sigmoid", "beta": 500}, "model": {"path": str(folder), "lora": {"rank": 2}}}
    if name in T5:
        base["model"]["max_sequence_length"] = 0 if name == "sd3-without-t5" else 16
    settings = [
        f"data.path={csv}", "data.limit=6", "data.holdout=0", "train.max_steps=2", "train.per_device_train_batch_size=2",
        "train.logging_steps=1", "train.learning_rate=1e-3", "train.caption_dropout=0.3", "evaluate.enabled=false",
    ]  # fmt: skip
    train(validate(TrainConfig, with_overrides(base, [*settings, f"output_dir={out}", *more])))
    return read_metrics(out)
