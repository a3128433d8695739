"""The preference dataset: a folder of ``manifest.json`` and Parquet shards in ``images/``, ``scores/``, ``pairs/`` ..."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffalign.data.files import atomic, write_json
from diffalign.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    Rows: TypeAlias = Sequence[dict[str, Any]] | pa.Table

VERSION = 1
NOTES = b"diffalign"
PICTURES = 64
"""Images a row group: what is read to get at one of them."""


@cache
def schemas() -> dict[str, pa.Schema]:
    """Arrow schemas of the tables; ``datasets`` reads the image column as images."""
    import pyarrow as pa

    s, i, f = pa.string(), pa.int64(), pa.float64()
    image = pa.struct([("bytes", pa.binary()), ("path", s)])
    columns: dict[str, list[tuple[str, pa.DataType]]] = {
        "images": [
            ("image_id", s), ("sha256", s), ("prompt_id", s), ("prompt", s), ("negative_prompt", s), ("image", image),
            ("k", i), ("seed", i), ("model", s), ("revision", s), ("adapter", s), ("sampler", s),
            ("num_inference_steps", i), ("guidance_scale", f), ("width", i), ("height", i), ("versions", s), ("licence", s),
            ("category", s), ("phash", s), ("error", s),
        ],
        "scores": [
            ("image_sha256", s), ("prompt_sha256", s), ("scorer", s), ("version", s), ("preprocess_version", s),
            ("value", f), ("error", s), ("truncated", pa.bool_()),
        ],
        "embeddings": [("image_sha256", s), ("encoder", s), ("vector", pa.list_(pa.float32()))],
        "pairs": [
            ("pair_id", s), ("prompt_id", s), ("prompt", s), ("chosen_id", s), ("rejected_id", s), ("p_win", f),
            ("margins", s), ("rule", s), ("scores", s), ("annotator", s), ("user", s), ("group", s), ("source", s),
            ("weight", f), ("bin", i), ("rejected_prompt", s),
        ],
        "annotations": [
            ("image_sha256", s), ("prompt_sha256", s), ("kind", s), ("image", image), ("words", pa.list_(s)),
        ],
        "groups": [
            ("group_id", s), ("prompt_id", s), ("prompt", s), ("image_ids", pa.list_(s)), ("rewards", pa.list_(f)),
            ("scores", s),
        ],
    }  # fmt: skip

    def of(dtype: str) -> dict[str, Any]:
        return {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"}

    lists = {"vector": of("float32"), "image_ids": of("string"), "rewards": of("float64"), "words": of("string")}
    features = {"image": {"_type": "Image"}, **lists}
    out = {}
    for name, cols in columns.items():
        info = {c: features.get(c, {"dtype": str(t).replace("double", "float64"), "_type": "Value"}) for c, t in cols}
        out[name] = pa.schema(cols, metadata={"huggingface": json.dumps({"info": {"features": info}})})
    return out


def write_shard(folder: Path, table: str, index: int, rows: Rows, notes: dict[str, Any] | None = None) -> Path:
    """Write rows as one shard of a table, atomically; ``notes`` stand in the file's own metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schemas()[table]
    data = rows.cast(schema) if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    about = {NOTES: json.dumps(notes)} if notes is not None else {}
    data = data.replace_schema_metadata({**schema.metadata, **about})
    size = PICTURES if table == "images" else None
    path = shard_path(folder, table, index)
    return atomic(path, lambda p: pq.write_table(data, p, compression="zstd", row_group_size=size))


def shards_of(folder: Path, table: str) -> list[Path]:
    """The shards that are there, in order."""
    return sorted((folder / table).glob("*.parquet"))


def shard_path(folder: Path, table: str, index: int) -> Path:
    return folder / table / f"{index:05d}.parquet"


def read_notes(shard: Path) -> dict[str, Any]:
    """What :func:`write_shard` noted in a shard; empty where it noted nothing."""
    import pyarrow.parquet as pq

    found: dict[str, Any] = json.loads((pq.read_schema(shard).metadata or {}).get(NOTES, b"{}"))
    return found


def read_table(folder: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a table, in order.

    Raises:
        DataError: no shard is there, or one is damaged or has other columns; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = shards_of(folder, table)
    if not shards:
        raise DataError(f"{folder}: no table {table}/", hint="a dataset folder holds images/, pairs/ and manifest.json")
    parts = []
    for shard in shards:
        try:
            parts.append(pq.read_table(shard, columns=None if columns is None else list(columns)))
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{shard}: not a readable Parquet shard: {e}", hint="delete it and run again") from e
        missing = [c for c in columns or schemas()[table].names if c not in parts[-1].column_names]
        if missing:
            raise DataError(f"{shard}: missing column {missing[0]!r}; found {', '.join(parts[-1].column_names)}")
    return pa.concat_tables(parts)


def conform(rows: pa.Table, table: str) -> pa.Table:
    """With exactly the columns of a table; those that an older shard lacks are null."""
    import pyarrow as pa

    schema = schemas()[table]
    columns = [rows[f.name] if f.name in rows.column_names else pa.nulls(len(rows), f.type) for f in schema]
    return pa.table(columns, names=schema.names).cast(schema)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as e:
        raise DataError(f"{path}: damaged: {e}") from e
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise DataError(f"{path}: not a manifest of version {VERSION}")
    return manifest


def fingerprint(folder: Path, files: Sequence[Path]) -> str:
    """Of the names, sizes and footers of shards below a folder; their times change when they are copied."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 4096))
            digest.update(f"{file.relative_to(folder)}|{size}|".encode() + f.read())
    return digest.hexdigest()[:16]


def fix_plan(folder: Path, table: str, plan: dict[str, Any]) -> None:
    """Write the plan of a table into the manifest, or compare it with the one that is there.

    Raises:
        DataError: the folder holds the shards of another plan.
    """
    manifest = read_manifest(folder) or {"version": VERSION, "plans": {}}
    old = manifest["plans"].get(table)
    if old is not None and _stated(old) != _stated(plan):
        changed = [k for k in {**old, **plan} if _stated(old.get(k)) != _stated(plan.get(k))]
        raise DataError(
            f"{folder} holds {table} of another plan (differs in {', '.join(changed)})", hint="choose another folder"
        )
    if old is None:
        manifest["plans"][table] = plan
        write_json(folder / "manifest.json", manifest)


def _stated(value: Any) -> Any:
    """A plan without its empty keys: a version that knows more of them goes on with the plans of an older one."""
    if not isinstance(value, dict):
        return value or None if isinstance(value, list) else value
    return {k: _stated(v) for k, v in value.items() if v is not None and v != [] and v != {}} or None


def run_shards(
    folder: Path,
    table: str,
    plan: dict[str, Any],
    shards: int,
    make: Callable[[int], Rows | tuple[Rows, dict[str, Any]]],
    rank: int = 0,
    world: int = 1,
) -> int:
    """Make the missing shards of this process (``rank`` is the remainder by ``world``); returns how many were made.

    The plan is fixed by the first run. ``make`` gives the rows, or rows and notes. Processes share nothing but the folder.

    Raises:
        DataError: the folder holds the shards of another plan.
    """
    fix_plan(folder, table, plan)
    missing = [n for n in range(rank, shards, world) if not shard_path(folder, table, n).exists()]
    for n in missing:
        made = make(n)
        write_shard(folder, table, n, *(made if isinstance(made, tuple) else (made,)))
    return len(missing)
