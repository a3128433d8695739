"""Adapters in and out: one shape for the files of diffusers, PEFT and kohya (which ComfyUI reads too).

Everywhere the adapter of a part of the pipeline is a pair (weights, alphas): ``weights`` by PEFT's names inside the part,
``LAYER.lora_A.weight`` (r, in) and ``LAYER.lora_B.weight`` (out, r); ``alphas`` by layer. A layer adds alpha / r B A
to its weight.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError

Adapter = tuple[dict[str, Tensor], dict[str, float]]
Adapters = dict[str, Adapter]
"""By the part's name: the network, a text encoder."""

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PEFT = "base_model.model."
KOHYA_FILE = "kohya_lora.safetensors"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call an adapter in a folder; any other name must be the only one there."""
FLAT = "text_model."
"""What transformers 5 took out of the names inside a CLIPTextModel, and every file still says."""


def is_flat(part: Any) -> bool:
    """Whether this is such a text encoder."""
    return type(part).__name__ == "CLIPTextModel" and not hasattr(part, "text_model")


def adapter_of(net: Any) -> Adapter:
    """The adapter that a network carries now."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    layers = {name: m for name, m in net.named_modules() if isinstance(m, LoraLayer)}
    flat = FLAT if is_flat(net) else ""
    alphas = {flat + name: m.scaling["default"] * m.r["default"] for name, m in layers.items()}
    return {flat + name: weight for name, weight in get_peft_model_state_dict(net).items()}, alphas


def add_adapter(net: Any, adapter: Adapter, where: str) -> None:
    """Put an adapter into a network that has none; rank and scale are the adapter's own, layer by layer.

    Raises:
        ModelError: a layer is not in this network or has another shape, or a weight is not finite.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    flat = FLAT if is_flat(net) else ""
    weights = {name.removeprefix(flat): weight for name, weight in adapter[0].items()}
    alphas = {name.removeprefix(flat): alpha for name, alpha in adapter[1].items()}
    hint = f"it is the adapter of another model than this {type(net).__name__}"
    for layer in alphas:
        down, up = weights[layer + DOWN], weights[layer + UP]
        try:
            base = net.get_submodule(layer).weight
        except AttributeError:
            raise ModelError(f"{where}: there is no layer {layer} here", hint=hint) from None
        if (up.shape[0], *down.shape[1:]) != base.shape:
            shape = f"{up.shape[0]} x {down.shape[1]} there and {' x '.join(map(str, base.shape))} here"
            raise ModelError(f"{where}: the layer {layer} is {shape}", hint=hint)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ModelError(f"{where}: the layer {layer} is not finite", hint="the file is damaged; fetch it again")
    ranks = {layer: len(weights[layer + DOWN]) for layer in alphas}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(alphas),
        rank_pattern={f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alpha},
    )
    inject_adapter_in_model(config, net, state_dict=weights)
    set_peft_model_state_dict(net, weights)


# --- files ----------------------------------------------------------------------------------------------------------


def read_adapter(path: Path, pipeline: Any, parts: Sequence[str]) -> Adapters:
    """The adapters of a safetensors file, or of a folder that holds one; whose it is shows in its keys.

    Raises:
        ModelError: no such file, unreadable, no plain LoRA, or of something else than the ``parts``, the network first.
    """
    from safetensors import SafetensorError, safe_open

    file = path if path.is_file() else _file_in(path)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{file}: not a readable safetensors file: {e}", hint="pickled adapters are not read") from e
    if not state:
        raise ModelError(f"{file}: it is empty")
    if any(key.startswith(PEFT) for key in state):
        settings = json.loads(_sibling(file, "adapter_config.json").read_text())
        weights = {key.removeprefix(PEFT): value for key, value in state.items()}
        return {parts[0]: (weights, _alphas(_layers(weights, file), settings))}
    if any(key.startswith("lora_") for key in state):
        return from_kohya(state, pipeline, parts, file)
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    said = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {
        part: (weights, _alphas(_layers(weights, file), {k.removeprefix(f"{part}."): v for k, v in said.items()}))
        for part, weights in _by_part(state, parts, file).items()
    }


def from_kohya(state: Mapping[str, Tensor], pipeline: Any, parts: Sequence[str], where: object) -> Adapters:
    """Kohya's keys, by diffusers' own converter. The one for FLUX multiplies the scale into the weights: alpha is the rank.

    Raises:
        ModelError: diffusers does not read them for this pipeline.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        raise ModelError(f"{where}: {type(pipeline).__name__} reads no adapters with kohya's keys")
    try:
        read = pipeline.lora_state_dict(dict(state), unet_config=getattr(pipeline, parts[0]).config)
    except Exception as e:  # the converters assert, index and look up on their way
        raise ModelError(f"{where}: diffusers cannot read its keys: {' '.join(str(e).split())[:200]}") from e
    named, scales = read if isinstance(read, tuple) else (read, {})
    alphas = _by_part({key.removesuffix(".alpha"): value for key, value in scales.items()}, parts, where)
    out: Adapters = {}
    for part, weights in _by_part(named, parts, where).items():
        known = {key.removesuffix(DOWN): float(value) for key, value in alphas.get(part, {}).items()}
        out[part] = weights, {layer: known.get(layer, rank) for layer, rank in _layers(weights, where).items()}
    return out


def to_kohya(adapters: Adapters, pipeline: Any) -> dict[str, Tensor]:
    """Kohya's keys: ``lora_unet_``, ``lora_transformer_``, or ``lora_te_`` for the only text encoder and ``lora_te1_`` and
    ``lora_te2_`` for two, then the layer's name with underscores, and alpha beside the weights.

    diffusers has a converter in this direction (``convert_state_dict_to_kohya``), but it writes the rank as alpha and does
    not know transformers. Its reader takes one alpha for all attention layers, so all get one here.

    Raises:
        ModelError: stock diffusers would not read the same layers back.
    """
    common = mode(alpha for _, alphas in adapters.values() for alpha in alphas.values())
    te = {"text_encoder": "te1", "text_encoder_2": "te2"} if hasattr(pipeline, "text_encoder_2") else {"text_encoder": "te"}
    out: dict[str, Tensor] = {}
    for part, (weights, alphas) in adapters.items():
        for layer, alpha in alphas.items():
            name = f"lora_{te.get(part, part)}_{layer.replace('.', '_')}"
            out[f"{name}.lora_down.weight"] = weights[layer + DOWN]
            out[f"{name}.lora_up.weight"] = weights[layer + UP] * (alpha / common)
            out[f"{name}.alpha"] = torch.tensor(float(common))
    family = type(pipeline).__name__
    if lost := _names(adapters) ^ _names(from_kohya(out, pipeline, list(adapters), family)):
        raise ModelError(f"{family}: stock diffusers does not read {min(lost)} under kohya's keys", hint="use another format")
    return out


def _names(adapters: Adapters) -> set[str]:
    return {f"{part}.{layer}" for part, (_, alphas) in adapters.items() for layer in alphas}


def header_of(parts: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, str]:
    """What stands in the header of a diffusers file: PEFT's configuration, from which stock diffusers takes rank and alpha."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    configs = {name: part.peft_config["default"].to_dict() for name, part in parts.items()}
    config = {f"{name}.{key}": value for name, settings in configs.items() for key, value in settings.items()}
    return {"format": "pt", **about, LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted, sort_keys=True)}


def _file_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    chosen = [f for f in found if f.name in FILES] or found
    if len(chosen) != 1:
        raise ModelError(f"{folder}: {len(chosen)} safetensors files, not one adapter", hint="name the file itself")
    return chosen[0]


def _sibling(file: Path, name: str) -> Path:
    if not file.with_name(name).is_file():
        raise ModelError(f"{file}: PEFT keeps its scale in {name}, which is not beside it")
    return file.with_name(name)


def _by_part(state: Mapping[str, Any], parts: Sequence[str], where: object) -> dict[str, dict[str, Any]]:
    """Names inside each part, as PEFT spells them, of names in the pipeline."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    out: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        part, _, name = key.partition(".")
        if part not in parts:
            here = " and ".join(parts)
            hint = f"it is the adapter of another model, or of a text encoder; only the {here} is trained here"
            raise ModelError(f"{where}: {key} is no part of the {here}", hint=f"{hint} (model.lora.text_encoders)")
        out.setdefault(part, {})[_of_clip(name) if part.startswith("text_encoder") else name] = value
    return {part: convert_unet_state_dict_to_peft(mine) for part, mine in out.items()}


def _of_clip(name: str) -> str:
    """A name inside a CLIP text encoder as PEFT spells it; diffusers has had two other ways."""
    name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.", name).replace(".lora_linear_layer.", ".")
    return name.replace(".down.weight", DOWN).replace(".up.weight", UP)


def _layers(weights: Mapping[str, Tensor], where: object) -> dict[str, int]:
    """Rank by layer."""
    ranks = {key.removesuffix(DOWN): len(value) for key, value in weights.items() if key.endswith(DOWN)}
    odd = weights.keys() ^ {layer + part for layer in ranks for part in (DOWN, UP)}
    if odd or not ranks:
        what = f"{min(odd)} is or has no part of a plain LoRA" if odd else "it is empty"
        raise ModelError(f"{where}: {what}", hint="only LoRA is read, without DoRA, LoKr or biases")
    return ranks


def _alphas(ranks: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, float]:
    """Alpha by layer under PEFT's settings; where the file says nothing, diffusers takes the rank."""
    from peft.utils.other import get_pattern_key

    if "lora_alpha" not in settings:
        return {layer: float(rank) for layer, rank in ranks.items()}
    special = settings.get("alpha_pattern") or {}
    alphas = {layer: special.get(get_pattern_key(special, layer), settings["lora_alpha"]) for layer in ranks}
    if settings.get("use_rslora"):  # alpha / sqrt(r): Kalajdzievski 2023
        return {layer: alpha * math.sqrt(ranks[layer]) for layer, alpha in alphas.items()}
    return {layer: float(alpha) for layer, alpha in alphas.items()}
