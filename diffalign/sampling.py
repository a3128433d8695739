"""Images from a model: every item (prompt, k) has its own seed, whatever batch or process it falls into."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.models import Model
from diffalign.spec import Spec


class Sampler(Spec):
    """How images are sampled; the solver is the model's own stock scheduler."""

    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """1 samples the conditional model itself; above 1, classifier-free guidance."""
    batch_size: int = Field(default=64, ge=1)


@dataclass(frozen=True)
class Item:
    """One image to make: the k-th of a prompt."""

    prompt: Prompt
    k: int


def item_seed(seed: int, prompt_id: str, k: int) -> int:
    """63 bits from (seed, prompt, k): the seed belongs to the item, never to the process."""
    digest = hashlib.sha256(f"{seed}|{prompt_id}|{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generators(items: Sequence[Item], seed: int) -> list[torch.Generator]:
    """One CPU generator per item."""
    return [torch.Generator().manual_seed(item_seed(seed, item.prompt.id, item.k)) for item in items]


@torch.no_grad()
def sample(model: Model, items: Sequence[Item], settings: Sampler, seed: int) -> Tensor:
    """One batch of images, (B, 3, H, W) uint8 on the CPU."""
    scheduler = model.solver(settings.num_inference_steps)
    draws = generators(items, seed)
    x = torch.stack([torch.randn(model.latent_shape, generator=g) for g in draws])
    cond = model.encode_prompts([item.prompt.text for item in items])
    device = cond.embeds.device
    x = x.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)  # flow schedulers scale nothing
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    negative = None
    if settings.guidance_scale > 1 and any(item.prompt.negative for item in items):
        negative = model.encode_prompts([item.prompt.negative or None for item in items])
    # stochastic schedulers draw from the items' own generators
    extra = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        times = t.to(device).expand(len(x))
        out = model.predict(scale(x, t), times, cond, settings.guidance_scale, negative)
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
    return to_uint8(model.decode(x)).cpu()


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    settings: Sampler,
    *,
    per_prompt: int = 1,
    seed: int = 0,
    on_batch: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Images of every prompt, (P, K, 3, H, W) uint8; ``on_batch`` hears how many were just made."""
    items = [Item(p, k) for p in prompts for k in range(per_prompt)]
    parts = []
    for start in range(0, len(items), settings.batch_size):
        batch = items[start : start + settings.batch_size]
        parts.append(sample(model, batch, settings, seed))
        on_batch(len(batch))
    out = torch.cat(parts)
    return out.view(len(prompts), per_prompt, *out.shape[1:])
