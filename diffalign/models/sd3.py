"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): an MMDiT on a flow path, two CLIP text encoders and, if present, a T5."""

from __future__ import annotations

from torch import Tensor

from diffalign.models.base import Cond
from diffalign.models.paths import FlowMatching


class SD3(FlowMatching):
    """See :class:`diffalign.models.base.Model`.

    Without its T5 the model gets no token in the T5's place. The stock pipeline puts ``max_sequence_length`` zeros there,
    256 if not told, which the transformer attends to: call it with ``max_sequence_length=0`` for the same images, or set
    ``model.max_sequence_length`` to what it will be called with.
    """

    family = "sd3"
    tested = "trained weights: the built-in shapes-dit"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    t5 = "tokenizer_3"
    text_setting = "max_sequence_length"

    @property
    def text_length(self) -> int:
        if self.pipeline.text_encoder_3 is None and self.spec.max_sequence_length is None:
            return 0
        return super().text_length

    def _encode(self, texts: list[str]) -> Cond:
        """(B, 77 + L, D): both CLIPs side by side, then the T5; their pooled projections side by side."""
        pipe = self.pipeline
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, texts, texts, self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return Cond(embeds, pooled=pooled)

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x, timestep=t, encoder_hidden_states=cond.embeds, pooled_projections=cond.pooled, return_dict=False)[0]
