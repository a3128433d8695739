"""Rows of text tables, one at a time: CSV and JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import DataError


def csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV with a head."""
    with file.open(newline="", encoding="utf-8-sig") as f:
        yield from csv.DictReader(f)


def jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    with file.open(encoding="utf-8-sig") as f:
        yield from json_lines(f, str(file))


def json_lines(lines: Iterable[str | bytes], where: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines; blank lines are none.

    Raises:
        DataError: a line is no JSON object; names it.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise DataError(f"{where}, line {number}: not JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f"{where}, line {number}: expected a JSON object")
        yield row
