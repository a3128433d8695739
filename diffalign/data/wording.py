"""What captions say, as far as their words tell: how similar two are, and whether a picture of one may show the other."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
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


class Similar:
    """For each caption the others whose Jaccard index |A and B| / |A or B| of words is ``least`` or more.

    Exact, and without a look at most pairs: sets with that index share one of the len(A) - ceil(least len(A)) + 1 rarest
    words of either (Chaudhuri et al. 2006, A Primitive Operator for Similarity Joins in Data Cleaning).
    """

    def __init__(self, captions: Sequence[str], least: float) -> None:
        said = [set(words(c)) for c in captions]
        count = Counter(w for s in said for w in s)
        rank = {w: n for n, w in enumerate(sorted(count, key=lambda w: (count[w], w)))}
        self.least = least
        self.sets = [tuple(sorted(rank[w] for w in s)) for s in said]
        self.having: dict[int, list[int]] = {}
        for row, s in enumerate(self.sets):
            for w in self._rarest(s):
                self.having.setdefault(w, []).append(row)

    def _rarest(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        return ranks[: len(ranks) - math.ceil(self.least * len(ranks) - 1e-9) + 1]

    def to(self, row: int) -> list[tuple[int, float]]:
        """(other, index), the most similar first, equal ones in their order."""
        mine, found = set(self.sets[row]), []
        for other in {j for w in self._rarest(self.sets[row]) for j in self.having[w]} - {row}:
            shared = len(mine.intersection(self.sets[other]))
            index = shared / (len(mine) + len(self.sets[other]) - shared)
            if index >= self.least:
                found.append((-index, other))
        return [(other, -index) for index, other in sorted(found)]
