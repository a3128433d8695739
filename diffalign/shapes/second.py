"""A second judge, built differently, to guard the first.

The first subtracts the background, finds blobs and re-renders them. This one names the colour of every pixel, takes each
colour's largest patch, stretches it to a fixed box and asks the nearest neighbours in a bank of clean, noisy, blurred and
bitten drawings what shape it is. It knows nothing of areas, overlaps or antialiasing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diffalign.shapes.judge import Images, as_array
from diffalign.shapes.render import Layout, relation_of, render
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, parse_caption

BOX = 10
NEIGHBOURS = 9
_NAMES = [*COLOURS, *BACKGROUNDS]
_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
_LEAST = 0.012  # share of the canvas that a patch must cover to be an object


def _stretched(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The mask's bounding box on a BOX x BOX grid, with its aspect ratio as a last feature."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    at = [((np.arange(BOX) + 0.5) * n / BOX).astype(int) for n in cut.shape]
    return np.append(cut[np.ix_(*at)].astype(np.float32).ravel(), 2 * np.log(cut.shape[0] / cut.shape[1])).astype(np.float32)


def _segment(x: NDArray[np.float32]) -> NDArray[np.int64]:
    """The nearest named colour of every pixel, (N, S, S)."""
    d = (x**2).sum(-1)[..., None] - 2 * x @ _PALETTE.T + (_PALETTE**2).sum(-1)
    out: NDArray[np.int64] = d.argmin(-1)
    return out


@cache
def _bank(per_shape: int = 160) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features of drawings of every shape, half of them damaged."""
    from scipy import ndimage

    rng = np.random.default_rng(7)
    shape = np.repeat(np.arange(len(SHAPES)), per_shape)
    n = len(shape)

    def f(low: float, high: float) -> NDArray[np.float32]:
        return rng.uniform(low, high, (n, 1)).astype(np.float32)

    ink, paper = np.full((n, 1, 3), 255, np.float32), np.zeros((n, 3), np.float32)
    images = render(Layout(shape[:, None], f(14, 18), f(14, 18), f(4.0, 8.0), ink, paper))[..., 0] / 255.0
    for i in range(0, n, 2):
        images[i] = ndimage.gaussian_filter(images[i], rng.uniform(0.3, 1.0)) + rng.normal(0, 0.12, images[i].shape)
        y, x = rng.integers(8, 24, 2)
        images[i, y : y + 2, x : x + 2] = rng.integers(2)  # a bite or a crumb
    features = []
    for image in images:
        patches, count = ndimage.label(image > rng.uniform(0.4, 0.6))
        largest = 1 + int(np.bincount(patches.ravel())[1:].argmax()) if count else 0
        features.append(_stretched(patches == largest))
    return np.stack(features), shape


def second_judge(images: Images, prompts: Sequence[str | Scene]) -> list[dict[str, bool]]:
    """The facts of each prompt that hold in its picture, keyed as by the first judge."""
    from scipy import ndimage

    named = _segment(as_array(images).astype(np.float32))
    bank, answer = _bank()
    out = []
    for labels, prompt in zip(named, prompts, strict=True):
        scene = prompt if isinstance(prompt, Scene) else parse_caption(prompt)
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        background = int(np.bincount(edge, minlength=len(_NAMES)).argmax())
        seen: list[tuple[str, str, float, float]] = []
        for colour in range(len(COLOURS)):
            # opened, because the blended rim of one colour often carries the name of another
            mask = ndimage.binary_opening(labels == colour, np.ones((2, 2), bool))
            patches, count = ndimage.label(mask)
            for patch in range(1, count + 1):
                mine = patches == patch
                if mine.sum() < _LEAST * mine.size:
                    continue
                distance = ((bank - _stretched(mine)) ** 2).sum(1)
                votes = np.bincount(answer[np.argsort(distance, kind="stable")[:NEIGHBOURS]], minlength=len(SHAPES))
                y, x = (float(np.flatnonzero(mine.any(axis)).mean()) for axis in (1, 0))
                seen.append((_NAMES[colour], SHAPES[int(votes.argmax())], x, y))
        out.append(_facts(scene, _NAMES[background], seen))
    return out


def _facts(scene: Scene, background: str, seen: list[tuple[str, str, float, float]]) -> dict[str, bool]:
    """The reading of what was seen under which most facts hold."""
    n = len(scene.things)
    best: dict[str, bool] = {}
    for chosen in itertools.permutations([*seen, *([None] * n)], n):
        facts = {"background": background == scene.background, "count": len(seen) == n}
        for i, (thing, it) in enumerate(zip(scene.things, chosen, strict=True)):
            facts[f"colour{i}"] = it is not None and it[0] == thing.colour
            facts[f"shape{i}"] = it is not None and it[1] == thing.shape
        if scene.relation is not None:
            a, b = chosen
            facts["relation"] = a is not None and b is not None and relation_of(b[2] - a[2], b[3] - a[3]) == scene.relation
        if sum(facts.values()) > sum(best.values()) or not best:
            best = facts
    return best
