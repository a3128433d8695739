"""Captions that are no longer true of their picture: one word for a colour, a size, a count or a place is exchanged.

Rules for English. They would rather leave a caption alone than break it: a word is exchanged only where its neighbours say
what it is, and never for one that the caption holds already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from typing import Literal

from diffalign.data import english as en
from diffalign.data.prompts import normalised
from diffalign.data.wording import may_show

Kind = Literal["attribute", "count", "relation"]
TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*(?!\w)|\w+|[^\w\s]")


@dataclass(frozen=True)
class Edit:
    """A caption made false: its text, and which words were exchanged."""

    kind: str
    text: str
    old: str
    new: str


def edits(caption: str, kinds: Sequence[Kind], seed: int, keep: Callable[[str], bool] = lambda text: True) -> Iterator[Edit]:
    """What one exchange makes of a caption: kinds and places in turn, in an order that follows from (seed, caption).

    None says the same as the caption, nor what its picture shows as well (:func:`diffalign.data.wording.may_show`). Those
    that ``keep`` refuses leave their turn to the next of their kind.
    """

    def digest(text: str) -> bytes:
        return sha256(f"{seed}|{caption}|{text}".encode()).digest()

    line, seen = Line(caption), {normalised(caption)}
    rules = {"attribute": line.attributes, "count": line.counts, "relation": line.relations}

    def of_kind(kind: Kind) -> Iterator[Edit]:
        found = [sorted((Edit(kind, *e) for e in place), key=lambda e: digest(e.text)) for place in rules[kind]()]
        places = sorted((place for place in found if place), key=lambda place: digest(place[0].text))
        for edit in in_turn(places):
            same = normalised(edit.text)
            if same not in seen and not may_show(caption, edit.text) and keep(edit.text):
                yield edit
            seen.add(same)

    yield from in_turn([of_kind(kind) for kind in sorted(kinds, key=digest)])


def in_turn(lists: Sequence[Iterable[Edit]]) -> Iterator[Edit]:
    """The first of each, then the second of each ..."""
    return (e for tier in zip_longest(*lists) for e in tier if e is not None)


Place = Iterator[tuple[str, str, str]]
"""(text, old word, new word) of every exchange at one place."""


class Line:
    """A caption as words with their places."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found = list(TOKEN.finditer(text))
        self.words = [m[0].lower() for m in self.found]
        self.said = set(self.words)

    def word(self, i: int) -> str:
        """The word there, or nothing."""
        return self.words[i] if 0 <= i < len(self.words) else ""

    def plain(self, i: int) -> bool:
        """A word that is neither a name nor one that only connects others."""
        return self.word(i).replace("-", "").isalpha() and self.word(i) not in en.FUNCTION and not self.named(i)

    def named(self, i: int) -> bool:
        """Written with a capital that does not merely begin a sentence: part of a name."""

        def capital(j: int) -> bool:
            return 0 <= j < len(self.found) and self.found[j][0][:1].isupper()

        begins = i == 0 or self.word(i - 1) in (".", "!", "?")
        return capital(i) and (not begins or capital(i + 1))

    def stated(self) -> Iterator[tuple[int, str]]:
        """Words that are no names, and that the caption says to hold: not "no red cars", not "red or blue"."""
        for i, word in enumerate(self.words):
            denied = en.DENIALS.intersection(self.words[max(0, i - 4) : i]) or "or" in (self.word(i - 1), self.word(i + 1))
            if not denied and not self.named(i):
                yield i, word

    def with_words(self, new: dict[int, str]) -> str:
        """The text with other words at these places; ``a`` and ``an`` follow, and so does a capital; '' takes a word out."""
        new = dict(new)
        for i, word in list(new.items()):
            if self.word(i - 1) in ("a", "an") and i - 1 not in new and word:
                new[i - 1] = en.article(word)
        out, end = "", 0
        for i, m in enumerate(self.found):
            if i in new:
                word = new[i].capitalize() if m[0][:1].isupper() and new[i] else new[i]
                gap = self.text[end : m.start()]
                out, end = out + (gap if word else gap[:-1]) + word, m.end()
        return out + self.text[end:]

    # --- attributes ---------------------------------------------------------------------------------------------------

    def attributes(self) -> Iterator[Place]:
        for i, word in self.stated():
            for new in (self.of_class(i, word), self.opposite(i, word), self.shape(i, word)):
                if new:
                    yield ((self.with_words({i: w}), word, w) for w in new if w not in self.said)

    def describes(self, i: int) -> bool:
        """Whether the word there stands before what it describes, or behind "is"."""
        after = self.word(i + 1)
        listed = after in ("and", ",") and self.word(i + 2) in en.ADJECTIVES
        behind = self.word(i - 1) in en.LINKS and not self.plain(i + 1)
        colour = self.word(i) in en.COLOURS and self.word(i - 1) in ("in", "on") and not after.isalpha()
        return self.plain(i + 1) or after in ("colored", "coloured") or listed or behind or colour

    def of_class(self, i: int, word: str) -> list[str]:
        for members in en.CLASSES:
            if own := next((name for name, others in members.items() if word == name or word in others), None):
                said = {n for n, others in members.items() if self.said & {n, *others}}
                return [n for n in members if n != own and n not in said] if self.describes(i) else []
        return []

    def opposite(self, i: int, word: str) -> list[str]:
        return [new for new, old in en.OPPOSITES.items() if word in old and self.describes(i)]

    def shape(self, i: int, word: str) -> list[str]:
        many = [en.plural(s) for s in en.SHAPES]
        if word not in (*en.SHAPES, *many) or self.plain(i + 1):
            return []
        before = self.word(i - 1)
        known = before in ("a", "an", *en.NUMBERS) or before in en.ADJECTIVES or before.isdigit()
        return [s for s in (en.SHAPES if word in en.SHAPES else many) if s != word] if known else []

    # --- counts -------------------------------------------------------------------------------------------------------

    def counts(self) -> Iterator[Place]:
        for i, word in self.stated():
            if word in ("a", "an", "one") and self.opens(i) and (at := self.noun(i + 1)) is not None:
                if (many := en.plural(self.words[at])) != self.words[at] or word == "one":
                    agreed = {at: many} | ({at + 1: en.BE[self.word(at + 1)]} if self.word(at + 1) in en.BE else {})
                    yield ((self.with_words({i: n} | agreed), word, n) for n in en.NUMBERS[1:4])
            elif (
                (n := en.number(word)) > 1
                and self.word(i - 1) not in en.ARTICLES
                and (at := self.noun(i + 1, True)) is not None
            ):
                yield self.other_numbers(i, n, at)

    def other_numbers(self, i: int, n: int, at: int) -> Place:
        word = self.words[i]
        for m in (m for m in range(2, 6) if m != n):
            new = str(m) if word.isdigit() else en.NUMBERS[m - 1]
            yield self.with_words({i: new}), word, new
        one = en.singular(self.words[at])
        verb = {v: k for k, v in en.BE.items()}.get(self.word(at + 1))
        if one is not None and "each" not in self.said:
            yield self.with_words({i: "one", at: one} | ({at + 1: verb} if verb else {})), word, "one"

    def opens(self, i: int) -> bool:
        """Whether an article begins something that is there, not a place or a manner: "a dog", not "in a park"."""
        before = self.word(i - 1)
        if before == "of":
            return self.word(i - 2) in (*en.SWAPS, "photo", "picture", "image", "painting", "front")
        return not before.isalpha() or self.plain(i - 1) or before in ("and", "with", "behind", "above", "below", "beside")

    def noun(self, i: int, many: bool = False) -> int | None:
        """Where the noun of at most three words that begin at ``i`` is; None where that is not sure."""
        at = i
        while self.plain(at) and at < i + 4:
            word = self.words[at]
            if at > i and word.endswith("ing") and word not in en.NOUNS_IN_ING:
                if self.plain(at + 1):  # "a large sleeping cat", or "a dog running fast"
                    return None
                break
            if at > i and word.endswith("ed") and not self.plain(at + 1):
                break
            at += 1
        head, phrase = self.word(at - 1), self.words[i:at]
        unsure = not 1 <= len(phrase) <= 3 or self.named(at) or self.word(at) in ("that", "which", "who")
        unsure = unsure or "-" in head or "'" in head or head in en.NOT_COUNTED | en.ADJECTIVES
        unsure = unsure or head.endswith(("ly", "ed", "est")) or (head.endswith("ing") and head not in en.NOUNS_IN_ING)
        verbs = phrase[:-1] if many else phrase  # "rides" is no noun, and neither is what follows it
        unsure = unsure or any(w in en.PAST or (w.endswith("s") and not w.endswith(("ss", "us"))) for w in verbs)
        if unsure or (many and en.singular(head) is None):
            return None
        return at - 1

    # --- relations ----------------------------------------------------------------------------------------------------

    def relations(self) -> Iterator[Place]:
        for i, word in self.stated():
            if (found := self.relation(i, word)) is not None and not self.alike(i, i + len(found)):
                old = " ".join(self.words[i : i + len(found)])
                new = " ".join(w for w in found if w)
                yield iter([(self.with_words({i + n: w for n, w in enumerate(found)}), old, new)])

    def relation(self, i: int, word: str) -> list[str] | None:
        """What stands for the words from ``i`` on when the two things change places; None where nothing does."""
        after, before = self.word(i + 1), self.word(i - 1)
        opened = after in en.ARTICLES or after in en.NUMBERS or (self.plain(i + 1) and after not in en.NOT_UNDER)
        if word in ("left", "right", "top", "bottom"):
            named = before == "the" and self.word(i - 2) in ("on", "to", "at") and not (self.plain(i + 1) and after != "side")
            beside = after == "of" and word in ("left", "right")
            return [en.SWAPS[word]] if beside or named else None
        if word in ("above", "below", "inside", "outside"):
            return [en.SWAPS[word]] if opened and self.word(i + 2) not in en.NOT_UNDER else None
        if word == "in" and (after, self.word(i + 2)) == ("front", "of"):
            return ["behind", "", ""]
        if word == "behind":
            return ["in front of"] if opened else None
        if word == "on" and (after, self.word(i + 2)) == ("top", "of"):
            return ["under", "", ""]
        if word in ("under", "underneath", "beneath"):
            return ["on"] if after in en.ARTICLES and self.word(i + 2) not in en.NOT_UNDER else None
        if word == "on" and after in en.ARTICLES:
            at = self.noun(i + 2)
            return ["under"] if at is not None and self.words[at] in en.SURFACES else None
        return None

    def alike(self, start: int, stop: int) -> bool:
        """Whether the same is said of both sides: "a dog behind another dog" holds both ways."""
        i = start - 1
        while i >= 0 and (self.words[i] in ("to", "the", "on", "at", *en.LINKS) or self.words[i].endswith("ing")):
            i -= 1
        first: list[str] = []
        while self.plain(i):
            first, i = [self.words[i], *first], i - 1
        j = stop + (self.word(stop) == "of" or self.word(stop) == "side")
        while self.word(j) in en.ARTICLES or self.word(j) in en.NUMBERS or self.word(j) == "of":
            j += 1
        second: list[str] = []
        while self.plain(j):
            second, j = [*second, self.words[j]], j + 1
        if self.word(stop) in ("each", "one") or self.word(j) in ("other", "them"):
            return True
        same = first[-1:] == second[-1:] != []
        return same and (set(first) <= set(second) or set(second) <= set(first))
