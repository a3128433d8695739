"""``diffalign import``: published preference datasets and plain tables as dataset folders, shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from diffalign.data.formats import LAYOUTS, Comparison, Layout, Rated, Side
from diffalign.data.images import decode, fingerprint, sha256
from diffalign.data.joined import joined
from diffalign.data.prompts import Prompt
from diffalign.data.records import chunks, find_files, folder_rows, gathered, in_chunks
from diffalign.data.scores import prompt_key
from diffalign.data.sources import clean, picture_bytes, undecoded
from diffalign.data.tables import fix_plan, read_notes, shard_path, write_shard
from diffalign.errors import ConfigError, DataError
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
    pictures_from: str | None = None
    """Pick-a-Pic's Parquet files, or a dataset folder, that hold the prompts and pictures which `richhf` only names."""
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
    rated: int = 0
    """Images with scores of their own."""
    flagged: int = 0
    agrees: int = 0
    disagrees: int = 0

    def lines(self, folder: str) -> list[str]:
        """For people."""
        out = [f"{self.pairs} pairs of {self.rows} rows, {self.images} images, in {folder}"]
        out += [f"{self.ties} of them are ties"] if self.ties else []
        out += [f"{self.rated} images with scores, in scores/"] if self.rated else []
        out += [f"{self.flagged} images below the safety floor, flagged in scores/"] if self.flagged else []
        out += [f"  dropped: {n} {why}" for why, n in self.dropped.most_common()]
        if self.agrees + self.disagrees:
            out.append(f"direction: a second column agrees with {self.agrees} labels and disagrees with {self.disagrees}")
        return out if self.finished else [*out, "other processes are still at work"]


def import_pairs(config: ImportConfig, rank: int = 0, world: int = 1) -> Imported:
    """The whole of ``diffalign import``: the shards of this process.

    Raises:
        DataError: the source cannot be read, a prompt is evaluated on and that is refused, the folder holds another import,
            nothing is left, or the labels point the wrong way.
    """
    from tqdm import tqdm

    out, layout = Path(config.output_dir), LAYOUTS["trl" if config.format == "folders" else config.format]
    plan = config.plan()
    stated = config.licence or licence(config.path, kind="dataset", fetch=True) or layout.licence
    work = Importer(config, layout, stated)
    total = Imported()
    seen = 0

    def wanted(shard: int) -> bool:
        return shard % world == rank and not shard_path(out, "pairs", shard).exists()

    found = source_chunks(config, layout, wanted)
    first = next(found, None)
    if first is not None and first[1] and config.format != "folders":  # which tells of each name
        layout.check(first[1], config.path, () if config.pictures else layout.pictures)
    fix_plan(out, "pairs", plan)  # once the source can be read: a mistake leaves nothing behind
    with tqdm(desc="import", unit="row", dynamic_ncols=True) as bar:
        for shard, rows in chain([] if first is None else [first], found):
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
    if total.finished and total.dropped and not total.pairs + total.rated:
        said = ", ".join(f"{n} {why}" for why, n in total.dropped.most_common())
        remedy = "mend that, and import into another folder"
        raise DataError(f"{config.path}: nothing is left of {total.rows} rows: {said}", hint=remedy)
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
    if files[0].suffix == ".tfrecord" and config.pictures_from is None:
        raise ConfigError(
            f"pictures_from: {files[0].name} holds no prompts and no pictures, only names of Pick-a-Pic's",
            hint="pictures_from=FOLDER with Pick-a-Pic's Parquet files, or a dataset folder imported from them",
        )
    if layout.gather is None and config.limit is None:
        named = skip if files[0].suffix == ".parquet" and not _paths(files[0], skip) else ()
        return chunks(files, [*layout.columns, *layout.pictures] if layout.columns else [], named, config.shard_size, wanted)
    every = chunks(files, (), (), 4096, lambda n: True)
    everything: Iterator[dict[str, Any]] = (row for _, some in every for row in some or ())
    if config.pictures_from is not None:
        everything = joined(everything, Path(config.pictures_from).expanduser())
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
        if len(kept) < len(there) and stream.info.builder_name == "parquet":  # select_columns drops what was fetched already
            return load_dataset(config.path, split=config.split, streaming=True, columns=kept)
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
        self.folder = str(path.parent if path.is_file() else path) if path.exists() else None
        self.gate = Gate(config.safety) if config.safety is not None else None
        self.barrier = Barrier(config)

    def write(self, out: Path, shard: int, rows: Sequence[dict[str, Any]]) -> None:
        """Images, then scores of the gate, then pairs: a shard is finished when its pairs are there."""
        notes: dict[str, Any] = dict.fromkeys(("ties", "flagged", "agrees", "disagrees"), 0)
        notes |= {"rows": sum(len(r["rows"]) if self.layout.gather else 1 for r in rows)}
        dropped: Counter[str] = Counter()
        images: dict[str, Taken | str] = {}
        found: list[tuple[Comparison, str, str]] = []
        rated: dict[str, Rated] = {}
        read = [c for row in rows for c in self.layout.read(row)]
        dropped.update(c for c in read if isinstance(c, str))
        said = [c for c in read if not isinstance(c, str)]
        barred = self.barrier.left_out([self._asked(c) for c in said], f"{self.config.path}, shard {shard}")
        for one, bad in zip(said, barred, strict=True):
            if bad:
                dropped["a prompt that is evaluated on"] += 1
                continue
            if isinstance(one, Rated):
                key = self._take(one.side, one.prompt, images)
                if isinstance(taken_as := images[key], str):
                    dropped[taken_as] += 1
                else:
                    rated[key] = one
                continue
            if one.p_win == 0.5 and self.config.ties == "drop":
                dropped["a tie"] += 1
                continue
            captions = (one.prompt, one.prompt if one.rejected_prompt is None else one.rejected_prompt)
            sides = zip((one.chosen, one.rejected), captions, strict=True)
            a, b = (self._take(side, text, images, one.category) for side, text in sides)
            if why := next((str(t) for t in (images[a], images[b]) if isinstance(t, str)), None):
                dropped[why] += 1
            elif a == b and captions[0] == captions[1]:
                dropped["the same picture twice"] += 1
            else:
                found.append((one, a, b))
        unsafe, scores = self._judged(images, [*rated, *(k for _, a, b in found for k in (a, b))])
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
        for key in [k for k in rated if not notes["flagged"] and k in unsafe]:
            del rated[key]
            dropped["below the safety floor"] += 1
        taken = {t.row["image_id"]: t.row for t in images.values() if isinstance(t, Taken)}
        kept = dict.fromkeys([*map(clean, rated), *(r[s] for r in pairs for s in ("chosen_id", "rejected_id"))])
        write_shard(out, "images", shard, [taken[k] for k in kept])
        ratings = [row for k, one in rated.items() for row in _score_rows(taken[clean(k)], one)]
        if scores or ratings:
            write_shard(out, "scores", shard, [*scores, *ratings])
        if marks := [row for k, one in rated.items() for row in _annotation_rows(taken[clean(k)], one)]:
            write_shard(out, "annotations", shard, marks)
        notes |= {"pairs": len(pairs), "images": len(kept), "rated": len(rated), "dropped": dropped}
        write_shard(out, "pairs", shard, pairs, notes)

    def _asked(self, one: Comparison | Rated) -> str:
        """The caption that decides whether it may become training data: the loser's own, if that one may not."""
        other = one.rejected_prompt if isinstance(one, Comparison) else None
        return other if other is not None and other in self.barrier else one.prompt

    def _take(self, side: Side, prompt: str, images: dict[str, Taken | str], category: str | None = None) -> str:
        """The id of a picture, once it or the reason for its lack is in ``images``."""
        if side.id is not None and side.id in images:
            return side.id
        row: dict[str, Any] = {
            "prompt": clean(prompt), "prompt_id": Prompt(clean(prompt)).id, "model": side.model, "category": category,
            "licence": self.licence,
        }  # fmt: skip
        if not self.config.pictures:
            key = side.id or f"{Prompt(clean(prompt)).id}-{len(images)}"
            images[key] = Taken({**row, "image_id": clean(key)})
            return key
        try:
            there = side.image() if callable(side.image) else side.image
            data = picture_bytes(there, self.folder, self.config.image_root)
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
            "rule": f"import:{self.config.format}", "user": one.user, "group": one.group,
            "source": self.config.source or self.config.path,
            "rejected_prompt": None if one.rejected_prompt is None else clean(one.rejected_prompt),
        }  # fmt: skip


def _score_rows(image: dict[str, Any], one: Rated) -> list[dict[str, Any]]:
    """Of the scores table, which knows a picture by its hash: none where pictures were not read."""
    if image.get("sha256") is None:
        return []
    key = {"image_sha256": image["sha256"], "prompt_sha256": prompt_key(image["prompt"])}
    return [{**key, "scorer": n, "version": "1", "preprocess_version": "1", "value": v} for n, v in one.scores.items()]


def _annotation_rows(image: dict[str, Any], one: Rated) -> list[dict[str, Any]]:
    """Heatmaps and words, by kind."""
    if image.get("sha256") is None:
        return []
    key = {"image_sha256": image["sha256"], "prompt_sha256": prompt_key(image["prompt"])}
    out = []
    for kind in dict.fromkeys([*one.maps, *one.words]):
        found = one.maps.get(kind)
        about = {"image": None if found is None else {"bytes": found, "path": None}, "words": one.words.get(kind)}
        out.append({**key, "kind": kind, **about})
    return out


def _reason(e: Exception) -> str:
    if isinstance(e, FileNotFoundError):
        return "a picture is missing"
    said = str(e)
    if "leads out" in said:
        return "a picture lies outside of image_root, or is a URL"
    return "a picture is missing" if "names no picture" in said else "a picture is damaged"
