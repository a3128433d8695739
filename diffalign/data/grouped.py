"""Scored images by prompt, column by column: a million rows in a few hundred megabytes, and no picture read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.data.scores import KEY
from diffalign.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Units = Literal["native", "std", "rank"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
JOIN = 1 << 18  # rows of scores that are looked up at once


@dataclass
class Images:
    """The images of some dataset folders in one fixed order, and their measured values; NaN where there is none."""

    table: pa.Table
    """image_id, sha256, prompt_id, prompt and, where known, phash and error."""
    shards: list[Path]
    shard: Ints
    """(N,) which of ``shards`` holds the row."""
    row: Ints
    """(N,) its place there."""
    prompt: Ints
    """(N,) which of ``prompts``; -1 where it has none."""
    prompts: list[str]
    values: dict[str, Floats] = field(default_factory=dict)
    """(N,) by ``scorer``, or ``scorer@version`` where there are several versions of one name."""

    def __len__(self) -> int:
        return len(self.row)

    def value(self, name: str) -> Floats:
        """Raises DataError: nothing of that name was measured, or several versions were."""
        if name in self.values:
            return self.values[name]
        versions = [n for n in self.values if n.startswith(f"{name}@")]
        hint = f"several versions: say one of {', '.join(versions)}" if versions else f"measured: {', '.join(self.values)}"
        raise DataError(f"the tables hold no score {name!r}", hint=hint)

    def groups(self) -> tuple[Ints, Ints]:
        """Rows with a prompt in the order of prompts, and where each prompt begins there (P + 1)."""
        order = np.argsort(self.prompt, kind="stable").astype(np.int64)
        order = order[np.searchsorted(self.prompt[order], 0) :]
        return order, np.searchsorted(self.prompt[order], np.arange(len(self.prompts) + 1))


def read_images(folders: Sequence[Path]) -> Images:
    """The images of dataset folders without their pictures, with the values of all their scores tables.

    Raises:
        DataError: a folder without images, or a shard that cannot be read.
    """
    import pyarrow as pa

    parts, shards, shard, row = [], list[Path](), [], []
    for folder in folders:
        found = sorted((folder / "images").glob("*.parquet"))
        if not found:
            raise DataError(f"{folder}: no table images/", hint="`diffalign generate`, `score` and `import` make it")
        for path in found:
            part = _read(path, ("image_id", "sha256", "prompt_id", "prompt"), ("phash", "error"))
            parts.append(part)
            shard.append(np.full(len(part), len(shards)))
            row.append(np.arange(len(part)))
            shards.append(path)
    table = pa.concat_tables(parts).combine_chunks()
    prompts, codes = coded(table["prompt"])
    out = Images(table, shards, np.concatenate(shard).astype(np.int64), np.concatenate(row).astype(np.int64), codes, prompts)
    out.values = _values(out, [s for f in folders for s in sorted((f / "scores").glob("*.parquet"))])
    return out


def _read(path: Path, needed: Sequence[str], wanted: Sequence[str] = ()) -> pa.Table:
    """Columns of a shard as strings; those that are only ``wanted`` are null where it lacks them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        there = file.schema_arrow.names
        if missing := [c for c in needed if c not in there]:
            raise DataError(f"{path}: missing column {missing[0]!r}; found {', '.join(there)}")
        table = file.read(columns=[c for c in (*needed, *wanted) if c in there])
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet shard: {e}", hint="delete it and run again") from e
    for name in wanted:
        if name not in there:
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
    return table.select([*needed, *wanted]).replace_schema_metadata(None)


def _values(images: Images, shards: Sequence[Path]) -> dict[str, Floats]:
    """Join of the scores by (image, prompt); of several attempts at one cell the latest counts, also where it failed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digests = pa.array([hashlib.sha256(p.encode()).hexdigest() for p in images.prompts], pa.string())
    of_row = digests.take(pa.array(images.prompt, mask=images.prompt < 0))
    key = _keys(images.table["sha256"], of_row)
    keys = pc.unique(key)
    place = _places(key, keys)
    del digests, of_row, key
    columns: dict[tuple[str, str], Floats] = {}
    for scores in _joined(shards):
        at = _places(_keys(scores["image_sha256"], scores["prompt_sha256"]), keys)
        value = scores["value"].to_numpy()
        version = pc.binary_join_element_wise(scores["version"], scores["preprocess_version"], ",")
        names, codes = coded(pc.binary_join_element_wise(scores["scorer"], version, "@"))
        for code, name in enumerate(names):
            mine = (codes == code) & (at >= 0)
            scorer, _, which = name.rpartition("@")
            column = columns.setdefault((scorer, which), np.full(len(keys), np.nan))
            column[at[mine]] = value[mine]  # in order: the last attempt stays
    count = {scorer: sum(s == scorer for s, _ in columns) for scorer, _ in columns}
    known = place >= 0
    out = {}
    for (scorer, which), column in columns.items():
        values = np.full(len(images), np.nan)
        values[known] = column[place[known]]
        out[scorer if count[scorer] == 1 else f"{scorer}@{which}"] = values
    return out


def _joined(shards: Sequence[Path]) -> Iterator[pa.Table]:
    """The scores, about JOIN rows at a time: looking up costs a table of all images each time."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for path in shards:
        part = _read(path, [*KEY, "value"])
        waiting.append(part.set_column(part.column_names.index("value"), "value", part["value"].cast(pa.float64())))
        if sum(map(len, waiting)) >= JOIN:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _keys(image: Any, prompt: Any) -> Any:
    """128 bits of either hash: shorter to keep, and as good as the whole."""
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*(pc.utf8_slice_codeunits(h, 0, 32) for h in (image, prompt)), "")


def coded(column: Any) -> tuple[list[str], Ints]:
    """Distinct strings of a column in order of appearance, and which of them each row has; -1 for null."""
    import pyarrow as pa

    found = column.dictionary_encode()
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
    codes: Ints = found.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found.dictionary.to_pylist(), codes


def _places(wanted: Any, among: Any) -> Ints:
    """Where each value stands in ``among``, -1 where it does not."""
    import pyarrow.compute as pc

    found = pc.index_in(wanted, value_set=among, skip_nulls=True).fill_null(-1)
    out: Ints = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return out


# --- units ----------------------------------------------------------------------------------------------------------------


def within_std(values: Floats, prompt: Ints) -> float:
    """Deviation within prompts, pooled over all of them: sqrt(sum (v - mean of its prompt)^2 / (N - P)), of finite values."""
    ok = np.isfinite(values) & (prompt >= 0)
    v, codes = values[ok], np.unique(prompt[ok], return_inverse=True)[1]
    counts = np.bincount(codes)
    freedom = len(v) - len(counts)
    if freedom <= 0:
        return float("nan")
    means = np.bincount(codes, v) / counts
    return float(np.sqrt(np.square(v - means[codes]).sum() / freedom))


def within_rank(values: Floats, prompt: Ints) -> Floats:
    """(N,) the share of the prompt's other images that are worse, ties one half; NaN alone or without a value."""
    out = np.full(len(values), np.nan)
    ok = np.flatnonzero(np.isfinite(values) & (prompt >= 0))
    order = ok[np.lexsort((values[ok], prompt[ok]))]
    if not len(order):
        return out
    g, v = prompt[order], values[order]
    place = np.arange(len(order))
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_run = new_group | np.r_[True, v[1:] != v[:-1]]
    first = place[new_group][np.cumsum(new_group) - 1]
    size = np.diff(np.r_[place[new_group], len(order)])[np.cumsum(new_group) - 1]
    starts = place[new_run]
    middle = (starts + np.diff(np.r_[starts, len(order)]) / 2 - 0.5)[np.cumsum(new_run) - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        out[order] = np.where(size > 1, (middle - first) / (size - 1), np.nan)
    return out


def in_units(values: Floats, prompt: Ints, units: Units, name: str) -> Floats:
    """Values as they are, in deviations within prompts, or as ranks within prompts.

    Raises:
        DataError: they do not vary within any prompt.
    """
    if units == "native":
        return values
    if units == "rank":
        return within_rank(values, prompt)
    std = within_std(values, prompt)
    if not std > 0:
        raise DataError(f"the score {name} does not vary within prompts", hint="use units=native, or more images a prompt")
    return values / std
