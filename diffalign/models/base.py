"""What every model family offers, and the weight handling that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from diffalign.errors import ModelError
from diffalign.models.lora import Adapters, add_adapter
from diffalign.path import Coeffs, Kind
from diffalign.spec import Spec

Phase = Literal["pictures", "texts", "train", "sample"]
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""What is adapted in a text encoder."""


@dataclass(frozen=True)
class Cond:
    """Encoded prompts: every tensor has the batch first; what a family does not use is None."""

    embeds: Tensor
    """(B, L, D), one vector per token."""
    mask: Tensor | None = None
    """(B, L), 1 where a token counts, 0 where it only fills up."""
    pooled: Tensor | None = None
    """(B, P), one vector per prompt."""
    frame: Tensor | None = None
    """(B, 6), what is told of the picture's size: see :meth:`Model.sized`."""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> Self:
        return type(self)(**{name: tensor[rows] for name, tensor in self.parts().items()})

    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}

    def to(self, *args: Any) -> Self:
        return type(self)(**{name: tensor.to(*args) for name, tensor in self.parts().items()})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """All rows under one another. Where a mask can hide it, shorter prompts are filled up with zeros."""
        longest = max(p.embeds.shape[1] for p in parts)
        if parts[0].mask is not None:
            parts = [p._filled(longest) for p in parts]
        return cls(**{name: torch.cat([p.parts()[name] for p in parts]) for name in parts[0].parts()})

    def _filled(self, length: int) -> Self:
        missing = length - self.embeds.shape[1]
        if not missing or self.mask is None:
            return self
        wider = {"embeds": pad(self.embeds, (0, 0, 0, missing)), "mask": pad(self.mask, (0, missing))}
        return type(self)(**(self.parts() | wider))


class LoRA(Spec):
    """A low-rank adapter (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; the rank itself if not given."""
    target_modules: list[str] = Field(default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Names of the layers to adapt, as suffixes of their full names."""
    text_encoders: bool = False
    """Adapt the attention of the text encoders too (SD 1.x, 2.x and SDXL): prompts are then encoded in every step."""
    path: str | None = None
    """An existing adapter to start from, in diffusers', PEFT's or kohya's format: a file, a folder or a hub id. Rank, alpha
    and layers are then its own, and it is the reference too.
    """


class ModelSpec(Spec):
    """Which model, and which of its weights are trained."""

    path: str
    """A local folder in the diffusers layout, a hub id, or ``shapes-unet`` for the built-in model."""
    revision: str | None = None
    variant: str | None = None
    """Weight variant, such as fp16."""
    lora: LoRA | None = None
    """Train an adapter; without it all weights of the denoiser are trained."""
    gradient_checkpointing: bool = False
    """Trade a second forward pass for memory."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of what is frozen. What is trained stays fp32, adapter or all weights; so does the VAE, which may overflow in fp16."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Of the frozen network under an adapter: int8 by torchao (weights only), int4 by bitsandbytes (nf4)."""
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """A side or (height, width) in pixels of what it samples, and of training data without a size of their own; what it was
    made for if not given."""
    attention: str | None = None
    """A backend of diffusers' attention (native, xformers, flash ...); PyTorch's own choice if not given."""
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    """Of CLIP-only models: cut prompts at 77 tokens (and count them), or read them in chunks of 75 side by side."""
    max_sequence_length: int | None = Field(default=None, ge=0, le=512)
    """Tokens that a T5 reads; what the stock pipeline does if not given (SD3 without its T5: 0)."""

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(f"quantization {self.quantization} needs an adapter: quantised weights cannot be trained")
        return self


Format = Literal["diffusers", "kohya", "merged"]
"""What trained weights are written as: see :meth:`PipelineModel.export`."""
NOTHING: Mapping[str, str] = MappingProxyType({})


class Model(Protocol):
    """A text-to-image diffusion model. ``t`` is the family's native timestep, (B,); :meth:`timestep` makes it."""

    family: str
    kind: Kind
    net: Any
    """The trained network: the only thing handed to accelerate."""
    path: str
    scheduler: Any
    """The stock scheduler that the model is sampled with."""
    latent_shape: tuple[int, int, int]
    resolution: tuple[int, int]
    """(height, width) in pixels of what it samples: native, or as its spec says."""
    granularity: int
    """Sides of training pictures that are not native are multiples of this many pixels."""
    takes_negative: bool
    """Whether guidance has a pass to give negative prompts to."""
    named_weights: Weights
    trains_texts: bool
    """Whether the text encoders are trained too, so that what they say is not to be kept."""

    def timestep(self, u: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B,) fractions of the schedule in [0, 1), 0 clean and 1 noise; ``size`` of the latents where it is not native."""

    def coeffs(self, t: Tensor) -> Coeffs: ...
    def solver(self, steps: int) -> Any:
        """A copy of the stock scheduler, set to ``steps`` steps at the native size."""

    def grid(self, steps: int) -> tuple[Tensor, Coeffs]:
        """The steps of a sampler that makes one evaluation a step, as the stock scheduler places them at the native size:
        (T,) native timesteps, and coefficients at them and at the end, (T + 1,), on the model's device.
        """

    def encode_prompts(self, prompts: Sequence[str | None]) -> Cond:
        """None is the absence of a prompt, which guidance starts from: for most models the same as an empty one."""

    def truncated(self, prompts: Iterable[str]) -> int:
        """How many of these are cut, being longer than what the text encoder reads."""

    def sized(self, cond: Cond, frame: Tensor) -> Cond:
        """Tell of the pictures' sizes, where the model listens to that. ``frame`` (B, 6): original height and width,
        top and left of the cut in the resized picture, target height and width; :meth:`encode_prompts` gives the
        native size, uncut.
        """

    def encode_images(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor: ...
    def weights(self, name: str) -> AbstractContextManager[None]: ...
    def export(self, folder: Path, format: Format = "diffusers", about: Mapping[str, str] = NOTHING) -> Path: ...
    def restore(self, folder: Path) -> None: ...
    def to(self, device: torch.device) -> Self: ...
    def stage(self, phase: Phase, device: torch.device | None = None) -> Self:
        """Put what a phase of the work needs on ``device`` (the last one if not given), and nothing else.

        ``pictures`` are encoded by the VAE, ``texts`` by the text encoders, while the rest waits in the host's memory.
        ``train`` needs what is trained alone: what filled the cache leaves memory altogether. ``sample`` takes everything,
        read again if it has left.
        """

    def fingerprint(self) -> str: ...


class Weights:
    """The trainable weights of a model and named snapshots of them, swapped in for a while without a copy.

    ``parts`` are trained: the network first, and text encoders with adapters, whose weights have the part's name before
    theirs. ``read`` gives the adapters that training starts from.

    ``reference`` is the model before training: the adapter switched off, or a snapshot where there is none to switch off
    (full fine-tuning) or where training starts from an adapter. ``ema`` and other names are snapshots made by the loop.
    """

    def __init__(self, parts: Mapping[str, Any], spec: ModelSpec, read: Callable[[str], Adapters]) -> None:
        self.parts = dict(parts)  # models of diffusers and transformers: modules with adapters
        self.net = next(iter(self.parts.values()))
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.adapter = spec.lora is not None
        if spec.lora is None:
            self.net.float().requires_grad_(True)
        else:
            _add_lora(self.parts, spec.lora, read)
        if spec.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        if spec.lora is None or spec.lora.path is not None:
            self.take("reference")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name to parameter, in one fixed order."""
        named = {f"{name}." if part is not self.net else "": part for name, part in self.parts.items()}
        return {before + n: p for before, part in named.items() for n, p in part.named_parameters() if p.requires_grad}

    def take(self, name: str, source: str | None = None) -> None:
        """Copy the current weights, or those of another snapshot, under ``name``."""
        weights = self.snapshots[source] if source else self.trainable()
        self.snapshots[name] = {n: p.detach().clone() for n, p in weights.items()}

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run with the weights called ``name`` in place of the current ones."""
        if name not in self.snapshots:
            if name != "reference":
                raise ModelError(f"no weights called {name!r}", hint=f"known: reference, {', '.join(self.snapshots)}")
            self._switch_adapters(False)
            try:
                yield
            finally:
                self._switch_adapters(True)
            return
        self._swap(name)
        try:
            yield
        finally:
            self._swap(name)

    def merge(self) -> None:
        """Fold the adapter into the weights, in fp32 whatever their precision. After that there is nothing to train or
        to switch off.
        """
        from diffusers.utils import recurse_remove_peft_layers

        for part in self.parts.values():
            for layer in _adapted(part):
                base = layer.get_base_layer()
                dtype = base.weight.dtype
                base.float()
                layer.merge()
                base.to(dtype)
            recurse_remove_peft_layers(part)  # net.unload_lora() does this too, where a network has it
            del part.peft_config
            part.requires_grad_(False)
        self.snapshots.clear()

    def _switch_adapters(self, on: bool) -> None:
        for part in self.parts.values():
            for layer in _adapted(part):
                layer.enable_adapters(on)

    def _swap(self, name: str) -> None:
        snapshot = self.snapshots[name]
        for n, p in self.trainable().items():
            p.data, snapshot[n] = snapshot[n].to(p.device), p.data
        torch.clear_autocast_cache()  # it knows casts by their parameter, whose values have just changed


def _adapted(net: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


def _add_lora(parts: Mapping[str, Any], spec: LoRA, read: Callable[[str], Adapters]) -> None:
    """To each part the adapter that is there to start from, or a new one."""
    from peft import LoraConfig, inject_adapter_in_model

    try:
        given = read(spec.path) if spec.path else {}
        for name, part in parts.items():
            layers = CLIP_LAYERS if name.startswith("text_encoder") else spec.target_modules
            part.requires_grad_(False)
            if name in given:
                add_adapter(part, given[name], str(spec.path))
            else:
                config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha or spec.rank, target_modules=layers, lora_dropout=0.0)
                inject_adapter_in_model(config, part)
    except (ValueError, OSError, KeyError, RuntimeError) as e:
        where = "model.lora.path" if spec.path else "model.lora.target_modules"
        raise ModelError(f"{where}: cannot add the adapter: {' '.join(str(e).split())[:300]}") from e
    for part in parts.values():
        for name, p in part.named_parameters():
            if "lora_" in name:
                p.requires_grad_(True)
                p.data = p.data.float()  # updates of a half-precision adapter are lost to rounding
        if not any(p.requires_grad for p in part.parameters()):
            raise ModelError(f"model.lora: nothing in the model matches target_modules {spec.target_modules}")


def check_finite(net: nn.Module, where: str) -> None:
    """Refuse weights that are NaN or infinite before anything is computed from them. Those on meta have no values."""
    for name, p in net.named_parameters():
        if not p.is_meta and not torch.isfinite(p).all():
            raise ModelError(f"{where}: the weight {name} is not finite", hint="the file is damaged; fetch it again")


def fingerprint(modules: dict[str, nn.Module], settings: object) -> str:
    """Hash of weights, names and settings: what a cache of these modules' outputs depends on."""
    digest = hashlib.sha256(repr(settings).encode())
    for key, module in sorted(modules.items()):
        digest.update(key.encode())
        for name, p in sorted(module.state_dict().items()):
            digest.update(name.encode() + str(p.dtype).encode())
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
