"""Pairs with their pictures for other programs: Parquet, webdataset, ``datasets``, Label Studio, Argilla."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.album import Album
from diffalign.data.files import atomic, write_json, write_text
from diffalign.data.tables import conform, shards_of
from diffalign.errors import DataError

KEPT = ("pair_id", "prompt", "rejected_prompt", "p_win", "margins", "rule", "user", "group", "source", "weight", "bin")
LABELLING = """<View>
  <Header value="$prompt"/>
  <Pairwise name="preference" toName="left,right"/>
  <Image name="left" value="$left"/>
  <Image name="right" value="$right"/>
</View>
"""


def embedded(folder: Path) -> Iterator[dict[str, Any]]:
    """Pairs in order, ``chosen`` and ``rejected`` as encoded bytes.

    Raises:
        DataError: no pairs, or a pair whose picture is not there; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    album = Album(folder)
    shards = shards_of(folder, "pairs")
    if not shards:
        raise DataError(f"{folder}: no table pairs/", hint="`diffalign pairs` and `import` make it")
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(batch_size=256):
            for row in conform(pa.Table.from_batches([batch]), "pairs").to_pylist():
                for side in ("chosen", "rejected"):
                    if row[f"{side}_id"] not in album:
                        raise DataError(f"{shard}, pair {row['pair_id']}: {row[f'{side}_id']!r} is not in images/")
                    row[side] = album.read(row[f"{side}_id"])
                yield row


def ending(data: bytes) -> str:
    """The usual file ending of an encoded picture."""
    from PIL import Image

    kind = (Image.open(io.BytesIO(data)).format or "png").lower()
    return {"jpeg": "jpg"}.get(kind, kind)


def to_parquet(folder: Path, out: Path, shard_size: int = 1000) -> list[Path]:
    """``data/train-NNNNN.parquet`` with the columns that TRL reads; ``datasets`` shows the pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    numbers = {"p_win": pa.float64(), "weight": pa.float64(), "bin": pa.int64()}
    fields = [("chosen", image), ("rejected", image), *((n, numbers.get(n, pa.string())) for n in KEPT)]
    types = {"p_win": "float64", "weight": "float64", "bin": "int64"}
    features = {n: {"dtype": types.get(n, "string"), "_type": "Value"} for n in KEPT}
    features |= {side: {"_type": "Image"} for side in ("chosen", "rejected")}
    schema = pa.schema(
        fields, metadata={"huggingface": json.dumps({"info": {"features": {n: features[n] for n, _ in fields}}})}
    )
    written = []
    for n, rows in enumerate(_batches(embedded(folder), shard_size)):
        whole = [{**r, **{s: {"bytes": r[s], "path": None} for s in ("chosen", "rejected")}} for r in rows]
        table = pa.Table.from_pylist([{f: r[f] for f, _ in fields} for r in whole], schema=schema)
        path = out / "data" / f"train-{n:05d}.parquet"
        written.append(atomic(path, lambda p, table=table: pq.write_table(table, p, row_group_size=100)))  # type: ignore[misc]
    return written


def to_webdataset(folder: Path, out: Path, shard_size: int = 1000) -> list[Path]:
    """``NNNNN.tar`` of KEY.chosen.png, KEY.rejected.png and KEY.json; the same pairs give the same bytes."""
    written = []
    for n, rows in enumerate(_batches(embedded(folder), shard_size)):

        def fill(path: Path, rows: Sequence[dict[str, Any]] = rows, n: int = n) -> None:
            with tarfile.open(path, "w") as tar:
                for i, row in enumerate(rows):
                    key = f"{n:05d}-{i:05d}"
                    about = {k: row[k] for k in KEPT if row[k] is not None}
                    parts = [(f"{key}.{s}.{ending(row[s])}", row[s]) for s in ("chosen", "rejected")]
                    for name, data in (*parts, (f"{key}.json", json.dumps(about, ensure_ascii=False).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))

        written.append(atomic(out / f"{n:05d}.tar", fill))
    return written


def to_datasets(folder: Path, out: Path) -> list[Path]:
    """What ``datasets.load_from_disk`` opens."""
    import tempfile

    from datasets import load_dataset

    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty", hint="choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        files = to_parquet(folder, Path(scratch))
        found = load_dataset("parquet", data_files=[str(f) for f in files], split="train", cache_dir=scratch)
        found.save_to_disk(out)
    return sorted(out.glob("*.arrow"))


def to_label_studio(folder: Path, out: Path) -> list[Path]:
    """``tasks.json`` with the known preferences as predictions, ``labelling.xml`` and the pictures beside them.

    Serve the folder as local files with the document root above it. Which side the winner is on is drawn by a hash.
    """
    tasks = []
    for row in embedded(folder):
        winner, files = _placed(row, out)
        shown = {s: f"/data/local-files/?d={out.name}/{f}" for s, f in files.items()}
        result = {"type": "pairwise", "from_name": "preference", "to_name": "left,right", "value": {"selected": winner}}
        known = [result] if row["p_win"] != 0.5 else []  # a tie selects nothing
        said = [{"model_version": row["rule"] or "known", "score": row["p_win"], "result": known}]
        data: dict[str, Any] = {"prompt": row["prompt"], "pair_id": row["pair_id"], **shown}
        tasks.append({"data": data, "predictions": said})
    return [write_json(out / "tasks.json", tasks), write_text(out / "labelling.xml", LABELLING)]


def to_argilla(folder: Path, out: Path) -> list[Path]:
    """``records.json``: records of Argilla 2 with fields prompt, left and right and the suggestion of ``preference``."""
    records = []
    for row in embedded(folder):
        winner, files = _placed(row, out)
        value = winner if row["p_win"] != 0.5 else "tie"
        fields: dict[str, Any] = {"prompt": row["prompt"], **files}
        records.append({
            "id": row["pair_id"], "fields": fields,
            "metadata": {k: row[k] for k in ("rule", "source", "user") if row[k] is not None},
            "suggestions": {"preference": {"value": value, "score": row["p_win"], "agent": row["rule"] or "known"}},
        })  # fmt: skip
    return [write_json(out / "records.json", records)]


def _placed(row: dict[str, Any], out: Path) -> tuple[str, dict[str, str]]:
    """The side of the winner, and the written pictures by side: which is which must not be seen from the place."""
    turned = hashlib.sha256(row["pair_id"].encode()).digest()[0] & 1
    order = ("rejected", "chosen") if turned else ("chosen", "rejected")
    files = {}
    for place, side in zip(("left", "right"), order, strict=True):
        name = f"images/{hashlib.sha256(row[side]).hexdigest()[:32]}.{ending(row[side])}"
        if not (out / name).exists():
            atomic(out / name, lambda p, data=row[side]: p.write_bytes(data))  # type: ignore[misc]
        files[place] = name
    return "right" if turned else "left", files


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    from itertools import islice

    while batch := list(islice(rows, size)):
        yield batch


EXPORTS = {
    "parquet": to_parquet, "webdataset": to_webdataset, "datasets": to_datasets, "label-studio": to_label_studio,
    "argilla": to_argilla,
}  # fmt: skip
