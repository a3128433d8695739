"""Stable Diffusion 1.x and 2.x: a UNet with epsilon- or v-prediction, one CLIP text encoder, a KL autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.base import Cond, ModelSpec, Weights, check_finite, fingerprint
from diffalign.path import Coeffs, Kind

PIPELINES = ("StableDiffusionPipeline",)


class StableDiffusion:
    """See :class:`diffalign.models.base.Model`. Latents are posterior means times the scaling factor."""

    family = "stable-diffusion"

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        self.path = spec.path
        self.pipeline = pipeline
        self.net = pipeline.unet
        self.scheduler = pipeline.scheduler
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"{spec.path}: prediction type {kind!r} is not supported", hint="epsilon, v_prediction, sample")
        self.kind: Kind = kind
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (pipeline.unet.config.in_channels, height, width)
        self.resolution = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        pipeline.set_progress_bar_config(disable=True)
        for module in (pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval().float()  # the VAE of SD overflows in fp16
        check_finite(self.net, f"{spec.path}/unet")
        check_finite(pipeline.vae, f"{spec.path}/vae")
        check_finite(pipeline.text_encoder, f"{spec.path}/text_encoder")
        self.named_weights = Weights(self.net, spec, self._load_lora)
        self.lora = spec.lora
        abar = self.scheduler.alphas_cumprod.double()
        self._alpha, self._sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        self._empty: Cond | None = None
        self.truncated_prompts = 0

    @classmethod
    def load(cls, folder: Path, spec: ModelSpec) -> Self:
        """From a folder in the diffusers layout."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            variant=spec.variant,
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
        return cls(pipeline, spec)

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.vae.parameters()).device

    def to(self, device: torch.device) -> Self:
        self.pipeline.to(device)
        self._alpha, self._sigma, self._empty = self._alpha.to(device), self._sigma.to(device), None
        return self

    def timestep(self, u: Tensor) -> Tensor:
        """Fractions of the schedule in [0, 1) to integer timesteps."""
        return (u.double() * len(self._alpha)).long().to(self.device)

    def coeffs(self, t: Tensor) -> Coeffs:
        return Coeffs(self._alpha[t], self._sigma[t])

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """(B, L, D) last hidden states; prompts beyond the encoder's length are cut and counted."""
        tok = self.pipeline.tokenizer
        long = tok(list(prompts), truncation=False, verbose=False).input_ids
        self.truncated_prompts += sum(len(ids) > tok.model_max_length for ids in long)
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return Cond(embeds)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to latents."""
        vae = self.pipeline.vae
        return vae.encode(pixels.to(self.device) * 2 - 1).latent_dist.mean * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to (B, 3, H, W) in [0, 1]."""
        vae = self.pipeline.vae
        out = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (out / 2 + 0.5).clamp(0, 1)

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor:
        """Native prediction at x_t; with ``guidance`` above 1 extrapolated from the negative (or empty) prompt."""
        if guidance == 1.0:
            return self.net(x, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]
        if negative is None:
            self._empty = self._empty or self.encode_prompts([""])
            negative = self._empty[[0] * len(cond)]
        both = Cond.cat([negative, cond])
        out = self.net(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=both.embeds, return_dict=False)[0]
        low, high = out.chunk(2)
        return low + guidance * (high - low)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.use(name)

    def fingerprint(self) -> str:
        """Of the parts whose outputs are cached."""
        return fingerprint({"vae": self.pipeline.vae, "text_encoder": self.pipeline.text_encoder})

    def export(self, folder: Path) -> list[Path]:
        """Write what was trained so that stock diffusers loads it: an adapter, or the whole pipeline."""
        if self.lora is None:
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            return [folder / "model_index.json"]
        from peft import get_peft_model_state_dict

        self.pipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(self.net),
            unet_lora_adapter_metadata=self.net.peft_config["default"].to_dict(),
        )
        return [folder / "pytorch_lora_weights.safetensors"]

    def restore(self, folder: Path) -> None:
        """Put what :meth:`export` wrote into the current weights; the reference stays."""
        from peft import set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            if self.lora is None:
                state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
                self.named_weights.net.load_state_dict(state)
            else:
                state = load_file(folder / "pytorch_lora_weights.safetensors")
                state = {k.removeprefix("unet."): v for k, v in state.items()}
                set_peft_model_state_dict(self.named_weights.net, state)
        except (OSError, SafetensorError, RuntimeError) as e:
            raise ModelError(f"{folder}: cannot load the trained weights: {' '.join(str(e).split())[:300]}") from e

    def _load_lora(self, path: str) -> None:
        self.pipeline.load_lora_weights(path, adapter_name="default")
