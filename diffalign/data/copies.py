"""Rows of images tables with their pictures, copied into another dataset folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data.grouped import Images, Ints
from diffalign.data.sources import picture_bytes
from diffalign.data.tables import conform, schemas, write_shard
from diffalign.errors import DataError


def copy_images(images: Images, rows: Sequence[int] | Ints, ids: Any, out: Path, shard: int, root: str | None) -> None:
    """Write these rows as a shard of ``out``, under ``ids`` (N,), each with its bytes.

    Raises:
        DataError: a picture cannot be read, or lies outside of its dataset folder and of ``root``.
    """
    import pyarrow as pa

    rows = np.asarray(rows, np.int64)
    parts = [schemas()["images"].empty_table()]
    for n in np.unique(images.shard[rows]):
        mine = rows[images.shard[rows] == n]
        table = _rows(images.shards[n], images.row[mine])
        folder = images.shards[n].parent.parent
        table = table.set_column(table.column_names.index("image_id"), "image_id", ids.take(mine).cast(pa.string()))
        pictures = []
        for image_id, image in zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True):
            try:
                pictures.append({"bytes": picture_bytes(image, str(folder), root), "path": None})
            except (DataError, OSError) as e:
                said = DataError(str(e)) if isinstance(e, OSError) else e
                raise DataError(f"{folder}/images, image {image_id}: {said.message}", hint=said.hint) from e
        column = pa.array(pictures, table.schema.field("image").type)
        parts.append(table.set_column(table.column_names.index("image"), "image", column))
    write_shard(out, "images", shard, pa.concat_tables(parts))


def _rows(path: Path, wanted: Ints) -> Any:
    """Rows of a shard by their places; only the row groups that hold them are read. Columns that it lacks are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, file = schemas()["images"], pq.ParquetFile(path)
    start, parts = 0, []
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        mine = wanted[(wanted >= start) & (wanted < start + count)] - start
        if len(mine):
            parts.append(
                file.read_row_group(group, columns=[n for n in schema.names if n in file.schema_arrow.names]).take(mine)
            )
        start += count
    return conform(pa.concat_tables(parts), "images")
