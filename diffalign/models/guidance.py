"""Guidance away from an adapter, in stock pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def guide_away(pipeline: Any) -> Any:
    """Let the loaded adapter see the unconditional half of classifier-free guidance alone (Diffusion-NPO, ICLR 2025).

    eps = eps_adapter(none) + w (eps(prompt) - eps_adapter(none)). ``pipeline`` is a stock one with an adapter that was trained
    on swapped labels, and asks its network for both halves in one batch, the unconditional first; it is changed and returned.

    Raises:
        ValueError: the network is called without guidance.
    """
    net = getattr(pipeline, "unet", None) or pipeline.transformer
    plain = net.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        half, odd = divmod(len(sample), 2)
        if odd or not pipeline.do_classifier_free_guidance:
            raise ValueError("guide_away needs guidance: call the pipeline with guidance_scale above 1")

        def run(rows: slice) -> Tensor:
            x, a, k = tree_map_only(Tensor, lambda t: t[rows] if t.dim() and len(t) == 2 * half else t, (sample, args, kwargs))
            return plain(x, *a, **k)[0]

        net.enable_lora()
        away = run(slice(0, half))
        net.disable_lora()
        there = run(slice(half, None))
        net.enable_lora()
        return (torch.cat([away, there]),)

    net.forward = forward
    return pipeline
