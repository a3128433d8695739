"""The preference dataset: a folder of ``manifest.json`` and Parquet shards in ``images/``, ``scores/``, ``pairs/`` ..."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.files import atomic, write_json
from diffalign.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1


@cache
def schemas() -> dict[str, pa.Schema]:
    """Arrow schemas of the three tables; ``datasets`` reads the image column as images."""
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
        ],
    }  # fmt: skip
    vector = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
    features = {"image": {"_type": "Image"}, "vector": vector}
    out = {}
    for name, cols in columns.items():
        info = {c: features.get(c, {"dtype": str(t).replace("double", "float64"), "_type": "Value"}) for c, t in cols}
        out[name] = pa.schema(cols, metadata={"huggingface": json.dumps({"info": {"features": info}})})
    return out


def write_shard(folder: Path, table: str, index: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as one shard of a table, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = pa.Table.from_pylist(list(rows), schema=schemas()[table])
    return atomic(folder / table / f"{index:05d}.parquet", lambda p: pq.write_table(data, p, compression="zstd"))


def read_table(folder: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a table, in order.

    Raises:
        DataError: no shard is there, or one is damaged or has other columns; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = sorted((folder / table).glob("*.parquet"))
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


def run_shards(
    folder: Path, table: str, plan: dict[str, Any], shards: int, make: Callable[[int], Sequence[dict[str, Any]]]
) -> int:
    """Make the shards that are missing; returns how many were made. The plan is fixed by the first run.

    Raises:
        DataError: the folder holds the shards of another plan.
    """
    manifest = read_manifest(folder) or {"version": VERSION, "plans": {}}
    old = manifest["plans"].get(table)
    if old is not None and old != plan:
        changed = [k for k in {**old, **plan} if old.get(k) != plan.get(k)]
        raise DataError(
            f"{folder} holds {table} of another plan (differs in {', '.join(changed)})", hint="choose another folder"
        )
    if old is None:
        manifest["plans"][table] = plan
        write_json(folder / "manifest.json", manifest)
    missing = [n for n in range(shards) if not (folder / table / f"{n:05d}.parquet").exists()]
    for n in missing:
        write_shard(folder, table, n, make(n))
    return len(missing)
