"""What stored embeddings say of whole sets: distances between two of them, and how different the pictures of one are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import distribution
from diffalign.data.embeddings import Embeddings
from diffalign.data.scores import Scored

MOST = 5000
"""Pictures of a set that are compared: kernels and neighbours grow with the square."""


def _vectors(stored: Embeddings, encoder: str, rows: Sequence[Scored]) -> tuple[Tensor, list[str]]:
    """(N, D) of the distinct pictures that the encoder saw, at most MOST of them drawn evenly, and their prompts."""
    seen = {r.sha256: r.prompt or "" for r in rows if r.sha256 is not None and (r.sha256, encoder) in stored}
    known = list(seen.items())
    step = max(1, -(-len(known) // MOST))
    known = known[::step]
    return torch.from_numpy(stored.get([(str(sha), encoder) for sha, _ in known])), [prompt for _, prompt in known]


def diversity(folder: Path, rows: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """By encoder: Vendi score and dissimilarity (1 - mean cosine) of all pictures, and the latter within prompts."""
    stored = Embeddings(folder)
    out = {}
    for encoder, count in stored.encoders().items():
        if count < 2:
            continue
        x, prompts = _vectors(stored, encoder, rows)
        if len(x) < 2:
            continue
        groups: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[prompt].append(i)
        within = [distribution.dissimilarity(x[g]) for g in groups.values() if len(g) > 1]
        out[encoder] = {
            "n": len(x), "vendi": distribution.vendi(x), "dissimilarity": distribution.dissimilarity(x),
            "within_prompt": sum(within) / len(within) if within else None,
        }  # fmt: skip
    return out


def distances(a: Path, b: Path, left: Sequence[Scored], right: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """By encoder that saw both sets: Frechet distance, KID, CMMD, precision and recall of B as seen from A.

    Of that encoder's features: a Frechet distance here is no FID, which is one of Inception's.
    """
    one, other = Embeddings(a), Embeddings(b)
    out = {}
    for encoder in one.encoders().keys() & other.encoders().keys():
        x, y = _vectors(one, encoder, left)[0], _vectors(other, encoder, right)[0]
        if min(len(x), len(y)) < 5:  # neighbours and covariances of fewer say nothing
            continue
        precision, recall = distribution.precision_recall(x, y)
        out[encoder] = {
            "n": [len(x), len(y)], "frechet": distribution.fid(x, y), "kid": distribution.kid(x, y),
            "cmmd": distribution.cmmd(x, y), "precision": precision, "recall": recall,
        }  # fmt: skip
    return out


def diversity_line(said: dict[str, Any]) -> str:
    """For people."""
    within = "" if said["within_prompt"] is None else f", within prompts {said['within_prompt']:.3f}"
    return f"Vendi {said['vendi']:.2f} of {said['n']}, dissimilarity {said['dissimilarity']:.3f}{within}"
