"""Pictures and their prompts from wherever they lie: folders, globs, tables, tars, datasets. Row by row, undecoded."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.lines import json_lines
from diffalign.data.prompts import PROMPT_COLUMNS
from diffalign.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "file_name", "image_path", "path", "jpg", "png", "webp")


@dataclass(frozen=True)
class Row:
    """One picture and what is said of it. ``id`` is stable for as long as the source is: a path or a position."""

    id: str
    prompt: str | None
    open: Callable[[], bytes]
    """The encoded picture; raises :class:`DataError` or OSError where there is none."""
    uri: str | None = None
    """Where the bytes lie, if in a file of their own."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """The other columns: a category, what GenEval asks for."""


@dataclass(frozen=True)
class Source:
    """Rows that can be walked again, and a fingerprint that changes when the files do."""

    rows: Callable[[], Iterator[Row]]
    fingerprint: str


def clean(text: str) -> str:
    """Text that UTF-8 can hold: file names and JSON may bring halves of characters, which no table takes."""
    return text.encode("utf-8", "replace").decode()


def open_source(path: str, root: str | None = None) -> Source:
    """Any set of pictures, by local path, fsspec URL or hub dataset id.

    A folder (prompts in ``metadata.jsonl``, ``metadata.csv`` or a .txt of the same name), a glob, a .csv, .jsonl or .parquet
    table, webdataset .tar files, what ``datasets`` saved, or a dataset folder of ours. Paths that a table names are
    relative to ``root`` (the table's folder, if not given) and may not leave it.

    Raises:
        DataError: nothing is there, or nothing that holds pictures.
    """
    from fsspec.core import url_to_fs

    try:
        fs, inner = url_to_fs(str(Path(path).expanduser()) if "://" not in path else path)
    except (ValueError, ImportError) as e:
        raise DataError(f"{path}: {e}") from e
    if any(c in path for c in "*?["):
        return _of_files(fs, sorted(fs.glob(inner)), _folder_of_glob(inner), path, root)
    if fs.isfile(inner):
        return _of_files(fs, [inner], posixpath.dirname(inner), path, root)
    if not fs.isdir(inner):
        if "://" in path or path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix:
            raise DataError(f"{path}: no such file or folder")
        return Source(lambda: _named(undecoded(lambda: _load_hub(path), path), None, path), path)
    if shards := sorted(fs.glob(f"{inner}/images/*.parquet")):
        return _of_files(fs, shards, inner, path, root)
    if fs.exists(f"{inner}/dataset_info.json") and fs.exists(f"{inner}/state.json"):
        files = sorted(fs.glob(f"{inner}/*.arrow"))
        return Source(lambda: _named(undecoded(lambda: _load_saved(path), path), None, path), _fingerprint(fs, files))
    return _of_files(fs, sorted(fs.find(inner)), inner, path, root)


def _of_files(fs: Any, files: list[str], folder: str, where: str, root: str | None) -> Source:
    """Pictures among ``files``; else tars; else tables."""

    def of(*suffixes: str) -> list[str]:
        return [f for f in files if f.lower().endswith(suffixes) and not posixpath.basename(f).startswith(".")]

    base = _Root.of(root) if root is not None else _Root(fs, folder)
    if pictures := of(*PICTURES):
        beside = {f for f in files if f.lower().endswith((".txt", ".jsonl", ".csv"))}
        mark = _fingerprint(fs, [*pictures, *sorted(beside)])
        return Source(lambda: _pictures(fs, pictures, folder), mark)
    for suffix, read in ((".tar", _tars), (".parquet", _parquet), (".jsonl", _jsonl), (".csv", _csv)):
        if found := of(suffix):
            mark = _fingerprint(fs, found)
            if suffix == ".tar":
                return Source(lambda: _tars(fs, found, folder), mark)
            return Source(
                lambda read=read: itertools.chain.from_iterable(  # type: ignore[misc]
                    _named(read(fs, f), base, _relative(f, folder)) for f in found
                ),
                mark,
            )
    raise DataError(f"{where}: no pictures, tars or tables", hint=f"pictures end in {', '.join(PICTURES)}")


def _folder_of_glob(pattern: str) -> str:
    first = min(pattern.index(c) for c in "*?[" if c in pattern)
    return posixpath.dirname(pattern[:first])


def _relative(file: str, folder: str) -> str:
    return file.removeprefix(folder).lstrip("/")


def _fingerprint(fs: Any, files: Iterable[str]) -> str:
    """Names, sizes and times of files; their contents are hashed when they are read."""
    digest = hashlib.sha256()
    for file in files:
        try:
            info = fs.info(file)
        except FileNotFoundError:  # a link to nowhere: its row will say so
            info = {}
        digest.update(repr((file, info.get("size"), info.get("mtime") or info.get("created"), info.get("ETag"))).encode())
    return digest.hexdigest()[:16]


# --- pictures in files --------------------------------------------------------------------------------------------------


def _pictures(fs: Any, files: list[str], folder: str) -> Iterator[Row]:
    table = _metadata(fs, folder)
    for file in files:
        name = _relative(file, folder)
        said = dict(table.get(name, {}))
        prompt = _prompt(said)
        beside = posixpath.splitext(file)[0] + ".txt"
        if prompt is None and fs.isfile(beside):
            prompt = fs.cat_file(beside).decode("utf-8", "replace").strip() or None
        yield Row(clean(name), prompt, lambda file=file: fs.cat_file(file), clean(fs.unstrip_protocol(file)), said)  # type: ignore[misc]


def _metadata(fs: Any, folder: str) -> dict[str, Mapping[str, Any]]:
    """Columns by file name: the convention of ``datasets``' image folders."""
    for name, read in (("metadata.jsonl", _jsonl), ("metadata.csv", _csv)):
        if fs.isfile(f"{folder}/{name}"):
            rows = list(read(fs, f"{folder}/{name}"))
            return {posixpath.normpath(str(r["file_name"])): r for r in rows if r.get("file_name")}
    return {}


# --- tables -------------------------------------------------------------------------------------------------------------


def _csv(fs: Any, file: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 27)  # base64 in a cell is long, but not endless
    with fs.open(file, "r", encoding="utf-8-sig", newline="") as lines:
        try:
            yield from csv.DictReader(lines)
        except (csv.Error, UnicodeDecodeError) as e:
            raise DataError(f"{file}: not a readable table: {e}") from e


def _jsonl(fs: Any, file: str) -> Iterator[dict[str, Any]]:
    with fs.open(file, "rb") as lines:
        yield from json_lines(lines, file)


def _parquet(fs: Any, file: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(file, "rb") as raw:
            for batch in pq.ParquetFile(raw).iter_batches(batch_size=32):  # encoded pictures are large
                yield from batch.to_pylist()
    except pa.ArrowException as e:
        raise DataError(f"{file}: not a readable Parquet file: {e}") from e


@dataclass(frozen=True)
class _Root:
    """The folder that paths in data may not leave."""

    fs: Any
    folder: str

    @classmethod
    def of(cls, url: str) -> _Root:
        from fsspec.core import url_to_fs

        return cls(*url_to_fs(url))

    def inside(self, name: str) -> str:
        """The path of ``name`` (relative, or a URL under the folder).

        Raises:
            DataError: it leads out.
        """
        here = self.fs.unstrip_protocol(self.folder).rstrip("/") + "/"
        plain = name.removeprefix(here)
        path = posixpath.normpath(posixpath.join(self.folder, plain))
        out = "://" in plain or "::" in plain or not path.startswith(self.folder.rstrip("/") + "/")
        if not out and "file" in _protocols(self.fs):  # a link may lead out as well
            out = not Path(path).resolve().is_relative_to(Path(self.folder).resolve())
        if out:
            raise DataError(f"the image path {name!r} leads out of {self.folder}", hint="image_root= names another folder")
        return path


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _named(rows: Iterable[Mapping[str, Any]], root: _Root | None, where: str) -> Iterator[Row]:
    """Rows of a table by their column names; what is wrong with one picture is said when it is opened."""
    column = None
    for number, row in enumerate(rows):
        column = column or next((c for c in IMAGE_COLUMNS if c in row), None)
        if column is None:
            raise DataError(f"{where}: no image column; found {', '.join(map(str, row))}", hint=f"call it {IMAGE_COLUMNS[0]}")
        image = row.get(column)
        said = {k: v for k, v in row.items() if k != column}
        name = clean(str(row.get("image_id") or f"{where}#{number}"))
        yield Row(name, _prompt(row), lambda image=image: _bytes(image, root), _uri(image, root), said)  # type: ignore[misc]


def _prompt(row: Mapping[str, Any]) -> str | None:
    found = next((row[c] for c in PROMPT_COLUMNS if row.get(c) not in (None, "")), None)
    return None if found is None else clean(str(found))


def _bytes(image: Any, root: _Root | None) -> bytes:
    match image:
        case bytes():
            return image
        case {"bytes": bytes() as data}:
            return data
        case (str() as name) | {"path": str() as name} if name and root is not None:
            found: bytes = root.fs.cat_file(root.inside(name))
            return found
    if image and isinstance(image.get("path") if isinstance(image, dict) else image, str) and root is None:
        raise DataError("the row names no picture that is here", hint="image_root= names the folder of its paths")
    raise DataError(
        "the row names no picture" if not image else f"a picture must be bytes or a path, not {type(image).__name__}"
    )


def picture_bytes(image: Any, folder: str | None, root: str | None = None) -> bytes:
    """The encoded picture of an image column: bytes, or a path in ``folder`` (if it lies in one) or under ``root``.

    Raises:
        DataError: there is none, or its path leads out of both.
    """
    from fsspec.core import url_to_fs

    try:
        return _bytes(image, None if folder is None else _Root(*url_to_fs(folder)))
    except DataError:
        if root is None:
            raise
    return _bytes(image, _Root.of(root))


def _uri(image: Any, root: _Root | None) -> str | None:
    match image:
        case (str() as name) | {"bytes": None, "path": str() as name} if name and root is not None:
            try:
                found: str = root.fs.unstrip_protocol(root.inside(name))
            except DataError:
                return None
            return clean(found)
    return None


# --- tars ---------------------------------------------------------------------------------------------------------------


def _tars(fs: Any, files: list[str], folder: str) -> Iterator[Row]:
    """Samples of webdataset: files that share a name up to the first dot. Only regular files are read, none is unpacked."""
    for file in files:
        name = _relative(file, folder)
        key, parts, broken = "", dict[str, bytes](), None
        try:
            with fs.open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    new, kind = _key(member.name)
                    if new != key:
                        yield from _sample(f"{name}/{key}", parts)
                        key, parts = new, {}
                    parts[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
        except (tarfile.TarError, EOFError) as e:
            broken = f"the tar is damaged: {e}"
        yield from _sample(f"{name}/{key}", parts)
        if broken:  # the next one may be whole
            yield Row(clean(name), None, _raiser(broken))


def _raiser(reason: str) -> Callable[[], bytes]:
    def fail() -> bytes:
        raise DataError(reason)

    return fail


def _key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), kind.lower()


def _sample(name: str, parts: dict[str, bytes]) -> Iterator[Row]:
    kind = next((k for k in parts if f".{k}".endswith(PICTURES)), None)
    if kind is None:
        return
    said: dict[str, Any] = {}
    if "json" in parts:
        try:
            loaded = json.loads(parts["json"])
            said = loaded if isinstance(loaded, dict) else {}
        except ValueError:  # the picture is still there; a prompt may stand in the text beside it
            said = {}
    text = next((parts[k].decode("utf-8", "replace").strip() for k in ("txt", "caption", "prompt") if k in parts), None)
    yield Row(clean(name), text or _prompt(said), lambda data=parts[kind]: data, None, said)  # type: ignore[misc]


# --- datasets -----------------------------------------------------------------------------------------------------------


def _load_hub(name: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, split="train", streaming=True)


def _load_saved(path: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(path)
    return found["train"] if isinstance(found, DatasetDict) else found


def undecoded(open_dataset: Callable[[], Any], name: str) -> Iterator[dict[str, Any]]:
    """Rows of a dataset of ``datasets`` with pictures as they are stored: one error per bad picture, not one for all.

    Raises:
        DataError: it cannot be opened, or breaks off.
    """
    from datasets import Image

    try:
        dataset = open_dataset()
        for column, feature in (dataset.features or {}).items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        yield from dataset
    except Exception as e:
        raise DataError(f"{name}: cannot read the dataset: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
