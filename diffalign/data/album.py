"""Pictures of a dataset folder by id: ids are in memory, bytes are read when they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.sources import picture_bytes
from diffalign.errors import DataError

KEPT = 16  # row groups; readers walk through them in order


class Album:
    """The images table of a dataset folder, as pictures.

    Raises:
        DataError: no images table, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = folder
        self.shards = sorted((folder / "images").glob("*.parquet"))
        if not self.shards:
            raise DataError(f"{folder}: no table images/", hint="a dataset folder holds images/, pairs/ and manifest.json")
        self.places: dict[str, tuple[int, int, int]] = {}
        self._open: OrderedDict[tuple[int, int], Any] = OrderedDict()
        for n, shard in enumerate(self.shards):
            try:
                file = pq.ParquetFile(shard)
                if missing := [c for c in ("image_id", "image") if c not in file.schema_arrow.names]:
                    raise DataError(f"{shard}: missing column {missing[0]!r}; found {', '.join(file.schema_arrow.names)}")
                for group in range(file.num_row_groups):
                    ids = file.read_row_group(group, columns=["image_id"])["image_id"].to_pylist()
                    self.places.update((name, (n, group, row)) for row, name in enumerate(ids))
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{shard}: not a readable Parquet shard: {e}", hint="delete it and run again") from e

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def read(self, name: str) -> bytes:
        """The encoded picture.

        Raises:
            DataError: there is none, or its path leads out of the folder; names the image.
        """
        shard, group, row = self.places[name]
        try:
            return picture_bytes(self._group(shard, group)[row].as_py(), str(self.folder))
        except (DataError, OSError) as e:
            said = DataError(str(e)) if isinstance(e, OSError) else e
            raise DataError(f"{self.folder}/images, image {name}: {said.message}", hint=said.hint) from e

    def _group(self, shard: int, group: int) -> Any:
        import pyarrow.parquet as pq

        key = (shard, group)
        if key not in self._open:
            table = pq.ParquetFile(self.shards[shard]).read_row_group(group, columns=["image"])
            self._open[key] = table["image"].combine_chunks()
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]
