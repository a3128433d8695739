"""GenEval's logic: are the objects that a prompt lists there, as many, of that colour, in that place? Detector pluggable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require

CONFIDENCE, COUNTING_CONFIDENCE, MOST = 0.3, 0.9, 16
POSITION = 0.1
"""Share of both objects' size that their offset must exceed to count as an offset."""


class Detection(Protocol):
    """One object found: ``box`` (left, top, right, bottom) in pixels, ``colour`` None where none was named."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float
    colour: str | None


Detector = Callable[[Sequence[Image.Image]], Sequence[Sequence[Detection]]]


def relations(a: Detection, b: Detection) -> set[str]:
    """Where ``a`` stands as seen from ``b``: left of, right of, above, below; up to two, or none where they overlap."""
    boxes = np.array([a.box, b.box], dtype=float).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    size = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - POSITION * size, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def evaluate(found: Sequence[Detection], row: Mapping[str, Any]) -> tuple[bool, float]:
    """(strict, soft) of the detections in one picture against a row of GenEval's metadata.

    Strict is GenEval's own: every requirement of ``include`` holds for the most confident objects, none of ``exclude``.
    Soft is the mean over what is asked of ``include``: 1 - |asked - found| / asked of counts and of colours, and whether
    the position holds (Flow-GRPO's reward).
    """
    least = COUNTING_CONFIDENCE if row.get("tag") == "counting" else CONFIDENCE
    sure = sorted((d for d in found if d.confidence > least), key=lambda d: -d.confidence)

    def of(name: str) -> list[Detection]:
        return [d for d in sure if d.name == name][:MOST]

    strict, soft = True, list[float]()
    matched: list[list[Detection]] = []
    for asked in row.get("include", ()):
        name, count = asked["class"], asked["count"]
        there, chosen = of(name), of(name)[:count]
        holds = len(chosen) == count
        soft.append(max(0.0, 1 - abs(count - len(there)) / count))
        if "color" in asked:
            painted = sum(d.colour == asked["color"] for d in chosen)
            holds = holds and painted >= count
            soft.append(max(0.0, 1 - abs(count - painted) / count))
        if "position" in asked:
            relation, of_which = asked["position"]
            target = matched[of_which]
            placed = bool(chosen) and bool(target) and all(relation in relations(d, t) for d in chosen for t in target)
            holds = holds and placed
            soft.append(float(placed))
        strict = strict and holds
        matched.append(chosen if holds else [])
    strict = strict and not any(len(of(r["class"])) >= r["count"] for r in row.get("exclude", ()))
    return strict, sum(soft) / len(soft) if soft else float(strict)


class GenEval:
    """``geneval`` (all conditions, 0 or 1) and ``geneval_soft`` of pictures against rows of GenEval's metadata.

    Another detector than GenEval's Mask2Former gives other numbers: never call them GenEval without naming it. The
    benchmark's overall figure is the mean of its six tasks, not of its images.
    """

    card: ClassVar[Card] = Card(
        name="geneval",
        summary="objects, counts, colours and positions of a row of metadata, by any detector",
        unit="share of pictures (strict) or of conditions (soft); 0 to 1",
        citation="Ghosh et al. 2023, arXiv 2310.11513",
        licence="MIT (the logic); of the detector",
        needs=frozenset({"images", "metadata"}),
        across_prompts=True,
        plugin="f(images) -> for each image a list of objects with name, box, confidence and colour",
    )

    def __init__(self, detector: Detector, row_of: Callable[[str], Mapping[str, Any]] | None = None) -> None:
        """``row_of`` makes the metadata from the prompt where prompts say it all."""
        self.detector, self.row_of = detector, row_of

    @property
    def name(self) -> str:
        return self.card.name

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        if batch.metadata is None and self.row_of is not None:
            batch = ScoreInput(batch.images, batch.prompts, metadata=[{}] * len(batch))
        require(self.card, batch)
        rows = [self._row(prompt, said) for prompt, said in zip(batch.prompts, batch.metadata or (), strict=True)]
        seen = self.detector(batch.images)
        none = (torch.nan, torch.nan)
        verdicts = [none if row is None else evaluate(found, row) for found, row in zip(seen, rows, strict=True)]
        strict, soft = torch.tensor(verdicts, dtype=torch.float32).view(-1, 2).T
        errors = ["nothing says what must be there: no include" if row is None else None for row in rows]
        return ScoreBatch({"geneval": strict, "geneval_soft": soft}, errors)

    def _row(self, prompt: str, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if said.get("include"):
            return said
        return self.row_of(prompt) if self.row_of is not None else None
