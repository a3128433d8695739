"""Stable Diffusion XL (Podell et al. 2023): a UNet that is also told the picture's size, and two CLIP text encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, cat, tensor

from diffalign.errors import ModelError
from diffalign.models.base import Cond, ModelSpec
from diffalign.models.clip import Chunks
from diffalign.models.paths import NoisePrediction


class SDXL(NoisePrediction):
    """See :class:`diffalign.models.base.Model`. The frame is SDXL's ``time_ids``."""

    family = "sdxl"
    net_name = "unet"
    lora_prefix = "unet."
    encoders = ("text_encoder", "text_encoder_2")
    text_setting = "long_prompts"
    adapts_texts = True
    load_options = {"add_watermarker": False}  # it would mark exported samples, and our own sampling has none

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        super().__init__(pipeline, spec)
        if self.trains_texts:  # the first encoder's last layer is not read: an adapter there would get no gradient
            from diffusers.utils import recurse_remove_peft_layers

            named = pipeline.text_encoder.named_modules()
            recurse_remove_peft_layers(next(m for n, m in named if n.endswith("encoder.layers"))[-1])

    @classmethod
    def load(cls, folder: Path, spec: ModelSpec) -> Self:
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("requires_aesthetics_score") or index.get("text_encoder", [None])[0] is None:
            raise ModelError(f"{spec.path} is SDXL's refiner, which finishes the base's images", hint="train the base model")
        return super().load(folder, spec)

    def encode_prompts(self, prompts: Sequence[str | None]) -> Cond:
        """See :meth:`PipelineModel.encode_prompts`. No prompt is zeros where the pipeline says so, not an empty prompt."""
        cond = super().encode_prompts(prompts)
        if None not in prompts or not self.pipeline.config.force_zeros_for_empty_prompt or cond.pooled is None:
            return cond
        absent = tensor([p is None for p in prompts], device=cond.embeds.device)
        embeds = cond.embeds.masked_fill(absent[:, None, None], 0)
        return replace(cond, embeds=embeds, pooled=cond.pooled.masked_fill(absent[:, None], 0))

    def _encode(self, texts: list[str]) -> Cond:
        """The last hidden states but one of both encoders, side by side; the second's projection as the pooled vector."""
        pipe, frame = self.pipeline, self._native_frame(len(texts))
        if self.spec.long_prompts == "truncate":
            embeds, _, pooled, _ = pipe.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
            return Cond(embeds, pooled=pooled, frame=frame)
        embeds, mask, pooled = zip(*(self._read(n, texts) for n in ("", "_2")), strict=True)
        if not mask[0].equal(mask[1]):
            raise ModelError(f"{self.path}: its two tokenizers cut prompts differently", hint="model.long_prompts=truncate")
        return Cond(cat(embeds, -1), mask[0], pooled[1], frame)

    def _read(self, which: str, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        encoder: Any = getattr(self.pipeline, f"text_encoder{which}")
        chunks = Chunks(getattr(self.pipeline, f"tokenizer{which}"), texts)
        out = encoder(chunks.ids.to(self.device), output_hidden_states=True)
        return *chunks.join(out.hidden_states[-2]), chunks.first(out[0])

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {"text_embeds": cond.pooled, "time_ids": cond.frame}
        return self.net(
            x,
            t,
            encoder_hidden_states=cond.embeds,
            encoder_attention_mask=cond.mask,
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
