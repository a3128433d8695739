"""Embeddings of pictures beside their scores: one row a picture and encoder, fp32, so that a later head gives the same number.

Which pictures are there is held in memory; the vectors are read part by part, when they are asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import DataError

KEPT = 4
"""Parts in memory: pictures are asked for in the order in which they were written."""


class Embeddings:
    """The table ``embeddings/`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._parts = sorted((folder / "embeddings").glob("*.parquet"))
        self._where: dict[tuple[str, str], int] = {}
        self._read: OrderedDict[int, dict[tuple[str, str], Any]] = OrderedDict()
        for number, part in enumerate(self._parts):
            for row in _rows(part, ["image_sha256", "encoder"]):
                self._where[row["image_sha256"], row["encoder"]] = number

    def __contains__(self, key: tuple[str | None, str]) -> bool:
        return key in self._where

    def encoders(self) -> dict[str, int]:
        """How many pictures each encoder has seen."""
        out: dict[str, int] = {}
        for _, encoder in self._where:
            out[encoder] = out.get(encoder, 0) + 1
        return out

    def get(self, keys: Sequence[tuple[str, str]]) -> Any:
        """(N, D) fp32 of (picture's sha256, encoder)."""
        return np.stack([self._part(self._where[key])[key] for key in keys])

    def _part(self, number: int) -> dict[tuple[str, str], Any]:
        if number not in self._read:
            rows = _rows(self._parts[number], ["image_sha256", "encoder", "vector"])
            self._read[number] = {(r["image_sha256"], r["encoder"]): np.array(r["vector"], np.float32) for r in rows}
            if len(self._read) > KEPT:
                self._read.popitem(last=False)
        self._read.move_to_end(number)
        return self._read[number]


def _rows(part: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[dict[str, Any]] = pq.read_table(part, columns=columns).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{part}: not a readable Parquet shard: {e}", hint="delete it and run again") from e
    return found
