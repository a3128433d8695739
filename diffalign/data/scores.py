"""The scores table: append-only, one row a cell, a missing value is null with a reason, the latest attempt wins.

A part is ``scores/score-ATTEMPT-PLAN-SHARD.parquet``; names sort in the order of attempts. The plans stand in the manifest, so
that a killed run finds its own parts again, and several processes agree without talking to each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.files import atomic, write_json
from diffalign.data.tables import VERSION, read_manifest, schemas
from diffalign.errors import DataError

KEY = ("image_sha256", "prompt_sha256", "scorer", "version", "preprocess_version")


def cell(*key: str | None) -> bytes:
    """16 bytes for a key, so that a million of them fit in memory. Of ``scorer/value``, the scorer alone counts."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()


def filled(folder: Path, *, with_errors: bool) -> set[bytes]:
    """Cells that need no further attempt: those with a value, and those with an error where ``with_errors``."""
    rows = _rows(folder, "scores", [*KEY, "value"]) if any((folder / "scores").glob("*.parquet")) else iter(())
    return {
        cell(r["image_sha256"], r["prompt_sha256"], r["scorer"].partition("/")[0], r["version"], r["preprocess_version"])
        for r in rows
        if r["image_sha256"] is not None and (with_errors or r["value"] is not None)
    }


@dataclass(frozen=True)
class Parts:
    """The parts of one plan: ``images`` and ``scores`` of each shard."""

    folder: Path
    attempt: int
    plan: str
    images: str

    def done(self, shard: int) -> bool:
        """Whether the shard is finished: its scores are written last."""
        return self._path("scores", shard).exists()

    def has_images(self, shard: int) -> bool:
        return self._path("images", shard).exists()

    def write(self, table: str, shard: int, rows: Sequence[dict[str, Any]]) -> None:
        """One part, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = pa.Table.from_pylist(list(rows), schema=schemas()[table])
        atomic(self._path(table, shard), lambda p: pq.write_table(data, p, compression="zstd"))

    def _path(self, table: str, shard: int) -> Path:
        if table == "images":
            return self.folder / table / f"source-{self.images}-{shard:06d}.parquet"
        kind = table.removesuffix("s")
        return self.folder / table / f"{kind}-{self.attempt:04d}-{self.plan}-{shard:06d}.parquet"


def plan_parts(folder: Path, plan: dict[str, Any], pictures: dict[str, Any]) -> Parts:
    """Find the plan in the manifest, or add it as the next attempt.

    ``pictures`` is the part of the plan that says which rows are in which shard.

    Raises:
        DataError: the folder holds the scores of another set of pictures, whose ids might be the same.
    """
    manifest = read_manifest(folder) or {"version": VERSION, "plans": {}}
    plans = manifest.setdefault("scores", [])
    if plans and plans[0]["path"] != plan["path"]:
        raise DataError(
            f"{folder} holds the scores of {plans[0]['path']}, not of {plan['path']}", hint="choose another folder"
        )
    if plan not in plans:
        plans.append(plan)
        write_json(folder / "manifest.json", manifest)
    return Parts(folder, plans.index(plan), _mark(plan), _mark(pictures))


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# --- reading ------------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """One picture with its prompt and everything that was measured of it."""

    image_id: str
    sha256: str | None
    prompt: str | None
    category: str | None = None
    k: int | None = None
    path: str | None = None
    phash: str | None = None
    error: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    """The scorers that did not read the end of the prompt."""


IMAGE_COLUMNS = ("image_id", "sha256", "prompt", "k", "image")


def read_scored(folder: Path) -> list[Scored]:
    """The images of a folder, each with the latest attempt of every scorer.

    Columns are named by the scorer, with ``@version`` where one folder holds several of the same name.

    Raises:
        DataError: no images or scores, or a damaged part.
    """
    latest: dict[tuple[str | None, str | None], dict[tuple[str, str], tuple[float | None, str | None, bool | None]]] = {}
    versions: dict[str, dict[str, None]] = {}
    for row in _rows(folder, "scores", [*KEY, "value", "error"]):
        version = f"{row['version']},{row['preprocess_version']}"
        versions.setdefault(row["scorer"], {})[version] = None
        cells = latest.setdefault((row["image_sha256"], row["prompt_sha256"]), {})
        cells[row["scorer"], version] = row["value"], row["error"], row.get("truncated")
    out: dict[str, Scored] = {}
    for row in _rows(folder, "images", IMAGE_COLUMNS):
        image = row["image"] or {}
        scored = Scored(
            row["image_id"], row["sha256"], row["prompt"], row.get("category"), row["k"], image.get("path"),
            row.get("phash"), row.get("error"),
        )  # fmt: skip
        for (name, version), (value, error, cut) in latest.get((scored.sha256, prompt_key(scored.prompt)), {}).items():
            label = name if len(versions[name]) == 1 else f"{name}@{version}"
            scored.values[label] = value
            if error is not None:
                scored.errors[label] = error
            if cut:
                scored.truncated.add(label)
        out[scored.image_id] = scored
    return list(out.values())


def prompt_key(prompt: str | None) -> str | None:
    """Content hash of a prompt, null where there is none."""
    return None if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()


def _rows(folder: Path, table: str, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of all shards but for the bytes of pictures. Columns that are not ``needed`` may lack in older shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = sorted((folder / table).glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder}: no table {table}/", hint="`diffalign score` makes it")
    for shard in shards:
        try:
            file = pq.ParquetFile(shard)
            if missing := [c for c in needed if c not in file.schema_arrow.names]:
                raise DataError(f"{shard}: missing column {missing[0]!r}; found {', '.join(file.schema_arrow.names)}")
            wanted = [c for c in schemas()[table].names if c != "image" and c in file.schema_arrow.names]
            for batch in file.iter_batches(columns=[*wanted, *(["image.path"] if table == "images" else [])]):
                for row in batch.to_pylist():
                    yield {"image": None, **row}
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{shard}: not a readable Parquet shard: {e}", hint="delete it and run again") from e
