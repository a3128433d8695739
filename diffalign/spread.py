"""What stored embeddings say of whole sets: distances between two of them, and how different the pictures of one are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign import distribution
from diffalign.data.embeddings import Embeddings
from diffalign.data.images import decode, sha256
from diffalign.data.scores import Scored
from diffalign.data.sources import open_source
from diffalign.data.tables import read_manifest, write_shard
from diffalign.errors import DataError
from diffalign.scorers.inception import NAME as INCEPTION

MOST = 5000
"""Pictures of a set that are compared: kernels and neighbours grow with the square."""

PART = 512
"""Pictures whose embeddings are written together."""


def embed(folder: Path, encoder: Callable[[Sequence[Image.Image]], Tensor], name: str, batch_size: int = 32) -> int:
    """Keep what ``encoder`` sees of the pictures of a scored folder beside their scores; returns how many it looked at.

    The pictures are read again from where they were scored. Those that have an embedding of that name, and those that
    cannot be read, are passed over.

    Raises:
        DataError: the folder holds no scores, or its pictures are gone.
    """
    plans = (read_manifest(folder) or {}).get("scores")
    if not plans:
        raise DataError(f"{folder} holds no scores", hint="`diffalign score` makes them")
    known, looked = Embeddings(folder), set[str]()
    rows = open_source(plans[0]["path"], plans[0]["image_root"]).rows()
    while part := list(islice(rows, PART)):
        images: dict[str, Image.Image] = {}
        vectors: list[dict[str, Any]] = []

        def look(images: dict[str, Image.Image] = images, vectors: list[dict[str, Any]] = vectors) -> None:
            seen = encoder(list(images.values())).numpy() if images else ()
            vectors += [{"image_sha256": k, "encoder": name, "vector": v} for k, v in zip(images, seen, strict=True)]
            looked.update(images)
            images.clear()

        for row in part:
            try:
                data = row.open()
                if (key := sha256(data)) not in looked and key not in images and (key, name) not in known:
                    images[key] = decode(data, row.id)
            except (DataError, OSError):
                continue
            if len(images) == batch_size:
                look()
        look()
        if vectors:
            write_shard(folder, "embeddings", len(list((folder / "embeddings").glob("[0-9]*.parquet"))), vectors)
    return len(looked)


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

    Of that encoder's features: a Frechet distance is called FID where they are Inception's, and nowhere else.
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


def distances_line(encoder: str, d: dict[str, Any]) -> str:
    """For people."""
    is_fid = encoder == INCEPTION
    out = f"{'Inception' if is_fid else f'embeddings {encoder[:12]}'} of {d['n'][0]} and {d['n'][1]} pictures: "
    out += f"{'FID' if is_fid else 'Frechet distance'} {d['frechet']:.4g}, KID {d['kid']:.4g}, "
    return out + f"CMMD {d['cmmd']:.4g}, precision {d['precision']:.3f}, recall {d['recall']:.3f}"


def diversity_line(said: dict[str, Any]) -> str:
    """For people."""
    within = "" if said["within_prompt"] is None else f", within prompts {said['within_prompt']:.3f}"
    return f"Vendi {said['vendi']:.2f} of {said['n']}, dissimilarity {said['dissimilarity']:.3f}{within}"
