"""``diffalign import``: published preference datasets and plain tables as dataset folders, shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from diffalign.data.formats import LAYOUTS, Comparison, Layout, Side
from diffalign.data.images import decode, fingerprint, sha256
from diffalign.data.prompts import Prompt
from diffalign.data.records import chunks, find_files, folder_rows, gathered, in_chunks
from diffalign.data.sources import clean, picture_bytes, undecoded
from diffalign.data.tables import fix_plan, read_notes, shard_path, write_shard
from diffalign.errors import DataError
from diffalign.excluding import Barrier, Excluding
from diffalign.hub import is_hub_id, licence
from diffalign.safety import Gate, Safety

if TYPE_CHECKING:
    from PIL import Image


class ImportConfig(Excluding):
    """Somebody's preferences as images and pairs tables of a dataset folder."""

    version: Literal[1] = 1
    path: str
    """A file or folder as it was published, or a hub dataset id, which is streamed."""
    format: str
    """One of ``diffalign list formats``; ``folders`` is chosen/ and rejected/."""
    output_dir: str
    split: str = "train"
    """Of a dataset on the hub."""
    image_root: str | None = None
    """Folder or URL that paths of pictures are relative to and may not leave; that of the table if not given."""
    pictures: bool = True
    """False reads and writes no picture: ids, prompts and labels alone."""
    ties: Literal["drop", "keep"] = "keep"
    """Kept ties stand in the table with p_win 0.5; training leaves them out."""
    safety: Safety | None = None
    licence: str | None = None
    """Written to every image; that of the dataset's card, or of its publication, if not given."""
    source: str | None = None
    """Written to every pair; the path if not given."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of the source."""
    shard_size: int = Field(default=500, ge=1)
    """Rows of the source a shard; a killed run goes on at the first missing one."""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LAYOUTS and name != "folders":
            raise ValueError(f"unknown format {name!r}; known: {', '.join([*LAYOUTS, 'folders'])}")
        return name


@dataclass
class Imported:
    """What all processes together have imported so far."""

    finished: bool = False
    made: int = 0
    rows: int = 0
    pairs: int = 0
    ties: int = 0
    images: int = 0
    """Shards count their own: a picture that two shards need is counted twice."""
    dropped: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    agrees: int = 0
    disagrees: int = 0

    def lines(self, folder: str) -> list[str]:
        """For people."""
        out = [f"{self.pairs} pairs of {self.rows} rows, {self.images} images, in {folder}"]
        out += [f"{self.ties} of them are ties"] if self.ties else []
        out += [f"{self.flagged} images below the safety floor, flagged in scores/"] if self.flagged else []
        out += [f"  dropped: {n} {why}" for why, n in self.dropped.most_common()]
        if self.agrees + self.disagrees:
            out.append(f"direction: a second column agrees with {self.agrees} labels and disagrees with {self.disagrees}")
        return out if self.finished else [*out, "other processes are still at work"]


def import_pairs(config: ImportConfig, rank: int = 0, world: int = 1) -> Imported:
    """The whole of ``diffalign import``: the shards of this process.

    Raises:
        DataError: the source cannot be read, a prompt is evaluated on and that is refused, the folder holds another import,
            or the labels point the wrong way.
    """
    from tqdm import tqdm

    out, layout = Path(config.output_dir), LAYOUTS["trl" if config.format == "folders" else config.format]
    plan = config.plan()
    stated = config.licence or licence(config.path, kind="dataset") or layout.licence
    work = Importer(config, layout, stated)
    total = Imported()
    seen = 0

    def wanted(shard: int) -> bool:
        return shard % world == rank and not shard_path(out, "pairs", shard).exists()

    found = source_chunks(config, layout, wanted)
    fix_plan(out, "pairs", plan)  # once the source is there
    with tqdm(desc="import", unit="row", dynamic_ncols=True) as bar:
        for shard, rows in found:
            seen = shard + 1
            if rows is None or not wanted(shard):
                continue
            work.write(out, shard, rows)
            total.made += 1
            bar.update(len(rows))
    total.finished = True
    for path in (shard_path(out, "pairs", n) for n in range(seen)):
        if not path.exists():
            total.finished = False
            continue
        notes = read_notes(path)
        total.dropped.update(notes.pop("dropped"))
        for name, count in notes.items():
            setattr(total, name, getattr(total, name) + count)
    if total.finished and total.disagrees > total.agrees:
        raise DataError(
            f"{config.path}: another column disagrees with {total.disagrees} of {total.disagrees + total.agrees} labels",
            hint="the labels may point the wrong way; look before you train, or remove that column",
        )
    return total


def source_chunks(config: ImportConfig, layout: Layout, wanted: Any) -> Iterator[tuple[int, list[dict[str, Any]] | None]]:
    """Numbered chunks of the rows; those that are not ``wanted`` may be None."""
    skip = () if config.pictures else layout.pictures
    path = Path(config.path).expanduser()
    if is_hub_id(config.path):
        return in_chunks(_cut(_hub(config, layout, skip), config.limit), config.shard_size)
    if not path.exists():
        raise DataError(f"no such file or folder: {config.path}")
    if config.format == "folders":
        return in_chunks(_cut(folder_rows(path), config.limit), config.shard_size)
    files = find_files(path, layout.files)
    if layout.gather is None and config.limit is None:
        named = skip if files[0].suffix == ".parquet" and not _paths(files[0], skip) else ()
        return chunks(files, [*layout.columns, *layout.pictures] if layout.columns else [], named, config.shard_size, wanted)
    everything = (row for _, rows in chunks(files, (), (), 4096, lambda n: True) for row in rows or ())
    rows = gathered(everything, layout.gather) if layout.gather else everything
    return in_chunks(_cut(rows, config.limit), config.shard_size)


def _paths(file: Path, columns: Sequence[str]) -> bool:
    """Whether the picture columns are only names, which are ids as well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    return all(pa.types.is_string(schema.field(c).type) for c in columns if c in schema.names)


def _cut(rows: Iterator[dict[str, Any]], limit: int | None) -> Iterator[dict[str, Any]]:
    from itertools import islice

    return islice(rows, limit)


def _hub(config: ImportConfig, layout: Layout, skip: Sequence[str]) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    def opened() -> Any:
        stream = load_dataset(config.path, split=config.split, streaming=True)
        there = stream.column_names or []
        kept = [c for c in there if (not layout.columns or c in (*layout.columns, *layout.pictures)) and c not in skip]
        return stream.select_columns(kept) if there else stream

    return undecoded(opened, config.path)


@dataclass
class Taken:
    """A picture that was read: its row of the images table."""

    row: dict[str, Any]
    image: Image.Image | None = None


class Importer:
    """Writes the shards of one import."""

    def __init__(self, config: ImportConfig, layout: Layout, stated: str | None) -> None:
        self.config, self.layout, self.licence = config, layout, stated
        path = Path(config.path).expanduser()
        self.folder = str(path.parent if path.is_file() else path) if path.exists() else "."
        self.gate = Gate(config.safety) if config.safety is not None else None
        self.barrier = Barrier(config)

    def write(self, out: Path, shard: int, rows: Sequence[dict[str, Any]]) -> None:
        """Images, then scores of the gate, then pairs: a shard is finished when its pairs are there."""
        notes: dict[str, Any] = dict.fromkeys(("ties", "flagged", "agrees", "disagrees"), 0) | {"rows": len(rows)}
        dropped: Counter[str] = Counter()
        images: dict[str, Taken | str] = {}
        found: list[tuple[Comparison, str, str]] = []
        read = [c for row in rows for c in self.layout.read(row)]
        dropped.update(c for c in read if isinstance(c, str))
        comparisons = [c for c in read if isinstance(c, Comparison)]
        captions = [str(c.rejected_prompt if c.rejected_prompt in self.barrier else c.prompt) for c in comparisons]
        barred = self.barrier.left_out(captions, f"{self.config.path}, shard {shard}")
        for one, bad in zip(comparisons, barred, strict=True):
            if bad:
                dropped["a prompt that is evaluated on"] += 1
                continue
            if one.p_win == 0.5 and self.config.ties == "drop":
                dropped["a tie"] += 1
                continue
            a, b = (self._take(side, one, images) for side in (one.chosen, one.rejected))
            if why := next((str(t) for t in (images[a], images[b]) if isinstance(t, str)), None):
                dropped[why] += 1
            elif a == b:
                dropped["the same picture twice"] += 1
            else:
                found.append((one, a, b))
        unsafe, scores = self._judged(images, [k for _, a, b in found for k in (a, b)])
        notes["flagged"] = len(unsafe) if self.config.safety and self.config.safety.action == "flag" else 0
        pairs: list[dict[str, Any]] = []
        for one, chosen, rejected in found:
            if not notes["flagged"] and unsafe & {chosen, rejected}:
                dropped["below the safety floor"] += 1
                continue
            pairs.append(self._pair_row(f"{shard:05d}-{len(pairs):05d}", one, clean(chosen), clean(rejected)))
            notes["ties"] += one.p_win == 0.5
            if one.second is not None:
                notes["agrees" if one.second else "disagrees"] += 1
        kept = dict.fromkeys(r[s] for r in pairs for s in ("chosen_id", "rejected_id"))
        taken = {t.row["image_id"]: t.row for t in images.values() if isinstance(t, Taken)}
        write_shard(out, "images", shard, [taken[k] for k in kept])
        if scores:
            write_shard(out, "scores", shard, scores)
        notes |= {"pairs": len(pairs), "images": len(kept), "dropped": dropped}
        write_shard(out, "pairs", shard, pairs, notes)

    def _take(self, side: Side, one: Comparison, images: dict[str, Taken | str]) -> str:
        """The id of a picture, once it or the reason for its lack is in ``images``."""
        if side.id is not None and side.id in images:
            return side.id
        prompt = one.prompt if side is one.chosen or one.rejected_prompt is None else one.rejected_prompt
        row: dict[str, Any] = {
            "prompt": clean(prompt), "prompt_id": Prompt(clean(prompt)).id, "model": side.model, "category": one.category,
            "licence": self.licence,
        }  # fmt: skip
        if not self.config.pictures:
            key = side.id or f"{Prompt(clean(prompt)).id}-{len(images)}"
            images[key] = Taken({**row, "image_id": clean(key)})
            return key
        try:
            data = picture_bytes(side.image, self.folder, self.config.image_root)
            image = decode(data, "picture")
        except (DataError, OSError) as e:
            key = side.id or f"missing {len(images)}"
            images[key] = _reason(e)
            return key
        digest = sha256(data)
        key = side.id or digest
        about = {"width": image.width, "height": image.height, "phash": fingerprint(image)}
        row |= {"image_id": clean(key), "sha256": digest, "image": {"bytes": data, "path": None}, **about}
        images.setdefault(key, Taken(row, image if self.gate else None))
        return key

    def _judged(self, images: dict[str, Taken | str], keys: Sequence[str]) -> tuple[set[str], list[dict[str, Any]]]:
        """Pictures below the floor of the gate, and rows of the scores table for all."""
        taken = {k: t for k in dict.fromkeys(keys) if isinstance(t := images[k], Taken) and t.image is not None}
        if self.gate is None or not taken:
            return set(), []
        shown = [t.image for t in taken.values() if t.image is not None]
        prompts, hashes = ([t.row[n] for t in taken.values()] for n in ("prompt", "sha256"))
        below, rows = self.gate(shown, prompts, hashes)
        return {k for k, bad in zip(taken, below, strict=True) if bad}, rows

    def _pair_row(self, name: str, one: Comparison, chosen: str, rejected: str) -> dict[str, Any]:
        return {
            "pair_id": name, "prompt_id": Prompt(clean(one.prompt)).id, "prompt": clean(one.prompt),
            "chosen_id": chosen, "rejected_id": rejected, "p_win": one.p_win, "margins": json.dumps(dict(one.margins)),
            "rule": f"import:{self.config.format}", "user": one.user, "source": self.config.source or self.config.path,
            "rejected_prompt": None if one.rejected_prompt is None else clean(one.rejected_prompt),
        }  # fmt: skip


def _reason(e: Exception) -> str:
    if isinstance(e, FileNotFoundError):
        return "a picture is missing"
    said = str(e)
    if "leads out" in said:
        return "a picture lies outside of image_root, or is a URL"
    return "a picture is missing" if "names no picture" in said else "a picture is damaged"
