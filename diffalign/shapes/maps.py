"""Where two pictures of the built-in world differ, by the exact judge: which object is wrong, and who has it right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.shapes.judge import Blob, Sight, match, see
from diffalign.shapes.render import SIDE
from diffalign.shapes.scene import parse_caption

ELSEWHERE = 0.1
"""Weight of what is around the wrong objects."""
_REACH = 1.6  # half a side of the square around an object, in radii of the circle of its area: a triangle's corner is at 1.56


def maps_of(
    chosen: Sequence[Image.Image], rejected: Sequence[Image.Image], prompts: Sequence[str]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """(region, segments) of each pair, (S, S) each, S the pictures' side.

    An object is right if its colour and shape hold, and the relation where there is one. The region is 1 around the objects
    that are wrong in the loser, in either picture, and :data:`ELSEWHERE` around them; where the background is wrong, or
    nothing is, it is 1 everywhere. Segments are 1 around objects that only the winner has right, -1 around those that only
    the loser has, and the rest is the background's; 1 everywhere where the judge sees no difference.

    Raises:
        DataError: a prompt is not a caption of this world, or the pictures are not square and of one size.
    """
    sights = see([*chosen, *rejected])
    out = []
    for i, prompt in enumerate(prompts):
        out.append(_pair(sights[i], sights[len(prompts) + i], prompt, chosen[i].width))
    return out


def _pair(winner: Sight, loser: Sight, prompt: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scene = parse_caption(prompt)
    (found_w, facts_w), (found_l, facts_l) = match(winner, scene), match(loser, scene)
    background = int(facts_w["background"]) - int(facts_l["background"])
    region = np.full((side, side), ELSEWHERE, np.float32)
    segments = np.full((side, side), float(background), np.float32)
    wrong = False
    for n in range(len(scene.things)):
        right_w, right_l = (all(f.get(k, True) for k in (f"colour{n}", f"shape{n}", "relation")) for f in (facts_w, facts_l))
        for blob in (found_w[n], found_l[n]):
            if blob is not None:
                place = _around(blob, side)
                segments[place] = int(right_w) - int(right_l)
                if not right_l:
                    region[place] = 1
                    wrong = True
    if not facts_l["background"] or not wrong:
        region[:] = 1
    if not segments.any():
        segments[:] = 1
    return region, segments


def _around(blob: Blob, side: int) -> tuple[slice, slice]:
    """Rows and columns of the square around an object."""
    unit, reach = side / SIDE, _REACH * np.sqrt(blob.area / np.pi)
    rows, columns = (
        slice(max(0, int((at - reach) * unit)), min(side, int(np.ceil((at + reach) * unit)))) for at in (blob.cy, blob.cx)
    )
    return rows, columns
