"""Is this the scorer that was published? Digests, constants and a self-test of the weights at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from diffalign.scorers.base import Card, Reward, ScoreInput, Scorer
from diffalign.scorers.weights import choose, digest_of


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``ok`` is None where there was nothing to compare with."""

    what: str
    ok: bool | None
    said: str


def check_files(card: Card, paths: Sequence[Path]) -> list[Check]:
    """The digest of each file, against the published one where one is known."""
    out = []
    for weight, path in zip(card.weights, paths, strict=True):
        if not weight.files:
            out.append(Check(str(path), None, "a folder; no digest is published"))
            continue
        file = choose(path, *weight.files, "*.safetensors")
        known = weight.digest if file.name == weight.files[0] else None
        found = digest_of(file, known.partition(":")[0] if known else "sha256")
        same = None if known is None else found == known
        out.append(Check(str(file), same, f"{found}, not {known}" if same is False else found))
    return out


def check_scores(scorer: Scorer, card: Card) -> list[Check]:
    """Published constants of the weights, and scores of three pictures of noise: finite, the same alone as in a batch,
    with gradients where the card says so.
    """
    out = []
    if isinstance(scorer, Reward):
        for what, value in scorer.measure().items():
            published = card.published[what]
            out.append(Check(what, abs(value / published - 1) < 1e-3, f"{value:.4f}, published {published}"))
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).round()
    images = [Image.fromarray(x.byte().permute(1, 2, 0).numpy()) for x in pixels]
    prompts = ["a red circle", "a blue square left of a green cross", "noise"]
    subject = [images] if "references" in card.needs else None
    alone = [scorer(ScoreInput([i], [p], subject)).values for i, p in zip(images, prompts, strict=True)]
    together = scorer(ScoreInput(images, prompts, subject and subject * 3)).values
    for name, scores in together.items():
        out.append(Check(f"{name} of noise", bool(scores.isfinite().all()), f"{[round(x, 4) for x in scores.tolist()]}"))
        if card.name != "decomposed":  # whose values hang on the batch by definition
            off = (torch.cat([v[name] for v in alone]) - scores).abs().max().item()
            out.append(Check(f"{name} alone as in a batch", off < 1e-3 * (1 + scores.abs().max().item()), f"off by {off:.1e}"))
    if isinstance(scorer, Reward) and card.differentiable:
        x = (pixels / 255).to(scorer.encoder.device).requires_grad_()
        smooth = scorer.score_pixels(x, prompts)
        (slope,) = torch.autograd.grad(smooth.sum(), x)
        off = (smooth.detach().cpu() - together[scorer.name]).abs().max().item()
        out.append(Check("gradient", bool(slope.isfinite().all() and slope.any()), f"norm {slope.norm().item():.2e}"))
        out.append(Check("differentiable path", None, f"off the exact one by {off:.1e}"))
    return out
