"""What every model family offers, and the weight handling that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.path import Coeffs, Kind
from diffalign.spec import Spec


@dataclass(frozen=True)
class Cond:
    """Encoded prompts: every tensor has the batch first."""

    embeds: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, *args: Any) -> Self:
        return type(self)(**{f.name: getattr(self, f.name).to(*args) for f in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


class LoRA(Spec):
    """A low-rank adapter (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; the rank itself if not given."""
    target_modules: list[str] = Field(default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Names of the layers to adapt, as suffixes of their full names."""
    path: str | None = None
    """An existing adapter to start from, a file or a folder as diffusers saves it; it is the reference too."""


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
    """Native (height, width) in pixels."""
    named_weights: Weights
    truncated_prompts: int

    def timestep(self, u: Tensor) -> Tensor: ...
    def coeffs(self, t: Tensor) -> Coeffs: ...
    def encode_prompts(self, prompts: Sequence[str]) -> Cond: ...
    def encode_images(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor: ...
    def weights(self, name: str) -> AbstractContextManager[None]: ...
    def export(self, folder: Path) -> list[Path]: ...
    def restore(self, folder: Path) -> None: ...
    def to(self, device: torch.device) -> Self: ...
    def fingerprint(self) -> str: ...


class Weights:
    """The trainable weights of a network and named snapshots of them, swapped in for a while without a copy.

    ``reference`` is the model before training: the adapter switched off, or a snapshot where there is none to switch off
    (full fine-tuning) or where training starts from an adapter. ``ema`` and other names are snapshots made by the loop.
    """

    def __init__(self, net: Any, spec: ModelSpec, load_lora: Any = None) -> None:
        self.net = net  # a diffusers model: a module with adapters
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.adapter = spec.lora is not None
        if spec.lora is None:
            net.float().requires_grad_(True)
        else:
            net.requires_grad_(False)
            _add_lora(net, spec.lora, load_lora)
        if spec.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        if spec.lora is None or spec.lora.path is not None:
            self.take("reference")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name to parameter, in one fixed order."""
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

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
            self.net.disable_adapters()
            try:
                yield
            finally:
                self.net.enable_adapters()
            return
        self._swap(name)
        try:
            yield
        finally:
            self._swap(name)

    def _swap(self, name: str) -> None:
        snapshot = self.snapshots[name]
        for n, p in self.trainable().items():
            p.data, snapshot[n] = snapshot[n].to(p.device), p.data


def _add_lora(net: Any, spec: LoRA, load_lora: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha or spec.rank, target_modules=spec.target_modules, lora_dropout=0.0)
    try:
        if spec.path is None:
            net.add_adapter(config)
        else:
            load_lora(spec.path)
    except (ValueError, OSError, KeyError, RuntimeError) as e:
        where = "model.lora.path" if spec.path else "model.lora.target_modules"
        raise ModelError(f"{where}: cannot add the adapter: {' '.join(str(e).split())[:300]}") from e
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.requires_grad_(True)
            p.data = p.data.float()  # updates of a half-precision adapter are lost to rounding
    if not any(p.requires_grad for p in net.parameters()):
        raise ModelError(f"model.lora: nothing in the model matches target_modules {spec.target_modules}")


def check_finite(net: nn.Module, where: str) -> None:
    """Refuse weights that are NaN or infinite before anything is computed from them."""
    for name, p in net.named_parameters():
        if not torch.isfinite(p).all():
            raise ModelError(f"{where}: the weight {name} is not finite", hint="the file is damaged; fetch it again")


def fingerprint(modules: dict[str, nn.Module]) -> str:
    """Hash of weights and names: what a cache of these modules' outputs depends on."""
    digest = hashlib.sha256()
    for key, module in sorted(modules.items()):
        digest.update(key.encode())
        for name, p in sorted(module.state_dict().items()):
            digest.update(name.encode() + str(p.dtype).encode())
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
