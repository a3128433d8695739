"""Stable Diffusion 1.x and 2.x: a UNet with epsilon- or v-prediction, one CLIP text encoder, a KL autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.models.base import Cond
from diffalign.models.clip import Chunks
from diffalign.models.paths import NoisePrediction


class StableDiffusion(NoisePrediction):
    """See :class:`diffalign.models.base.Model`."""

    family = "stable-diffusion"
    tested = "trained weights: the built-in shapes-unet"
    net_name = "unet"
    lora_prefix = "unet."
    encoders = ("text_encoder",)
    text_setting = "long_prompts"
    adapts_texts = True
    load_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def _encode(self, texts: list[str]) -> Cond:
        """Last hidden states."""
        pipe: Any = self.pipeline
        if self.spec.long_prompts == "chunk":
            chunks = Chunks(pipe.tokenizer, texts)
            return Cond(*chunks.join(pipe.text_encoder(chunks.ids.to(self.device))[0]))
        return Cond(pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)[0])

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {"encoder_hidden_states": cond.embeds, "encoder_attention_mask": cond.mask}
        return self.net(x, t, **told, return_dict=False)[0]
