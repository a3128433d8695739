"""Guidance away from an adapter, in stock pipelines of diffusers and where we sample ourselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffalign.models.base import Cond, Model


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


@contextmanager
def guided_away(model: Model) -> Iterator[None]:
    """The same for our own model: within it, guided predictions start from what the trained weights say without a prompt.

    Raises:
        ValueError: a prediction without guidance is asked for.
    """
    sampled: Any = model
    plain = model.predict

    def predict(x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor:
        if guidance == 1.0:
            raise ValueError("guided_away needs guidance: sample with guidance_scale above 1")
        none = model.encode_prompts([None])[[0] * len(cond)] if negative is None else negative
        away = plain(x, t, none if cond.frame is None else model.sized(none, cond.frame))
        with model.weights("reference"):
            there = plain(x, t, cond)
        return away + guidance * (there - away)

    sampled.predict = predict
    try:
        yield
    finally:
        sampled.predict = plain
