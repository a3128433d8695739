"""The judge's eyes as an object detector: what GenEval's logic asks of a picture and of a caption."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffalign.shapes.judge import Images, as_array, see
from diffalign.shapes.render import EXTENT, SIDE
from diffalign.shapes.scene import SHAPES, Scene, parse_caption


class Found(NamedTuple):
    """One object: ``box`` (left, top, right, bottom) in pixels; ``confidence`` is the overlap with its ideal shape."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float
    colour: str | None


def detect(images: Images) -> list[list[Found]]:
    """The objects of each picture that have a colour and a shape; boxes are those of the ideal shape of the same area."""
    size = as_array(images).shape[1]
    return [[_found(b, size / SIDE) for b in sight.blobs if b.shape and b.colour] for sight in see(images)]


def _found(blob: Any, unit: float) -> Found:
    side, up, down = EXTENT[SHAPES.index(blob.shape)] * np.sqrt(blob.area / np.pi)
    box = (blob.cx - side, blob.cy - up, blob.cx + side, blob.cy + down)
    return Found(f"{blob.colour} {blob.shape}", tuple(float(x * unit) for x in box), blob.iou, blob.colour)  # type: ignore[arg-type]


def requirements(prompt: str | Scene) -> dict[str, Any]:
    """A caption as a row of GenEval's metadata: its objects and relation; GenEval knows no background.

    The class is colour and shape together: GenEval looks at the surest object of a class, which of two circles may be the
    wrong one.
    """
    scene = prompt if isinstance(prompt, Scene) else parse_caption(prompt)
    rows: list[dict[str, Any]] = [{"class": str(t), "count": 1} for t in scene.things]
    if scene.relation is not None:  # GenEval places the later object by the earlier one
        rows = rows[::-1]
        rows[1]["position"] = [scene.relation, 0]
    return {"tag": "shapes", "include": rows}
