"""PixArt-alpha and -sigma (Chen et al. 2023, 2024): a DiT with epsilon-prediction that reads a T5 through a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.models import lora
from diffalign.models.base import Cond, ModelSpec
from diffalign.models.paths import NoisePrediction


class PixArt(NoisePrediction):
    """See :class:`diffalign.models.base.Model`.

    Prompts are lower-cased, never cleaned further: the stock pipeline's ``clean_caption`` depends on what is installed.
    Stock diffusers loads no LoRA for PixArt, so an adapter is written as PEFT does:
    ``PeftModel.from_pretrained(pipe.transformer, folder)``.
    """

    family = "pixart"
    encoders = ("text_encoder",)
    t5 = "tokenizer"
    text_setting = "max_sequence_length"
    lora_file = "adapter_model.safetensors"
    lora_prefix = lora.PEFT

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        super().__init__(pipeline, spec)
        self.told_size = self.net.use_additional_conditions

    def _encode(self, texts: list[str]) -> Cond:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_length
        )
        return Cond(embeds, mask, frame=self._native_frame(len(texts)))

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.told_size and cond.frame is not None:
            # the original size and the ratio that is trained at, as in the authors' InternalDataMS
            told = {"resolution": cond.frame[:, :2], "aspect_ratio": cond.frame[:, 4:5] / cond.frame[:, 5:]}
        out = self.net(
            x,
            timestep=t,
            encoder_hidden_states=cond.embeds,
            encoder_attention_mask=cond.mask,
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
        return out[:, : self.latent_shape[0]]  # the rest is a learned variance, which nothing here uses

    def _beside_lora(self, folder: Path) -> None:
        self.named_weights.net.peft_config["default"].save_pretrained(folder)
