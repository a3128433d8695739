"""Copies in a set of pictures: the same bytes, or nearly the same look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

BANDS = 4
"""Hashes of 64 bits that differ in fewer bits than there are bands agree in one band at least: no near copy is missed."""


def groups(keys: Mapping[str, str | None]) -> list[list[str]]:
    """Ids that share a key, in order; ids without one are alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, key in keys.items():
        if key is not None:
            found[key].append(name)
    return [names for names in found.values() if len(names) > 1]


def near(hashes: Mapping[str, str]) -> list[list[str]]:
    """Groups of ids whose hashes (16 hex digits) are linked by differences of 3 bits or less."""
    values = sorted({int(h, 16) for h in hashes.values()})
    parent = {v: v for v in values}

    def root(v: int) -> int:
        while parent[v] != v:
            parent[v] = v = parent[parent[v]]
        return v

    for band in range(BANDS):
        buckets: dict[int, list[int]] = defaultdict(list)
        for v in values:
            buckets[v >> 16 * band & 0xFFFF].append(v)
        for bucket in buckets.values():
            for a, b in combinations(bucket, 2):
                if (a ^ b).bit_count() < BANDS:
                    parent[root(a)] = root(b)
    return groups({name: str(root(int(h, 16))) for name, h in hashes.items()})
