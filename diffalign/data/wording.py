"""What captions say, as far as their words tell: how similar two are, and whether a picture of one may show the other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from diffalign.data.english import NUMBERS, words_of
from diffalign.data.prompts import normalised

PLACES = {
    "left": ("across", -1), "right": ("across", 1), "top": ("up", 1), "bottom": ("up", -1),
    "above": ("up", 1), "over": ("up", 1), "on": ("up", 1), "below": ("up", -1), "under": ("up", -1),
    "underneath": ("up", -1), "beneath": ("up", -1),
    "front": ("depth", 1), "behind": ("depth", -1),
    "inside": ("within", 1), "in": ("within", 1), "into": ("within", 1), "outside": ("within", -1),
}  # fmt: skip
"""(axis, side) of words that place one thing by another: a left of b is b right of a."""
GLUE = words_of(
    "a an the one some of to at by and with is are was were be there that which this these it its"
    " side picture photo photograph image background"
)
"""Words that may come and go without changing what a picture must show."""
PHRASES = (
    (re.compile(r"\bin (?:the )?front\b"), "front"),
    (re.compile(r"\b(?:on|to|at) the (left|right|top|bottom)\b"), r"\1"),
    (re.compile(r"\bon top\b"), "on"),
    (re.compile(r"\bon (?:(?:a|an|the) )?(\w+) background\b"), r"\1"),
    (re.compile(r"\bon (\w+)$"), r"\1"),  # ", on grey"
    (re.compile(r"\bgray\b"), "grey"),
    *((re.compile(rf"\b{n}\b"), word) for n, word in enumerate(NUMBERS, 1)),
)


@lru_cache(maxsize=1 << 14)
def words(caption: str) -> tuple[str, ...]:
    """Normalised, without glue; a phrase that places something is one word."""
    text = normalised(caption)
    for pattern, short in PHRASES:
        text = pattern.sub(short, text)
    return tuple(w for w in text.split() if w not in GLUE)


def may_show(caption: str, other: str) -> bool:
    """Whether a picture of ``caption`` may show ``other`` as well: then one is no counterexample of the other.

    So it is if ``other`` says nothing that ``caption`` does not: no word more, where words of one axis count as the same
    ("a left of b" is "b right of a"); but the same words in the same places with another side are the opposite. Synonyms
    are not known.
    """
    mine, theirs = words(caption), words(other)
    masked, asked = ([PLACES.get(w, (w, 0))[0] for w in ws] for ws in (mine, theirs))
    if masked == asked:
        sides = [[PLACES.get(w, (w, 0))[1] for w in ws] for ws in (mine, theirs)]
        return sides[0] == sides[1]
    return not Counter(asked) - Counter(masked)


def similar(captions: Sequence[str], least: float, rows: range) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """For each of ``rows``: other captions whose Jaccard index |A and B| / |A or B| of words is ``least`` or more.

    The most similar first, equal ones in their order. Memory is that of a few rows against all.
    """
    import numpy as np
    from scipy.sparse import csr_array

    place: dict[str, int] = {}
    sets = [sorted({place.setdefault(w, len(place)) for w in words(c)}) for c in captions]
    size = np.array([len(s) for s in sets])
    ends = np.concatenate([[0], np.cumsum(size)])
    flat = np.array([i for s in sets for i in s], np.int64)
    table = csr_array((np.ones(len(flat), np.int32), flat, ends), shape=(len(sets), max(len(place), 1)))
    turned = table.T.tocsr()
    for start in range(rows.start, rows.stop, 64):
        block = range(start, min(start + 64, rows.stop))
        shared = (table[block.start : block.stop] @ turned).tocsr()
        for i, row in enumerate(block):
            others = shared.indices[shared.indptr[i] : shared.indptr[i + 1]]
            common = shared.data[shared.indptr[i] : shared.indptr[i + 1]]
            index = common / (size[row] + size[others] - common)
            found = sorted((-x, int(j)) for x, j in zip(index.tolist(), others, strict=True) if x >= least and j != row)
            yield row, [(j, -x) for x, j in found]
