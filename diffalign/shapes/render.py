"""Draw scenes: signed distances with analytic antialiasing, many pictures at once.

All shapes of one ``radius`` r cover the same area, pi r^2, and have their centroid at the centre, so that size and
placement are free of shape. Lengths are in 1/32 of the picture's side, whatever its size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.shapes.scene import BACKGROUNDS, COLOURS, INVERSE, SHAPES, Scene

SIDE = 32.0
"""Side of the canvas in layout units."""

F = NDArray[np.float32]

# Half-extents of each shape at r = 1: left/right, up, down. Equal areas fix the scales (see `signed_distance`).
_EXTENT = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.8862, 0.8862, 0.8862),
    "triangle": (1.3468, 1.5551, 0.7776),
    "diamond": (1.2533, 1.2533, 1.2533),
    "cross": (1.1662, 1.1662, 1.1662),
}
EXTENT = np.array([_EXTENT[s] for s in SHAPES], np.float32)


def signed_distance(shape: NDArray[np.int64], x: F, y: F, r: F) -> F:
    """Distance to the outline, negative inside. ``shape`` and ``r`` broadcast against ``x`` and ``y`` (y downwards).

    The cross and the square use the box metric, which only changes how corners are antialiased.
    """
    ax, ay = np.abs(x), np.abs(y)
    arm, half = 1.1662 * r, 0.4082 * r
    third = np.float32(np.sqrt(3) / 2)
    choices = (
        lambda: np.sqrt(x * x + y * y) - r,
        lambda: np.maximum(ax, ay) - 0.8862 * r,
        lambda: np.maximum(y, third * ax - 0.5 * y) - 0.7776 * r,
        lambda: (ax + ay - 1.2533 * r) * np.float32(np.sqrt(0.5)),
        lambda: np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm)),
    )
    out = np.full(np.broadcast_shapes(shape.shape, x.shape, r.shape), np.inf, np.float32)  # no shape is nowhere near
    for k in range(len(SHAPES)):
        out = np.where(shape == k, choices[k](), out) if (shape == k).any() else out
    return out


def coverage(shape: NDArray[np.int64], cx: F, cy: F, r: F, size: int) -> F:
    """Share of each pixel covered by the shape: inputs (N,), output (N, size, size)."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (SIDE / size)
    x, y = grid[None, None, :] - cx[:, None, None], grid[None, :, None] - cy[:, None, None]
    d = signed_distance(shape[:, None, None], x, y, r[:, None, None])
    return np.clip(0.5 - d * (size / SIDE), 0.0, 1.0)


@dataclass
class Layout:
    """Where and how things are drawn: arrays over (picture, thing); ``shape`` is -1 where there is no second thing."""

    shape: NDArray[np.int64]
    cx: F
    cy: F
    r: F
    rgb: F
    background: F

    def __len__(self) -> int:
        return len(self.shape)


def _place(shape: NDArray[np.int64], relation: Sequence[str | None], rng: np.random.Generator) -> tuple[F, F, F]:
    """Centres and radii by rejection: inside the canvas, apart, and the relation's axis clearly the longer one."""
    n = len(shape)
    cx, cy, r = (np.zeros((n, 2), np.float32) for _ in range(3))
    horizontal = np.array([rel in ("left of", "right of") for rel in relation])
    sign = np.array([1.0 if rel in ("left of", "above") else -1.0 for rel in relation], np.float32)
    single = shape[:, 1] < 0
    todo = np.arange(n)
    while len(todo):
        m = len(todo)
        one, hor = single[todo], horizontal[todo]
        r_ = np.where(one[:, None], rng.uniform(4.2, 8.0, (m, 2)), rng.uniform(4.2, 5.8, (m, 2))).astype(np.float32)
        ext = EXTENT[np.maximum(shape[todo], 0)] * r_[:, :, None]
        lo = np.stack([ext[..., 0], ext[..., 1]], -1) + 0.5
        hi = SIDE - np.stack([ext[..., 0], ext[..., 2]], -1) - 0.5
        pos = rng.uniform(lo, hi).astype(np.float32)
        d = (pos[:, 1] - pos[:, 0]) * sign[todo][:, None]
        along, across = np.where(hor, d[:, 0], d[:, 1]), np.where(hor, d[:, 1], d[:, 0])
        # gap between the two bounding boxes along the relation's axis
        before, after = np.where(sign[todo] > 0, 0, 1), np.where(sign[todo] > 0, 1, 0)
        rows = np.arange(m)
        reach = np.where(hor, ext[:, 0, 0] + ext[:, 1, 0], ext[rows, before, 2] + ext[rows, after, 1])
        ok = one | ((along - reach >= 1.5) & (np.abs(across) <= 0.6 * along))
        keep = todo[ok]
        cx[keep], cy[keep], r[keep] = pos[ok, :, 0], pos[ok, :, 1], r_[ok]
        todo = todo[~ok]
    return cx, cy, r


def sample_layout(scenes: Sequence[Scene], rng: np.random.Generator) -> Layout:
    """Draw what the captions leave open: size, place, and how vivid each colour is."""
    n = len(scenes)
    shape = np.full((n, 2), -1, np.int64)
    rgb = np.zeros((n, 2, 3), np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            shape[i, j], rgb[i, j] = SHAPES.index(thing.shape), COLOURS[thing.colour]
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    dull = rng.uniform(0.0, 0.25, (n, 2, 1)).astype(np.float32)
    cx, cy, r = _place(shape, [s.relation for s in scenes], rng)
    background = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32)
    return Layout(shape, cx, cy, r, rgb * (1 - dull) + grey[..., None] * dull, background)


def render(layout: Layout, size: int = 32) -> NDArray[np.uint8]:
    """Pictures (N, size, size, 3), 0 to 255."""
    img = np.broadcast_to(layout.background[:, None, None, :], (len(layout), size, size, 3)).copy()
    for j in range(layout.shape.shape[1]):
        a = coverage(layout.shape[:, j], layout.cx[:, j], layout.cy[:, j], layout.r[:, j], size)
        a = np.where(layout.shape[:, j, None, None] >= 0, a, 0.0)[..., None]
        img = img * (1 - a) + layout.rgb[:, j, None, None, :] * a
    return np.round(img).astype(np.uint8)


def draw(scenes: Sequence[Scene], rng: np.random.Generator, size: int = 32) -> NDArray[np.uint8]:
    """Render scenes with a fresh layout each: (N, size, size, 3) uint8."""
    return render(sample_layout(scenes, rng), size)


def relation_of(dx: float, dy: float) -> str:
    """The relation of a first object to a second one that lies at (dx, dy) from it (y downwards)."""
    rel = "left of" if abs(dx) >= abs(dy) else "above"
    return rel if (dx if rel == "left of" else dy) > 0 else INVERSE[rel]
