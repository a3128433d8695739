"""Evaluation suites: prompts in the files in which they are published, at the user's path. None of them is copied here."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import DataError


@dataclass(frozen=True)
class Task:
    """A prompt of a suite; ``id`` is what its published file names call it."""

    id: str
    prompt: str
    category: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a scorer must know: GenEval's row, or ``questions`` for a judge."""


@dataclass(frozen=True)
class Format:
    """How a suite is published, and how its numbers are put together."""

    read: Callable[[Path], Iterator[Task]]
    files: tuple[str, ...]
    """Patterns of the files, in a folder or on the hub."""
    overall: Literal["images", "prompts", "categories"] = "prompts"
    """Whose mean the overall number is."""
    per_prompt: int = 1
    """Pictures a prompt, as published."""
    scale: float = 1
    """What published tables multiply by."""
    blocks: int = 0
    """Prompts a block, where the deviation of blocks is published."""
    named: str | None = None
    """How published pictures are called: groups ``id`` (or ``prompt``) and ``k`` of the path without its ending."""


def _find(path: Path, *patterns: str) -> list[Path]:
    """The file itself, or those below a folder that match the first pattern that any matches."""
    if path.is_file():
        return [path]
    for pattern in patterns:
        if found := sorted(path.rglob(pattern)):
            return found
    raise DataError(f"{path}: no {' or '.join(patterns)}", hint="give the file of the suite, or the folder that holds it")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv, .tsv, .jsonl, .json or .parquet table; a plain list of strings has the column ``prompt``."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            kept = [c for c in pq.read_schema(file).names if not c.startswith("jpg_")]  # pictures are not read
            yield from pq.read_table(file, columns=kept).to_pylist()
        elif file.suffix in (".csv", ".tsv"):
            with file.open(newline="", encoding="utf-8-sig") as f:
                yield from csv.DictReader(f, delimiter="\t" if file.suffix == ".tsv" else ",")
        elif file.suffix == ".jsonl":
            for line in filter(str.strip, file.read_text(encoding="utf-8-sig").splitlines()):
                yield json.loads(line)
        elif file.suffix == ".json":
            for row in json.loads(file.read_text(encoding="utf-8-sig")):
                yield row if isinstance(row, dict) else {"prompt": row}
        else:
            for line in filter(str.strip, file.read_text(encoding="utf-8-sig").splitlines()):
                yield {"prompt": line.strip()}
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"{file}: not a readable table: {e}") from e


def _get(row: Mapping[str, Any], file: Path, *names: str) -> str:
    """The first of the columns, whatever its case."""
    lower = {str(k).lower(): v for k, v in row.items()}
    for name in names:
        if lower.get(name) not in (None, ""):
            return str(lower[name]).strip()
    raise DataError(f"{file}: a row without {names[0]!r}; found {', '.join(map(str, row))}")


def _table(*patterns: str) -> Callable[[Path], Iterator[Task]]:
    """Prompts with a category or none, numbered where they have no id."""

    def read(path: Path) -> Iterator[Task]:
        for file in _find(path, *patterns):
            for number, row in enumerate(_rows(file)):
                category = next((str(v) for k, v in row.items() if str(k).lower() == "category" and v), None)
                yield Task(str(row.get("id", number)), _get(row, file, "prompt", "prompts", "caption", "text"), category)

    return read


def _hpsv2(path: Path) -> Iterator[Task]:
    for file in _find(path, "benchmark/*.json", "*.json"):
        for number, row in enumerate(_rows(file)):
            yield Task(f"{file.stem}/{number:05d}", _get(row, file, "prompt"), file.stem)


def _geneval(path: Path) -> Iterator[Task]:
    (file, *_) = _find(path, "evaluation_metadata.jsonl")
    for number, row in enumerate(_rows(file)):
        yield Task(f"{number:05d}", _get(row, file, "prompt"), _get(row, file, "tag"), row)


def _compbench(path: Path) -> Iterator[Task]:
    for file in _find(path, "*_val.txt"):
        category = re.sub(r"_(val|train)$", "", file.stem)
        for number, row in enumerate(_rows(file)):
            yield Task(f"{category}/{number}", row["prompt"], category)


def _dpg(path: Path) -> Iterator[Task]:
    """One task an item; a question counts as no where one that it depends on was answered no."""
    (file, *_) = _find(path, "dpg_bench.csv")
    items: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(file):
        items.setdefault(_get(row, file, "item_id"), []).append(row)
    for name, rows in items.items():
        places = {_get(r, file, "proposition_id"): n for n, r in enumerate(rows)}
        questions = [
            {
                "text": _get(r, file, "question_natural_language"),
                "parents": [places[p] for p in re.findall(r"\d+", str(r.get("dependency"))) if p in places and p != "0"],
            }
            for r in rows
        ]
        beside = file.parent / "prompts" / f"{name}.txt"
        text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else _get(rows[0], file, "text")
        yield Task(name, text, None, {"questions": questions})


def _unigenbench(path: Path) -> Iterator[Task]:
    """Each testpoint is asked by its description."""
    (file, *_) = _find(path, "test_prompts_en.csv", "test_prompts_*.csv")
    for row in _rows(file):
        column = next((c for c in row if c.lower().startswith("prompt")), "prompt")
        about = json.loads(_get(row, file, column.lower().replace("prompt", "sub_dims")))
        lists = {k.lower(): v for k, v in about.items() if isinstance(v, list)}
        said = next((v for k, v in lists.items() if "desc" in k), [])
        points = next((v for k, v in lists.items() if "desc" not in k), [])
        questions = [
            {"text": f"Does the picture show this: {text}?", "dimension": re.split(r"\s*-\s*", point)[0]}
            for point, text in zip(points, said, strict=True)
        ]
        yield Task(_get(row, file, "index"), _get(row, file, column.lower()), None, {"questions": questions})


NUMBERED = r"(?:.*/)?(?P<id>\d+)_(?P<k>\d+)"
SUITES = {
    "hpsv2": Format(_hpsv2, ("benchmark/*.json",), "images", 1, 100, 80, r"(?:.*/)?(?P<id>[^/]+/\d{5})"),
    "partiprompts": Format(_table("PartiPrompts.tsv", "*.tsv", "*.parquet", "*.csv"), ("*.tsv", "*.parquet", "*.csv")),
    "drawbench": Format(_table("drawbench*", "*.csv", "*.tsv", "*.parquet", "*.json"), ("*.csv", "*.json", "*.parquet")),
    "pickapic": Format(_table("test_unique*.parquet", "*.parquet", "*.csv", "*.txt"), ("*test_unique*",)),
    "imagereward": Format(_table("benchmark-prompts.json"), ("*benchmark-prompts.json",), per_prompt=10, named=NUMBERED),
    "geneval": Format(
        _geneval, ("*evaluation_metadata.jsonl",), "categories", 4, named=r"(?:.*/)?(?P<id>\d{5})/samples/(?P<k>\d+)"
    ),
    "t2i-compbench": Format(_compbench, ("*_val.txt",), "categories", 10, named=r"(?:.*/)?(?P<prompt>[^/]+)_(?P<k>\d{6})"),
    "dpg-bench": Format(_dpg, ("*dpg_bench.csv", "*prompts/*.txt"), per_prompt=4, scale=100),
    "unigenbench": Format(_unigenbench, ("*test_prompts_*.csv",), per_prompt=4, named=NUMBERED),
}


@dataclass(frozen=True)
class Suite:
    """The tasks of one suite."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def format(self) -> Format:
        return SUITES[self.name]

    def finder(self) -> Callable[[str, str | None], Task | None]:
        """f(path, prompt) -> the task of a picture: by how published pictures are called, or by its prompt."""
        by_id, by_prompt = {t.id: t for t in self.tasks}, {t.prompt: t for t in reversed(self.tasks)}

        def find(path: str, prompt: str | None) -> Task | None:
            found = re.fullmatch(self.format.named or "(?!)", re.sub(r"\.\w+$", "", path))
            said = found.groupdict() if found else {}
            named = by_id.get(said.get("id", "")) or by_prompt.get(said.get("prompt", ""))
            if prompt is None or (named is not None and named.prompt == prompt.strip()):
                return named
            return by_prompt.get(prompt.strip())

        return find


def read_suite(name: str, path: Path) -> Suite:
    """The suite ``name`` of SUITES in its published files.

    Raises:
        DataError: no such suite or file, or a file of another form.
    """
    if name not in SUITES:
        raise DataError(f"no suite {name!r}", hint=f"known: {', '.join(SUITES)}")
    try:
        tasks = tuple(SUITES[name].read(path))
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: not the files of {name}: {type(e).__name__}: {e}") from e
    if not tasks:
        raise DataError(f"{path}: no prompt of {name}")
    return Suite(name, tasks)
