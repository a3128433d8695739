"""Sizes to train at when pictures are not square: each pair is cut to the one that is nearest to its winner's shape."""

from __future__ import annotations

import math
from collections.abc import Iterable

Size = tuple[int, int]
"""(height, width) in pixels."""


def bucket_sizes(native: Size, step: int) -> list[Size]:
    """Sizes of at most the area of ``native``, sides in multiples of ``step`` from half to twice the native one.

    Every length of the longer side is there once, with the longest shorter side that fits: for 1024 px and steps of 64
    these are sizes of SDXL's own table (Podell et al. 2023, appendix I). No bucket takes more memory than the native size.
    """
    area, side = math.prod(native), math.isqrt(math.prod(native))
    wide = [(area // (w * step * step) * step, w * step) for w in range(-(-side // step), 2 * side // step + 1)]
    wide = [(h, w) for h, w in wide if h >= side // 2 and h < w]
    return sorted({native, *wide, *((w, h) for h, w in wide)})


def nearest(shape: Size, sizes: Iterable[Size]) -> Size:
    """The size whose ratio of the sides is nearest to that of ``shape``, on a logarithmic scale."""
    ratio = math.log(shape[0] / shape[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), s))
