"""The exact judge: which facts of a prompt hold in a picture, read from its pixels alone.

Analysis by synthesis: the border gives the background, the rest falls into blobs of one colour each, every blob is
re-rendered as each shape at its own centroid and area, and the shape that overlaps best is what was drawn. A fact holds
or does not; nothing is learnt, so nothing can be gamed by a model that was trained against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import DataError
from diffalign.shapes.render import SIDE, coverage, relation_of
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, parse_caption

Images = NDArray[np.uint8] | Sequence[Image.Image]

MIN_IOU = 0.70
"""A blob that overlaps its best re-rendered shape less than this has no shape."""
_FULLNESS = np.array([0.033, 0.009, -0.016, 0.011, -0.037], np.float32)
"""How much more a full shape overlaps an outline halfway between two shapes than a spare one does. Taken off the overlap, it
puts the border between two shapes where an outline is as near to the one as to the other."""
_FOREGROUND = 36.0  # RGB distance from the background beyond which a pixel belongs to something, or, in a noisy picture,
_NOISE_FACTOR = 2.5  # this many times the border's median distance
_HALF = 0.45  # and at least this much of the strongest distance within two units: about half covered, so edges stay apart
_MIN_AREA = 12.0  # square units of the 32-unit canvas: smaller specks are dirt, not objects
_COLOUR_REACH = 80.0  # RGB distance beyond which a colour has no name
_TWO_COLOURS = 55.0  # RGB distance of two touching parts that makes them two things; the closest two colours are 86 apart
_CLEAN_SCALE = 0.06

_NAMES = list(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_BG_NAMES = list(BACKGROUNDS)
_BG_PALETTE = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Blob:
    """One thing seen: ``colour`` and ``shape`` are None where nothing of the world fits. Lengths in canvas units."""

    colour: str | None
    shape: str | None
    cx: float
    cy: float
    area: float
    rgb: tuple[float, float, float]
    iou: float


@dataclass(frozen=True)
class Sight:
    """What the judge sees in one picture, before it knows any prompt."""

    background: str | None
    blobs: tuple[Blob, ...]
    cleanliness: float


@dataclass(frozen=True)
class Verdict:
    """One picture against one prompt."""

    facts: dict[str, bool]
    cleanliness: float

    @property
    def score(self) -> float:
        """The fraction of facts that hold."""
        return sum(self.facts.values()) / len(self.facts)

    @property
    def exact(self) -> bool:
        """Whether all facts hold."""
        return all(self.facts.values())


def as_array(images: Images) -> NDArray[np.uint8]:
    """Square pictures as (N, S, S, 3) uint8.

    Raises:
        DataError: the pictures differ in size, are not square, or are not 8-bit RGB.
    """
    if isinstance(images, np.ndarray):
        x = images
    else:
        sizes = {im.size for im in images}
        if len(sizes) > 1:
            raise DataError(f"the shapes judge needs pictures of one size, got {sorted(sizes)[:3]}")
        x = np.stack([np.asarray(im.convert("RGB")) for im in images]) if len(images) else np.zeros((0, 32, 32, 3), np.uint8)
    if x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2] or x.dtype != np.uint8:
        raise DataError(f"the shapes judge needs square 8-bit RGB pictures, got {x.dtype} {x.shape}")
    return x


def _nearest(rgb: NDArray[np.float32], palette: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Index of the closest palette entry and its distance, over the last axis."""
    d = np.sqrt(((rgb[..., None, :] - palette) ** 2).sum(-1))
    i = d.argmin(-1)
    return i, np.take_along_axis(d, i[..., None], -1)[..., 0]


def _split_colours(
    labels: NDArray[np.int32],
    count: int,
    x: NDArray[np.float32],
    hue: NDArray[np.int64],
    core: NDArray[np.bool_],
    least: float,
) -> int:
    """Give a blob of several colours one label per colour, in place; returns the new number of labels.

    One thing may run from purple into pink: parts count as two only where their colours really differ.
    """
    from scipy import ndimage

    votes = np.zeros((count + 1, len(_NAMES)), np.int64)
    np.add.at(votes, (labels[core], hue[core]), 1)
    votes[0] = 0
    strong = (votes >= least) & (votes >= 0.2 * votes.sum(1, keepdims=True))
    for blob in np.flatnonzero(strong.sum(1) > 1):
        owned = labels == blob
        where = np.flatnonzero(owned.any(axis=(1, 2)))[0]
        mine = owned[where]
        colours: list[int] = []
        medians: list[NDArray[np.float32]] = []
        for colour in sorted(np.flatnonzero(strong[blob]), key=lambda c: -votes[blob, c]):
            median = np.median(x[where][mine & core[where] & (hue[where] == colour)], axis=0)
            if all(np.linalg.norm(median - m) >= _TWO_COLOURS for m in medians):
                colours.append(int(colour))
                medians.append(median)
        if len(colours) == 1:
            continue
        # every pixel goes to the nearest core pixel of one of the strong colours, so blended edges do not vote
        seeds = np.where(mine & core[where] & np.isin(hue[where], colours), hue[where] + 1, 0)
        near = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        owner = seeds[tuple(near)]
        for other in colours[1:]:
            count += 1
            labels[where][mine & (owner == other + 1)] = count
    return count


def see(images: Images) -> list[Sight]:
    """Look at pictures (N, S, S, 3) without any prompt."""
    from scipy import ndimage

    img = as_array(images)
    n, size = img.shape[:2]
    if n == 0:
        return []
    x = img.astype(np.float32)
    unit = SIDE / size
    least = _MIN_AREA / unit**2
    edge = np.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], axis=1)
    bg_rgb = np.median(edge, axis=1)
    bg, bg_far = _nearest(bg_rgb, _BG_PALETTE)
    away = np.sqrt(((x - bg_rgb[:, None, None]) ** 2).sum(-1))
    border_noise = np.median(np.sqrt(((edge - bg_rgb[:, None]) ** 2).sum(-1)), axis=1)
    fore = away > np.maximum(_FOREGROUND, _NOISE_FACTOR * border_noise)[:, None, None]
    window = 2 * round(2 * size / SIDE) + 1
    fore &= away > _HALF * ndimage.maximum_filter(away, (1, window, window))

    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[0] = in_plane[2] = False  # blobs never cross from one picture to the next
    labels, count = ndimage.label(fore, structure=in_plane)
    padded = np.pad(fore, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    core = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:] & fore
    hue, _ = _nearest(x, _PALETTE)
    count = _split_colours(labels, count, x, hue, core, least)

    area = np.bincount(labels.ravel(), minlength=count + 1)
    ids = np.flatnonzero(area >= least)
    ids = ids[ids > 0]
    boxes = ndimage.find_objects(labels, max_label=count)
    where = np.array([boxes[i - 1][0].start for i in ids], np.int64)
    mine = labels[where] == ids[:, None, None]
    seen, drawn = _shapes_of(x, bg_rgb, where, mine, core, size)

    # cleanliness: distance to the picture redrawn from what was seen, in each blob's own colour
    redrawn = np.broadcast_to(bg_rgb[:, None, None], x.shape).copy()
    for k, (w, blob) in enumerate(zip(where, seen, strict=True)):
        a = drawn[k][..., None]
        redrawn[w] = redrawn[w] * (1 - a) + np.array(blob.rgb, np.float32) * a
    error = np.abs(x - redrawn).mean(axis=(1, 2, 3)) / 255
    clean = np.exp(-error / _CLEAN_SCALE)

    blobs: list[list[Blob]] = [[] for _ in range(n)]
    for w, blob in zip(where, seen, strict=True):
        blobs[w].append(blob)
    return [
        Sight(_BG_NAMES[bg[i]] if bg_far[i] <= _COLOUR_REACH else None, tuple(blobs[i]), float(clean[i])) for i in range(n)
    ]


def _shapes_of(
    x: NDArray[np.float32],
    bg_rgb: NDArray[np.float32],
    where: NDArray[np.int64],
    mine: NDArray[np.bool_],
    core: NDArray[np.bool_],
    size: int,
) -> tuple[list[Blob], NDArray[np.float32]]:
    """Colour, centre, area and best shape of every blob (K of them), and its redrawn coverage (K, S, S)."""
    from scipy import ndimage

    k = len(where)
    if k == 0:
        return [], np.zeros((0, size, size), np.float32)
    unit = SIDE / size
    inner = mine & core[where]
    inner = np.where(inner.any(axis=(1, 2), keepdims=True), inner, mine)
    rgb = np.stack([np.median(x[w][m], axis=0) for w, m in zip(where, inner, strict=True)])
    colour, far = _nearest(rgb, _PALETTE)
    # how far each pixel is from background towards the blob's colour: its soft coverage, one pixel beyond the mask too
    reach = ndimage.binary_dilation(mine, np.ones((1, 3, 3), bool))
    axis = rgb - bg_rgb[where]
    along = ((x[where] - bg_rgb[where][:, None, None]) * axis[:, None, None]).sum(-1) / (axis**2).sum(-1)[:, None, None]
    soft = np.where(reach, np.clip(along, 0, 1), 0).astype(np.float32)
    mass = soft.sum(axis=(1, 2))
    grid = (np.arange(size, dtype=np.float32) + 0.5) * unit
    cx = (soft.sum(axis=1) * grid).sum(-1) / mass
    cy = (soft.sum(axis=2) * grid).sum(-1) / mass
    area = mass * unit**2
    r = np.sqrt(area / np.pi).astype(np.float32)
    options = np.stack([coverage(np.full(k, s, np.int64), cx, cy, r, size) for s in range(len(SHAPES))], axis=1)
    low, high = np.minimum(options, soft[:, None]), np.maximum(options, soft[:, None])
    iou = low.sum(axis=(2, 3)) / high.sum(axis=(2, 3))
    best = (iou - _FULLNESS).argmax(axis=1)
    blobs = [
        Blob(
            _NAMES[colour[i]] if far[i] <= _COLOUR_REACH else None,
            SHAPES[best[i]] if iou[i, best[i]] >= MIN_IOU else None,
            float(cx[i]),
            float(cy[i]),
            float(area[i]),
            (float(rgb[i, 0]), float(rgb[i, 1]), float(rgb[i, 2])),
            float(iou[i, best[i]]),
        )
        for i in range(k)
    ]
    return blobs, options[np.arange(k), best]


def compare(sight: Sight, scene: Scene) -> dict[str, bool]:
    """The facts of ``scene`` that hold in ``sight``, keyed by :attr:`Scene.fact_names`."""
    return match(sight, scene)[1]


def match(sight: Sight, scene: Scene) -> tuple[tuple[Blob | None, ...], dict[str, bool]]:
    """For each thing of ``scene`` what was seen in its place, None for nothing, and the facts that hold.

    Blobs are matched to things so that as many facts as possible hold: the judge gives the picture its best reading.
    """
    facts = dict.fromkeys(scene.fact_names, False)
    facts["background"] = sight.background == scene.background
    facts["count"] = len(sight.blobs) == len(scene.things)
    slots = [*sight.blobs, *([None] * len(scene.things))]
    readings: list[tuple[tuple[Blob | None, ...], dict[str, bool]]] = []
    for chosen in itertools.permutations(slots, len(scene.things)):
        reading = {}
        for i, (thing, blob) in enumerate(zip(scene.things, chosen, strict=True)):
            reading[f"colour{i}"] = blob is not None and blob.colour == thing.colour
            reading[f"shape{i}"] = blob is not None and blob.shape == thing.shape
        if scene.relation is not None:
            a, b = chosen
            reading["relation"] = a is not None and b is not None and relation_of(b.cx - a.cx, b.cy - a.cy) == scene.relation
        readings.append((chosen, reading))
    best, held = max(readings, key=lambda r: sum(r[1].values()))
    return best, facts | held


def judge(images: Images, prompts: Sequence[str | Scene]) -> list[Verdict]:
    """Judge pictures (N, S, S, 3) against their N prompts.

    Raises:
        DataError: a prompt is not a caption of this world, or the numbers of pictures and prompts differ.
    """
    sights = see(images)
    if len(sights) != len(prompts):
        raise DataError(f"{len(sights)} pictures but {len(prompts)} prompts", hint="give one prompt per picture")
    scenes = [p if isinstance(p, Scene) else parse_caption(p) for p in prompts]
    return [Verdict(compare(s, scene), s.cleanliness) for s, scene in zip(sights, scenes, strict=True)]
