"""Prompts from text, CSV, JSON lines, Parquet or a hub dataset."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.lines import csv_rows, jsonl_rows
from diffalign.errors import DataError

PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Prompt:
    """A prompt and what to steer away from."""

    text: str
    negative: str | None = None

    @property
    def id(self) -> str:
        """Content hash: the same prompt has the same id, and so the same seeds, wherever it stands."""
        return hashlib.sha256(json.dumps([self.text, self.negative]).encode()).hexdigest()[:16]


def normalised(text: str) -> str:
    """A prompt without case, punctuation and spaces, for telling that two are the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def read_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file (.txt one a line, .csv, .jsonl, .parquet) or a hub dataset id, duplicates dropped.

    Tables need a column ``prompt`` (or caption, text); ``negative_prompt`` is optional.

    Raises:
        DataError: no such file or dataset, no prompt column, an empty prompt, or no prompt at all.
    """
    path = Path(source)
    readers = {".txt": _text, ".csv": csv_rows, ".jsonl": jsonl_rows, ".parquet": _parquet}
    try:
        if path.suffix in readers:
            if not path.is_file():
                raise DataError(f"no such prompt file: {path}")
            rows: Iterable[dict[str, Any]] = readers[path.suffix](path)
        elif path.exists():
            raise DataError(f"{path}: not a prompt file", hint=f"use one of {', '.join(readers)}")
        else:
            rows = _hub(str(source))
        prompts: dict[Prompt, None] = {}
        for number, row in enumerate(rows, 1):
            prompts[_prompt(row, f"{source}, row {number}")] = None
            if limit is not None and len(prompts) >= limit:
                break
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise DataError(f"{source}: cannot read the prompts: {e}") from e
    if not prompts:
        raise DataError(f"{source}: it holds no prompt")
    return list(prompts)


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    column = next((c for c in PROMPT_COLUMNS if c in row), None)
    if column is None:
        raise DataError(f"{where}: no column 'prompt'; found {', '.join(map(str, row)) or 'none'}", hint="rename the column")
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the prompt is empty")
    return Prompt(text.strip(), row.get("negative_prompt") or None)


def _text(path: Path) -> Iterable[dict[str, Any]]:
    return ({"prompt": line} for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def _parquet(path: Path) -> Iterable[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        wanted = [c for c in (*PROMPT_COLUMNS, "negative_prompt") if c in file.schema_arrow.names]
        for batch in file.iter_batches(columns=wanted or None):
            yield from batch.to_pylist()
    except pa.ArrowException as e:
        raise DataError(f"{path}: not a readable Parquet file: {e}") from e


def _hub(name: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split="train", streaming=True)
        keep = [c for c in (*PROMPT_COLUMNS, "negative_prompt") if c in (dataset.column_names or [])]
        return dataset.select_columns(keep) if keep else dataset
    except Exception as e:
        raise DataError(
            f"{name}: neither a file nor a dataset that can be loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from e
