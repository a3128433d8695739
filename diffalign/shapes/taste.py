"""Taste: what captions leave open and a rater may still prefer. Every kind is 0 to 1, higher preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from diffalign.errors import ConfigError
from diffalign.shapes.judge import Images, Sight, see
from diffalign.shapes.render import EXTENT, SIDE
from diffalign.shapes.scene import COLOURS, SHAPES

Kind = Literal["size", "placement", "margin", "palette", "cleanliness"]


class Taste:
    """A rater's taste, read from the picture alone.

    size: share of the canvas that is drawn on. placement: closeness of the drawing's centroid to the middle.
    margin: smallest distance of an object to the border, in half sides. palette: chroma of the objects as a share of the
    pure colour's. cleanliness: likeness to the picture redrawn from what was seen. A picture with no object scores 0.
    """

    def __init__(self, kind: Kind) -> None:
        if kind not in get_args(Kind):
            raise ConfigError(f"unknown taste {kind!r}", hint=f"choose one of {', '.join(get_args(Kind))}")
        self.kind = kind
        self.name = f"taste_{kind}"

    def __call__(self, images: Images, prompts: Sequence[str] | None = None) -> list[float]:
        """(N,) values; prompts are not looked at."""
        return [self._of(sight) for sight in see(images)]

    def _of(self, sight: Sight) -> float:
        blobs = sight.blobs
        if not blobs:
            return 0.0
        area = np.array([b.area for b in blobs])
        match self.kind:
            case "size":
                return float(min(1.0, area.sum() / SIDE**2))
            case "placement":
                x, y = (np.average([getattr(b, c) for b in blobs], weights=area) for c in ("cx", "cy"))
                half = SIDE / 2
                return float(max(0.0, 1 - np.hypot(x - half, y - half) / half))
            case "margin":
                gaps = []
                for b in blobs:
                    side, up, down = EXTENT[SHAPES.index(b.shape or "circle")] * np.sqrt(b.area / np.pi)
                    gaps.append(min(b.cx - side, SIDE - b.cx - side, b.cy - up, SIDE - b.cy - down))
                return float(np.clip(min(gaps) / (SIDE / 2), 0, 1))
            case "palette":
                shares = [_chroma(b.rgb) / _chroma(COLOURS[b.colour]) if b.colour else 0.0 for b in blobs]
                return float(np.clip(np.average(shares, weights=area), 0, 1))
            case "cleanliness":
                return sight.cleanliness


def _chroma(rgb: Sequence[float]) -> float:
    return max(rgb) - min(rgb)
