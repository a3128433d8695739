"""Model families: one file each holds all that is particular to it. To add one: a file and its line in the table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from diffalign.errors import ModelError
from diffalign.models.base import Cond, Format, LoRA, Model, ModelSpec, Phase, Weights

# pipeline class in model_index.json -> module:class of its family
FAMILIES = {
    "StableDiffusionPipeline": "diffalign.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "diffalign.models.sdxl:SDXL",
    "StableDiffusion3Pipeline": "diffalign.models.sd3:SD3",
    "FluxPipeline": "diffalign.models.flux:Flux",
    "PixArtAlphaPipeline": "diffalign.models.pixart:PixArt",
    "PixArtSigmaPipeline": "diffalign.models.pixart:PixArt",
}
REFUSED = {
    "StableDiffusionXLImg2ImgPipeline": "it is SDXL's refiner, which finishes the base's images; train the base model",
}


def detect(folder: Path) -> str:
    """The pipeline class that ``model_index.json`` names.

    Raises:
        ModelError: the folder is not a model in the diffusers layout, or its pipeline is not supported.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} is not a model in the diffusers layout: it has no model_index.json",
            hint="give a folder written by save_pretrained, or a hub id",
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{index} is damaged: {e!r}", hint="fetch the model again") from e
    if name not in FAMILIES:
        raise ModelError(
            f"{folder}: the pipeline {name} is not supported",
            hint=REFUSED.get(name, f"supported: {', '.join(FAMILIES)}; CONTRIBUTING.md shows how to add a family"),
        )
    return str(name)


def find_family(pipeline: str) -> Any:
    """The class behind a pipeline's name."""
    module, _, cls = FAMILIES[pipeline].partition(":")
    return getattr(importlib.import_module(module), cls)


def load_model(folder: Path, spec: ModelSpec) -> Model:
    """Load a local model folder; ``spec.path`` is only what it is called."""
    family = find_family(detect(folder))
    try:
        model: Model = family.load(folder, spec)
    except ModelError:
        raise
    except Exception as e:  # the loaders of diffusers, transformers and safetensors raise many kinds
        raise ModelError(f"cannot load the model {folder}: {type(e).__name__}: {' '.join(str(e).split())[:400]}") from e
    return model


__all__ = [
    "FAMILIES",
    "Cond",
    "Format",
    "LoRA",
    "Model",
    "ModelSpec",
    "Phase",
    "Weights",
    "detect",
    "find_family",
    "load_model",
]
