"""Prompts and pictures for rows that only name them: by the ids of Pick-a-Pic, or of a dataset folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.data.album import Album
from diffalign.data.pairs import rows_of
from diffalign.data.records import find_files
from diffalign.errors import DataError

Place = tuple[Path, int, int, int]
"""File, row group, row and side."""


def joined(rows: Iterable[dict[str, Any]], source: Path) -> Iterator[dict[str, Any]]:
    """The rows with ``prompt``, and ``image``, a function that reads the picture that ``filename`` names.

    ``source`` is a dataset folder whose image ids are the names, or Pick-a-Pic's Parquet files. Rows come in the order in
    which the pictures lie there; those whose picture is not there come first, as they were.

    Raises:
        DataError: the source cannot be read.
    """
    given = list(rows)
    names = [_stem(row.get("filename")) for row in given]
    of = _own(source) if (source / "images").is_dir() else _pickapic(source, {n for n in names if n})
    order = sorted(range(len(given)), key=lambda i: of[n][0] if (n := names[i]) in of else ())
    for i in order:
        found = of.get(names[i] or "")
        yield given[i] if found is None else given[i] | {"prompt": found[1], "image": found[2]}


def _stem(name: Any) -> str | None:
    """The id in a file name such as ``train/ID.png``."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return PurePosixPath(text).stem if isinstance(text, str) and text else None


def _own(folder: Path) -> dict[str, tuple[tuple[Any, ...], str, Any]]:
    album = Album(folder)
    rows = rows_of(folder, "images", ["image_id", "prompt"], ())
    return {r["image_id"]: ((n,), r["prompt"], partial(album.read, r["image_id"])) for n, r in enumerate(rows)}


def _pickapic(source: Path, wanted: set[str]) -> dict[str, tuple[tuple[Any, ...], str, Any]]:
    """Only the columns of ids and captions are read now."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    group, out = _Group(), dict[str, tuple[tuple[Any, ...], str, Any]]()
    for file in find_files(source, ("*.parquet",)):
        try:
            table = pq.ParquetFile(file)
            for n in range(table.num_row_groups):
                columns = table.read_row_group(n, ["image_0_uid", "image_1_uid", "caption"]).to_pydict()
                if len(columns) < 3:
                    raise DataError(f"{file}: not Pick-a-Pic: it needs image_0_uid, image_1_uid and caption")
                for side in (0, 1):
                    for i, name in enumerate(columns[f"image_{side}_uid"]):
                        if name in wanted and name not in out and columns["caption"][i]:
                            place = (file, n, i, side)
                            out[name] = (place, columns["caption"][i].strip(), partial(group.picture, place))
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{file}: not a readable Parquet file: {e}") from e
    return out


class _Group:
    """The pictures of the row group that was read last."""

    def __init__(self) -> None:
        self.at: tuple[Any, ...] = ()
        self.columns: dict[str, Any] = {}

    def picture(self, place: Place) -> bytes:
        import pyarrow.parquet as pq

        file, group, row, side = place
        if self.at != (file, group, side):
            self.columns = pq.ParquetFile(file).read_row_group(group, [f"jpg_{side}"]).to_pydict()
            self.at = (file, group, side)
        data = self.columns.get(f"jpg_{side}", {row: None})[row]
        if not isinstance(data, bytes):
            raise DataError("the row names no picture")
        return data
