"""FLUX.1 dev and schnell: a transformer over packed latents on a flow path, a T5 for the words and a CLIP for the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.errors import ModelError
from diffalign.models.base import Cond, ModelSpec
from diffalign.models.paths import FlowMatching


class Flux(FlowMatching):
    """See :class:`diffalign.models.base.Model`. Latents are (B, C, H, W) everywhere but inside :meth:`_forward`.

    dev is distilled from a guided model and is told the guidance as a number: 1 in training, for policy and reference
    alike, ``guidance_scale`` when sampling. schnell is guided by two passes, as the other families are.
    """

    family = "flux"
    encoders = ("text_encoder", "text_encoder_2")
    t5 = "tokenizer_2"
    text_setting = "max_sequence_length"

    def __init__(self, pipeline: Any, spec: ModelSpec) -> None:
        super().__init__(pipeline, spec)
        self.distilled = self.net.config.guidance_embeds
        self.takes_negative = not self.distilled

    def _patch(self) -> int:
        return 2  # by the pipeline, before the network, whose own is 1

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.pipeline.vae.config.sample_size // self.pipeline.vae_scale_factor
        return self.net.config.in_channels // self.patch**2, side, side

    def _sigmas(self, steps: int) -> Any:
        from numpy import linspace

        return linspace(1.0, 1 / steps, steps)

    def _encode(self, texts: list[str]) -> Cond:
        pipe = self.pipeline
        embeds, pooled, _ = pipe.encode_prompt(texts, device=self.device, max_sequence_length=self.text_length)
        return Cond(embeds, pooled=pooled)

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor:
        """See :meth:`PipelineModel.predict`.

        Raises:
            ModelError: a negative prompt for a model that has no pass to give it to.
        """
        if not self.distilled:
            return super().predict(x, t, cond, guidance, negative)
        if negative is not None:
            raise ModelError(f"{self.path} takes no negative prompt: its guidance is distilled", hint="drop negative prompts")
        return self._call(x, t, cond, guidance=guidance)

    def _forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        height, width = (side // self.patch for side in x.shape[-2:])
        places = [torch.arange(n, dtype=torch.float32, device=x.device) for n in (1, height, width)]
        out = self.net(
            pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2),
            timestep=t / self.steps,
            guidance=torch.full((len(x),), guidance, device=x.device) if self.distilled else None,
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            txt_ids=torch.zeros(cond.embeds.shape[1], 3, device=x.device),
            img_ids=torch.cartesian_prod(*places),
            return_dict=False,
        )[0]
        return pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), self.patch)
