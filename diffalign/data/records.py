"""Rows of large tables in numbered chunks: only the columns that are asked for, and no chunk that nobody wants."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.lines import csv_rows, jsonl_rows
from diffalign.data.sources import PICTURES
from diffalign.data.tfrecords import tfrecord_rows
from diffalign.errors import DataError

Rows = list[dict[str, Any]]
BLOCK = 1 << 20


def find_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """The file itself, or those of a folder that match the first pattern that any matches.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        return [path]
    for pattern in patterns:
        if found := sorted(f for f in path.rglob(pattern) if not f.name.startswith(".")):
            return found
    raise DataError(f"{path}: no {' or '.join(patterns)}", hint="give the file of the dataset, or the folder that holds it")


def chunks(
    files: Sequence[Path], columns: Sequence[str], skip: Sequence[str], size: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Rows | None]]:
    """(number, rows) of every chunk of ``size`` rows or less; None for those not ``wanted``, whose pictures are not read.

    Of Parquet only ``columns`` (all if empty) without those in ``skip`` are read. A chunk never spans two files.

    Raises:
        DataError: a file that is no table; names it, and the line.
    """
    number = 0
    for file in files:
        found = _parquet(file, columns, skip, size, number, wanted) if file.suffix == ".parquet" else _lines(file, size)
        for rows in found:
            yield number, rows if wanted(number) else None
            number += 1


def in_chunks(rows: Iterable[dict[str, Any]], size: int) -> Iterator[tuple[int, Rows]]:
    """Of rows that come one after the other."""
    walk, number = iter(rows), 0
    while chunk := list(islice(walk, size)):
        yield number, chunk
        number += 1


def _parquet(
    file: Path, columns: Sequence[str], skip: Sequence[str], size: int, first: int, wanted: Callable[[int], bool]
) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = [n for n in table.schema_arrow.names if (not columns or n in columns) and n not in skip]
        for group in range(table.num_row_groups):
            count = -(-table.metadata.row_group(group).num_rows // size)
            if not any(wanted(first + i) for i in range(count)):
                yield from ([] for _ in range(count))
            else:
                data = table.read_row_group(group, columns=names)
                for start in range(0, len(data), size):
                    part = data.slice(start, size)
                    yield part.to_pylist() if wanted(first + start // size) else []
            first += count
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{file}: not a readable Parquet file: {e}") from e


def _lines(file: Path, size: int) -> Iterator[Rows]:
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".tfrecord": tfrecord_rows}
    if file.suffix not in readers:
        raise DataError(f"{file}: not a table", hint=f"use .parquet, {', '.join(readers)}")
    try:
        for _, rows in in_chunks(readers[file.suffix](file), size):
            yield rows
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise DataError(f"{file}: not a readable table: {e}") from e


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of one JSON list, one at a time: the lists of a million pairs need gigabytes when parsed whole."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig") as f:
        text = f.read(BLOCK).lstrip()
        if not text.startswith("["):
            raise DataError(f"{file}: expected a JSON list")
        at, number = 1, 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and text[at] == "]":
                return
            try:
                row, end = decoder.raw_decode(text, at)
            except ValueError as e:
                more = f.read(BLOCK)
                if not more:
                    raise DataError(f"{file}, item {number}: not JSON, or cut short: {e}") from e
                text, at = text[at:] + more, 0
                continue
            if not isinstance(row, dict):
                raise DataError(f"{file}, item {number}: expected a JSON object")
            yield row
            at, number = end, number + 1


def gathered(rows: Iterable[dict[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """``{"rows": [...]}`` of the rows that share a value, in the order in which values appear."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(row.get(column), []).append(row)
    for group in groups.values():
        yield {"rows": group}


def folder_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Pairs of ``chosen/NAME`` and ``rejected/NAME`` (endings may differ), the prompt in NAME.txt beside either or above.

    Raises:
        DataError: one of the folders is missing.
    """
    sides = {}
    for side in ("chosen", "rejected"):
        if not (path / side).is_dir():
            raise DataError(
                f"{path}: no folder {side}/", hint="it needs chosen/ and rejected/ with pictures of the same names"
            )
        found = sorted(f for f in (path / side).rglob("*") if f.suffix.lower() in PICTURES)
        sides[side] = {str(f.relative_to(path / side).with_suffix("")): f for f in found}
    for name in dict.fromkeys([*sides["chosen"], *sides["rejected"]]):
        row: dict[str, Any] = {side: str(of[name].relative_to(path)) for side, of in sides.items() if name in of}
        texts = [path / folder / f"{name}.txt" for folder in ("", "chosen", "rejected")]
        text = next((t for t in texts if t.is_file()), None)
        yield {**row, "prompt": text.read_text(encoding="utf-8-sig").strip() if text else None}
