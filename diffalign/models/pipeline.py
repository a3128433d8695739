"""What the families share: a stock pipeline, one of whose networks is trained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.models.attention import set_attention
from diffalign.models.base import NOTHING, Cond, Format, ModelSpec, Phase, Weights, check_finite, fingerprint
from diffalign.models.lora import FLAT, KOHYA_FILE, adapter_of, header_of, is_flat, read_adapter, to_kohya
from diffalign.models.quantize import quantizer
from diffalign.path import Kind

LARGE = 1024**2
"""Pixels above which the VAE takes less at a time."""
HOST = torch.device("cpu")


class PipelineModel:
    """See :class:`diffalign.models.base.Model`. Latents are posterior means, shifted and scaled as the VAE's config says.

    A family states the facts below, fills :meth:`_encode` and :meth:`_forward`, and takes its path from
    :class:`~diffalign.models.paths.NoisePrediction` or :class:`~diffalign.models.paths.FlowMatching`.
    """

    family: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]
    tested: ClassVar[str] = "tiny random weights of the stock classes"
    net_name: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]]
    """Names of the text encoders in the pipeline."""
    text_setting: ClassVar[str]
    """Which of the text settings of :class:`ModelSpec` applies: ``long_prompts`` or ``max_sequence_length``."""
    t5: ClassVar[str | None] = None
    """The tokenizer of the T5, if the family has one."""
    adapts_texts: ClassVar[bool] = False
    """Whether the text encoders may be adapted: ``lora.text_encoders``."""
    load_options: ClassVar[dict[str, Any]] = {}
    lora_file: ClassVar[str] = "pytorch_lora_weights.safetensors"
    lora_prefix: ClassVar[str] = "transformer."
    """Before the names of the weights in that file."""
    takes_negative: bool = True
    """See :class:`diffalign.models.base.Model`."""
    granularity: ClassVar[int] = 64
    """See :class:`diffalign.models.base.Model`; the step of every family's own training so far."""

    kind: Kind

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        self.path, self.spec, self.pipeline = spec.path, spec, pipeline
        self.net = getattr(pipeline, self.net_name)
        self.scheduler = pipeline.scheduler
        for name in {"long_prompts", "max_sequence_length"} - {self.text_setting}:
            if getattr(spec, name) != ModelSpec.model_fields[name].default:
                raise ModelError(f"model.{name} does not apply to {self.family}", hint=f"it has model.{self.text_setting}")
        wanted = spec.lora is not None and spec.lora.text_encoders
        if wanted and not self.adapts_texts:
            raise ModelError(f"model.lora.text_encoders does not apply to {self.family}", hint="only the network is adapted")
        self.trained = (self.net_name, *(self.encoders if wanted else ()))
        pipeline.set_progress_bar_config(disable=True)
        if spec.quantization == "none":  # what is quantised is finite
            check_finite(self.net, f"{spec.path}/{self.net_name}")
        for name, module in self._frozen().items():
            module.requires_grad_(False).eval()
            check_finite(module, f"{spec.path}/{name}")
        if spec.gradient_checkpointing:  # of use where a reward is differentiated through the decoder
            pipeline.vae.enable_gradient_checkpointing()
        self._device = next(pipeline.vae.parameters()).device
        self.patch = self._patch()
        channels, height, width = self._latent_shape()
        if spec.resolution is not None:
            height, width = self._latent_sides(spec.resolution)
        self.latent_shape = (channels, height, width)
        factor = pipeline.vae_scale_factor
        self.resolution = (height * factor, width * factor)
        if spec.attention is not None:
            set_attention(self.net, spec.attention)
        for name in self.trained[1:]:
            check_finite(getattr(pipeline, name), f"{spec.path}/{name}")
        parts = {name: getattr(pipeline, name) for name in self.trained}
        self.named_weights = Weights(parts, spec, lambda path: read_adapter(Path(path), pipeline, self.trained))
        if self.trains_texts:
            self.net = Together(parts)
        self.dtype = torch.float32 if spec.lora is None else getattr(torch, spec.dtype)
        self._empty: Cond | None = None
        self._fingerprint = ""

    @classmethod
    def load(cls, folder: Path, spec: ModelSpec) -> Self:
        """From a folder in the diffusers layout."""
        quantized = {} if spec.quantization == "none" else {"quantization_config": quantizer(spec, cls.net_name)}
        return cls(cls._open(folder, spec, **quantized), spec)

    @classmethod
    def _open(cls, folder: Path | str, spec: ModelSpec, **more: Any) -> Any:
        from diffusers import DiffusionPipeline

        dtypes = {"default": getattr(torch, spec.dtype), "vae": torch.float32}
        if spec.lora is None:
            dtypes[cls.net_name] = torch.float32
        # a pipeline saved without a part, such as SD3 without its T5, loads only if told so
        index = json.loads((Path(folder) / "model_index.json").read_text())
        absent = {name: None for name, part in index.items() if isinstance(part, list) and part[0] is None}
        options = {"variant": spec.variant, "dtype": dtypes, "local_files_only": True} | absent | cls.load_options
        return DiffusionPipeline.from_pretrained(folder, **options | more)

    # --- what a family says ------------------------------------------------------------------------------------------

    def _latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents at the native size."""
        size = self.net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.net.config.in_channels, height, width

    def _patch(self) -> int:
        """Side of the square of latents that is one image token."""
        return self.net.config.get("patch_size", 1)

    def _encode(self, texts: list[str]) -> Cond:
        raise NotImplementedError

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's prediction for (B, C, H, W), in its own dtype."""
        raise NotImplementedError

    def _latent_sides(self, asked: int | tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the latents of pictures of this side, or (height, width), in pixels."""
        factor, most = self.pipeline.vae_scale_factor, self.net.config.get("pos_embed_max_size")
        unit = factor * self.patch
        sides = (asked, asked) if isinstance(asked, int) else asked
        for side in sides:
            if side % unit:
                near = max(round(side / unit), 1) * unit
                raise ModelError(f"model.resolution: {side} pixels are not a multiple of {unit}", hint=f"such as {near}")
            if most is not None and side > most * unit:
                raise ModelError(
                    f"model.resolution: {self.path} knows no places beyond {most * unit} pixels", hint="choose less"
                )
        return sides[0] // factor, sides[1] // factor

    # --- shared ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device) -> Self:
        return self.stage("sample", device)

    def stage(self, phase: Phase, device: torch.device | None = None) -> Self:
        """See :meth:`diffalign.models.base.Model.stage`."""
        self._device, self._empty = device or self._device, None
        if phase == "train":
            self.fingerprint()  # while there is something to hash
            for part in self._frozen().values():
                part.to("meta")
        elif self.pipeline.vae.device.type == "meta":
            fresh = self._open(self.pipeline.name_or_path, self.spec, **dict.fromkeys(self.trained))
            self.pipeline.register_modules(**{n: getattr(fresh, n).requires_grad_(False).eval() for n in self._frozen()})
        needed = {"pictures": ("vae",), "texts": self.encoders, "train": (), "sample": ("vae", *self.encoders)}[phase]
        for name, part in self._frozen().items() if phase != "train" else ():
            _move(part, self._device if name in needed else HOST)
        for part in self.named_weights.parts.values():
            _move(part, self._device if phase in ("train", "sample") else HOST)
        return self

    def _frozen(self) -> dict[str, Any]:
        """The parts that are never trained, by name; a pipeline may come without one of its text encoders."""
        parts = {name: getattr(self.pipeline, name) for name in ("vae", *self.encoders) if name not in self.trained}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def text_length(self) -> int:
        """Tokens that the T5 reads."""
        if self.spec.max_sequence_length is not None:
            return self.spec.max_sequence_length
        stock: int = inspect.signature(self.pipeline.__call__).parameters["max_sequence_length"].default
        return stock

    @property
    def trains_texts(self) -> bool:
        return len(self.trained) > 1

    def truncated(self, prompts: Iterable[str]) -> int:
        """See :meth:`diffalign.models.base.Model.truncated`. Where there is a T5, it reads the most."""
        if self.spec.long_prompts == "chunk":
            return 0
        t5: Any = getattr(self.pipeline, self.t5) if self.t5 else None
        tokenizer = t5 or self.pipeline.tokenizer
        limit = self.text_length if t5 else tokenizer.model_max_length
        return sum(len(tokenizer(p, truncation=False, verbose=False).input_ids) > limit for p in prompts)

    def encode_prompts(self, prompts: Sequence[str | None]) -> Cond:
        """(B, L, D) embeddings and what else the family needs; what is beyond the encoder's length is cut."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_texts):
            return self._encode([p or "" for p in prompts])

    def sized(self, cond: Cond, frame: Tensor) -> Cond:
        """See :meth:`diffalign.models.base.Model.sized`."""
        return cond if cond.frame is None else replace(cond, frame=frame.to(cond.frame))

    def _native_frame(self, rows: int) -> Tensor:
        height, width = self.resolution
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device).repeat(rows, 1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to latents."""
        vae = self._vae(pixels.shape)
        mean = vae.encode(pixels.to(self.device) * 2 - 1).latent_dist.mean
        return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to (B, 3, H, W) in [0, 1], with their gradient if they have one."""
        factor = self.resolution[0] // self.latent_shape[1]
        vae = self._vae((*latents.shape[:2], *(factor * side for side in latents.shape[2:])))
        z = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def _vae(self, shape: Sequence[int]) -> Any:
        """The VAE, set for pictures of (B, 3, H, W): one at a time where together they are more than a square of 1024, and
        in tiles, which changes what they overlap on a little, where one alone is.
        """
        vae, (rows, _, height, width) = self.pipeline.vae, shape
        vae.use_slicing = rows * height * width > LARGE
        vae.use_tiling = height * width > LARGE
        return vae

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor:
        """Native prediction at x_t, fp32; with ``guidance`` above 1 extrapolated from the negative (or no) prompt."""
        if guidance == 1.0:
            return self._call(x, t, cond)
        if negative is None:
            if self._empty is None or self.trains_texts:  # whose weights are now others than before
                with torch.autocast(self.device.type, enabled=False):  # whoever asks first, all get the same
                    self._empty = self.encode_prompts([None])
            negative = self._empty[[0] * len(cond)]
        if cond.frame is not None:
            negative = self.sized(negative, cond.frame)
        low, high = self._call(torch.cat([x, x]), torch.cat([t, t]), Cond.cat([negative, cond])).chunk(2)
        return low + guidance * (high - low)

    def _call(self, x: Tensor, t: Tensor, cond: Cond, **more: Any) -> Tensor:
        cond = replace(cond.to(self.dtype), frame=cond.frame)  # bf16 would round sizes in pixels
        return self._forward(x.to(self.dtype), t, cond, **more).float()

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.use(name)

    def fingerprint(self) -> str:
        """Of the parts whose outputs are cached, and the settings that they depend on."""
        if not self._fingerprint:
            setting = self.text_length if self.text_setting == "max_sequence_length" else self.spec.long_prompts
            size = () if self.spec.resolution is None else self.resolution  # which some encodings carry
            self._fingerprint = fingerprint(self._frozen(), (type(self.pipeline).__name__, setting, *size))
        return self._fingerprint

    def export(self, folder: Path, format: Format = "diffusers", about: Mapping[str, str] = NOTHING) -> Path:
        """Write what was trained, and return its first file.

        ``diffusers`` is what stock diffusers loads: the adapter, or all weights as a whole pipeline. ``kohya`` is the
        adapter by the keys that ComfyUI and others read. ``merged`` is a whole pipeline in ``spec.dtype`` with the
        adapter folded in, after which this model cannot be trained. ``about`` goes into the header of an adapter.

        Raises:
            ModelError: kohya's keys without an adapter, or for a family that diffusers does not read them for.
        """
        if format == "kohya" and self.spec.lora is None:
            raise ModelError(f"{self.path}: all weights were trained; there is no adapter", hint="use format merged")
        if format == "merged" or self.spec.lora is None:
            if self.spec.lora is not None:
                self.named_weights.merge()
            if format == "merged":
                self.named_weights.net.to(getattr(torch, self.spec.dtype))
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            return folder / "model_index.json"
        from safetensors.torch import save_file

        parts = self.named_weights.parts
        folder.mkdir(parents=True, exist_ok=True)
        adapters = {name: adapter_of(part) for name, part in parts.items()}
        if format == "kohya":
            named, name = to_kohya(adapters, self.pipeline), KOHYA_FILE
            config = self.named_weights.net.peft_config["default"]  # by the names that tools for kohya's files show
            header = {"format": "pt", **about, "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
        else:
            named = {self._in_file(part) + n: w for part, (weights, _) in adapters.items() for n, w in weights.items()}
            name, header = self.lora_file, header_of(parts, about)
            self._beside_lora(folder)
        save_file({n: w.cpu().contiguous() for n, w in named.items()}, folder / name, header)
        return folder / name

    def restore(self, folder: Path) -> None:
        """Put what :meth:`export` wrote into the current weights; the reference stays.

        Raises:
            ModelError: no such files, or the weights of another model or of an adapter of other layers.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        net = self.named_weights.net
        try:
            if self.spec.lora is None:
                files = sorted((folder / self.net_name).glob("diffusion_pytorch_model*.safetensors"))  # large ones in shards
                if not files:
                    raise FileNotFoundError(f"no weights of the {self.net_name}")
                net.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
            else:
                state = load_file(folder / self.lora_file)
                for name, part in self.named_weights.parts.items():
                    before = self._in_file(name) + (FLAT if is_flat(part) else "")
                    mine = {k.removeprefix(before): v for k, v in state.items() if k.startswith(before)}
                    if odd := sorted(mine.keys() ^ get_peft_model_state_dict(part).keys()):  # peft would pass over them
                        raise RuntimeError(f"its adapter has other layers; the first that differs is {odd[0]}")
                    set_peft_model_state_dict(part, mine)
        except (OSError, SafetensorError, RuntimeError) as e:
            raise ModelError(f"{folder}: cannot load the trained weights: {' '.join(str(e).split())[:300]}") from e

    def _beside_lora(self, folder: Path) -> None:
        """What else the family's adapters need in their folder."""

    def _in_file(self, part: str) -> str:
        return self.lora_prefix if part == self.net_name else f"{part}."


class Together(nn.Module):
    """The network and what is trained with it, as the one module that accelerate is given: called, it is the network."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.net, *encoders = parts.values()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def _move(part: Any, device: torch.device) -> None:
    if part.device != device:  # fake weights, which an estimate runs on, cannot even be moved to where they are
        part.to(device)
