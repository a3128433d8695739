"""``diffalign score``: fill the missing cells of the scores table, shard by shard, whatever single pictures do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from diffalign.data.embeddings import Embeddings
from diffalign.data.images import decode, fingerprint, sha256
from diffalign.data.scores import Parts, cell, filled, plan_parts, prompt_key
from diffalign.data.sources import Row, Source, clean, open_source
from diffalign.data.suites import Task
from diffalign.errors import ConfigError, DataError
from diffalign.scoring import Identity, embedder, identify, make_scorers
from diffalign.spec import Spec
from diffalign.suites import open_suite

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.scorers import Scorer

THREADS = 4  # decoding leaves Python's lock; more of them wait for the disk


class ScoreConfig(Spec):
    """Scores of a set of pictures, appended to the scores table of a dataset folder."""

    version: Literal[1] = 1
    path: str
    """A folder, glob, .csv, .jsonl, .parquet or .tar of pictures, a dataset folder, an fsspec URL, or a hub dataset id."""
    scorers: list[str] = Field(min_length=1)
    """As in ``evaluate.scorers``."""
    output_dir: str
    """A dataset folder; the same one again fills what is missing there."""
    prompt: str | None = None
    """For pictures that bring none."""
    suite: str | None = None
    """An evaluation suite, ``geneval:PATH``: its prompts by the names of pictures, its questions, categories and numbers."""
    image_root: str | None = None
    """The folder that paths in a table are relative to and may not leave; the table's own if not given."""
    references: str | None = None
    """Pictures that all are compared with, for ``clip-i``, ``dino``, ``harmonic`` and ``lpips``; written as ``path``."""
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    shard_size: int = Field(default=1024, ge=1)
    """Pictures a shard; a killed run goes on at the first missing one."""
    attempt: int = Field(default=1, ge=1)
    """2 tries the cells again that have an error and no value, 3 once more."""
    offload: bool = False
    """Only the encoder at work is on the device, the others wait in main memory. It moves once a batch: give large ones."""
    embeddings: bool = True
    """Keep the embeddings of the CLIP family beside the scores: other heads on the same encoder then need no picture."""
    export: Literal["csv", "jsonl"] | None = None
    """Also write ``scores.csv`` or ``scores.jsonl``: one line a picture, one column a scorer."""
    gallery: int = Field(default=200, ge=0)
    """Pictures in ``gallery.html``, half of them the best and half the worst by the first scorer."""


@dataclass
class Filled:
    """What one process did."""

    images: int = 0
    cells: int = 0
    shards: int = 0
    total_shards: int = 0
    finished: bool = False
    """Whether no shard of any process is missing."""
    errors: Counter[str] = field(default_factory=Counter)
    """Reasons of the cells that this process left without a value."""


@dataclass(frozen=True)
class Loaded:
    """A row with its picture, or with the reason why there is none."""

    row: Row
    prompt: str | None
    sha256: str | None = None
    image: Image.Image | None = None
    error: str | None = None


@dataclass(frozen=True)
class Column:
    """A scorer and what its numbers are called."""

    scorer: Scorer
    identity: Identity
    references: Sequence[Image.Image] = ()
    """What it compares with; they are part of its version."""
    embedder: str | None = None
    """The encoder whose embeddings say all that this scorer needs of a picture."""

    def key(self, item: Loaded) -> bytes:
        i = self.identity
        return cell(item.sha256, prompt_key(item.prompt), i.scorer, i.version, i.preprocess)

    def compared(self, path: str | None) -> Column:
        """The same with the reference pictures of ``path``, where the scorer needs them."""
        if not self.needs("references"):
            return self
        if path is None:
            raise ConfigError(f"the scorer {self.scorer.name} needs reference pictures", hint="references=FOLDER")
        found = [(row.open(), row.id) for row in open_source(path).rows()]
        mark = sha256("".join(sorted(sha256(data) for data, _ in found)).encode())[:12]
        identity = replace(self.identity, version=f"{self.identity.version}-{mark}")
        return replace(self, identity=identity, references=[decode(data, name) for data, name in found])

    def needs(self, part: str) -> bool:
        card = getattr(self.scorer, "card", None)
        return part in card.needs if card is not None else part in ("images", "prompts")


@dataclass(frozen=True)
class Known:
    """What need not be measured again: ``done`` cells, and embeddings of earlier runs."""

    columns: Sequence[Column]
    done: set[bytes]
    stored: Embeddings
    offload: bool = False

    def suffices(self, item: Loaded) -> bool:
        """Whether no scorer must see the picture."""
        return all(c.key(item) in self.done or self.has(c, item) for c in self.columns)

    def has(self, column: Column, item: Loaded) -> bool:
        return column.embedder is not None and (item.sha256, column.embedder) in self.stored

    def features(self, column: Column, items: Sequence[Loaded]) -> Any:
        """(B, D) of pictures that are all stored."""
        import torch

        return torch.from_numpy(self.stored.get([(str(item.sha256), str(column.embedder)) for item in items]))


def score(config: ScoreConfig, rank: int = 0, world: int = 1) -> Filled:
    """Score the shards of this process: those whose number leaves ``rank`` when divided by ``world``.

    Raises:
        DataError: the source cannot be read at all. Single pictures and cells never raise.
        ConfigError: a scorer that cannot be had, or that needs more than pictures, prompts and columns.
    """
    from tqdm import tqdm

    source = open_source(config.path, config.image_root)
    made = zip(config.scorers, make_scorers(config.scorers, away=config.offload), strict=True)
    columns = [
        Column(s, identify(n, s), embedder=embedder(s) if config.embeddings else None).compared(config.references)
        for n, s in made
    ]
    if config.offload:  # scorers of one encoder work one after the other
        order = [encoder_of(c) for c in columns]
        columns.sort(key=lambda c: order.index(encoder_of(c)))
    find = open_suite(config.suite).finder() if config.suite else None
    parts = _plan(config, source, columns)
    own_images = Path(config.path).resolve() == Path(config.output_dir).resolve()
    done = filled(parts.folder, with_errors=config.attempt == 1)
    known = Known(columns, done, Embeddings(parts.folder), config.offload)
    out = Filled()
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc="score", unit="image", dynamic_ncols=True) as bar:
        for shard, rows in enumerate(_chunks(islice(_asked(source, find), config.limit), config.shard_size)):
            out.total_shards = shard + 1
            if shard % world != rank or parts.done(shard):
                continue
            keep = not own_images and not parts.has_images(shard)
            images: list[dict[str, Any]] = []
            scores: list[dict[str, Any]] = []
            vectors: dict[tuple[str, str], Any] = {}
            for batch in _ahead(pool, rows, config, known if not keep else None):
                for row in _measure(known, batch, vectors):
                    out.cells += 1
                    if row["value"] is None:
                        out.errors[row["error"]] += 1
                    scores.append(row)
                images += [_image_row(item) for item in batch] if keep else []
                bar.update(len(batch))
                out.images += len(batch)
            if keep:
                parts.write("images", shard, images)
            if vectors:
                kept_now = [{"image_sha256": i, "encoder": e, "vector": v} for (i, e), v in vectors.items()]
                parts.write("embeddings", shard, kept_now)
            parts.write("scores", shard, scores)
            out.shards += 1
    out.finished = all(parts.done(n) for n in range(out.total_shards))
    return out


def _plan(config: ScoreConfig, source: Source, columns: Sequence[Column]) -> Parts:
    kept = config.model_dump(mode="json", include={"path", "prompt", "suite", "image_root", "limit", "shard_size"})
    pictures = {**kept, "fingerprint": source.fingerprint}
    order = {"batch_size": config.batch_size, "attempt": config.attempt}
    plan = {**pictures, **order, "scorers": [list(vars(c.identity).values()) for c in columns]}
    return plan_parts(Path(config.output_dir), plan, pictures)


def _asked(source: Source, find: Callable[[str, str | None], Task | None] | None) -> Iterator[Row]:
    """The rows of a source; those that answer a task of a suite say what it says."""
    for row in source.rows():
        task = find(row.id, row.prompt) if find is not None else None
        if task is None:
            yield row
            continue
        said = {**row.said, **task.about, "category": row.said.get("category") or task.category}
        yield replace(row, prompt=row.prompt if row.prompt is not None else task.prompt, said=said)


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _ahead(pool: ThreadPoolExecutor, rows: Sequence[Row], config: ScoreConfig, known: Known | None) -> Iterator[list[Loaded]]:
    """Batches of loaded rows; the next batch is decoded while this one is scored. Where nothing is ``known``, all are."""
    batches = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]

    def start(batch: Sequence[Row]) -> list[Any]:
        return [pool.submit(_load, row, config.prompt, known) for row in batch]

    coming = start(batches[0])
    for following in [*batches[1:], []]:
        now, coming = coming, start(following)
        yield [future.result() for future in now]


def _load(row: Row, prompt: str | None, known: Known | None) -> Loaded:
    """Read and decode, unless no scorer needs to see it; whatever goes wrong with one picture stays with it."""
    item = Loaded(row, row.prompt if row.prompt is not None else prompt)
    try:
        data = row.open()
        item = Loaded(row, item.prompt, sha256(data))
        if not data:
            return Loaded(row, item.prompt, item.sha256, error="the file is empty")
        if known is not None and known.suffices(item):
            return item
        return Loaded(row, item.prompt, item.sha256, decode(data, row.id))
    except Exception as e:  # decoders raise what they like
        said = e.message if isinstance(e, DataError) else "no such file" if isinstance(e, FileNotFoundError) else None
        said = said or f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        return Loaded(row, item.prompt, item.sha256, error=said.removeprefix(f"{row.id}: "))


def _measure(known: Known, batch: Sequence[Loaded], vectors: dict[tuple[str, str], Any]) -> Iterator[dict[str, Any]]:
    """Rows of the cells that are missing; new embeddings go to ``vectors``.

    All scorers see the same picture objects, so encoders pass once.
    """
    done = known.done
    for column in known.columns:
        todo: list[Loaded] = []
        for item in batch:
            key = column.key(item)
            if item.sha256 is not None and key in done:
                continue
            done.add(key)
            error = item.error or ("it has no prompt" if column.needs("prompts") and item.prompt is None else None)
            if error is not None:
                yield _score_row(column, item, column.scorer.name, None, error)
            else:
                todo.append(item)
        seen = [item for item in todo if known.has(column, item)]
        for items in (seen, [item for item in todo if not known.has(column, item)]):
            if items:
                if known.offload:
                    take_turns(known.columns, column)
                yield from _ask(column, items, known.features(column, items) if items is seen else None, vectors)


def encoder_of(column: Column) -> Any:
    """What stands on the device for a scorer; the scorer itself where it has no encoder."""
    return getattr(column.scorer, "encoder", column.scorer)


def take_turns(columns: Sequence[Column], column: Column) -> None:
    """Leave only the encoder of ``column`` on the device."""
    own = encoder_of(column)
    for encoder in (encoder_of(c) for c in columns):
        if encoder is not own and hasattr(encoder, "move"):
            encoder.move(True)
    if hasattr(own, "move"):
        own.move(False)


def _ask(
    column: Column, items: Sequence[Loaded], features: Any, vectors: dict[tuple[str, str], Any]
) -> Iterator[dict[str, Any]]:
    """Rows of one scorer, from its pictures or from their ``features``."""
    from diffalign.scorers import ScoreInput, isolated

    images: Any = [item.image for item in items]
    said = [{**item.row.said, "prompt": item.prompt} for item in items]
    references = [column.references] * len(items) if column.references else None
    result = isolated(column.scorer, ScoreInput(images, [item.prompt or "" for item in items], references, said, features))
    if column.embedder is not None and features is None:
        found = column.scorer.encoder.seen(images)  # type: ignore[attr-defined]
        for item, vector in zip(items, () if found is None else found.cpu().numpy(), strict=False):
            vectors.setdefault((str(item.sha256), column.embedder), vector)
    for name, values in result.values.items():
        for item, value, error, cut in zip(items, values.tolist(), result.errors, result.truncated, strict=True):
            if value == value:
                yield _score_row(column, item, name, value, None, cut)
            elif name not in result.partial or error:
                yield _score_row(column, item, name, None, error or f"{name} is nan")


def _score_row(
    column: Column, item: Loaded, name: str, value: float | None, error: str | None, truncated: bool = False
) -> dict[str, Any]:
    i = column.identity
    return {
        "image_sha256": item.sha256, "prompt_sha256": prompt_key(item.prompt),
        "scorer": i.scorer if name == i.scorer else f"{i.scorer}/{name}", "version": i.version,
        "preprocess_version": i.preprocess, "value": value, "error": None if error is None else clean(error),
        "truncated": truncated,
    }  # fmt: skip


def _image_row(item: Loaded) -> dict[str, Any]:
    from diffalign.data.prompts import Prompt

    k, category = item.row.said.get("k"), item.row.said.get("category")
    return {
        "image_id": item.row.id, "sha256": item.sha256, "prompt": item.prompt,
        "prompt_id": None if item.prompt is None else Prompt(item.prompt, item.row.said.get("negative_prompt")).id,
        "image": {"bytes": None, "path": item.row.uri}, "k": int(str(k)) if str(k).isdigit() else None,
        "width": item.image.width if item.image else None, "height": item.image.height if item.image else None,
        "category": None if category is None else clean(str(category)),
        "error": None if item.error is None else clean(item.error),
        "phash": fingerprint(item.image) if item.image else None,
    }  # fmt: skip
