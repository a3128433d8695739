"""``diffalign generate``: images of many prompts by one or several models, shard by shard, on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from diffalign.building import environment, ready_model
from diffalign.data.prompts import Prompt
from diffalign.data.tables import read_notes, run_shards, shard_path, write_shard
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import prompts_of
from diffalign.excluding import Barrier, Excluding
from diffalign.models import Model, ModelSpec
from diffalign.safety import Gate, Safety
from diffalign.sampling import Item, Sampler, sample, unit
from diffalign.scoring import make_scorers
from diffalign.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.scorers import Scorer


class Preview(Spec):
    """Many seeds at few steps; only those that a reward picks are made at full length, from the same seeds (Sol-RL)."""

    images_per_prompt: int = Field(default=16, ge=2)
    num_inference_steps: int = Field(default=4, ge=1)
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    """As in ``evaluate.scorers``."""
    reward: dict[str, float] = Field(default={"score": 1.0}, min_length=1)
    """Weights of the scorers' values."""
    keep: Literal["ends", "best"] = "ends"
    """Half of ``images_per_prompt`` from the best and half from the worst, or all from the best."""


class StartFrom(Spec):
    """Images made from given ones: x = alpha x0 + sigma eps at ``strength`` of the schedule, denoised from there (DenseDPO).

    The prompts are those of the pictures, which must have one.
    """

    path: str
    """Any set of pictures that `diffalign score` reads."""
    image_root: str | None = None
    strength: tuple[float, float] = (0.65, 0.8)
    """Bounds between which each picture draws its own: 1 is noise alone."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.strength[0] <= self.strength[1] <= 1:
            raise ValueError("strength must be two numbers with 0 < low <= high <= 1")
        return self


class GenerateConfig(Excluding):
    """Images of many prompts, written as the images table of a dataset folder."""

    version: Literal[1] = 1
    model: ModelSpec = ModelSpec(path="shapes-unet")
    gallery: list[ModelSpec] = []
    """Further models that make images of the same prompts from the same seeds, one after the other."""
    prompts: str = "shapes:train"
    num_prompts: int | None = Field(default=None, ge=1)
    negative_prompt: str | None = None
    """For prompts that bring none of their own."""
    images_per_prompt: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    sampling: Sampler = Sampler()
    scheduler: str | None = None
    """Another stock scheduler than the model's, by its class in diffusers, such as ``DPMSolverMultistepScheduler``."""
    preview: Preview | None = None
    start_from: StartFrom | None = None
    safety: Safety | None = None
    shard_size: int = Field(default=512, ge=1)
    """Images per Parquet shard; a killed run goes on at the first missing shard."""
    split_salt: str = ""
    licence: str | None = None
    """Written to every row."""
    output_dir: str

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.preview is not None and self.start_from is not None:
            raise ValueError("preview and start_from do not go together")
        if self.preview is not None and self.preview.images_per_prompt < self.images_per_prompt:
            raise ValueError("preview.images_per_prompt must be at least images_per_prompt")
        return self


@dataclass
class Generated:
    """What a run did, and what all of them have done."""

    folder: Path
    made: int = 0
    """Images made now, before the gate."""
    images: int = 0
    flagged: int = 0
    dropped: int = 0
    excluded: int = 0
    """Prompts."""
    finished: bool = True

    def lines(self) -> list[str]:
        """For people."""
        out = [f"{self.made} images made now, {self.images} in {self.folder}"]
        out += [f"{self.excluded} prompts left out"] if self.excluded else []
        out += [f"{self.flagged} images below the safety floor, flagged in scores/"] if self.flagged else []
        out += [f"{self.dropped} images below the safety floor dropped"] if self.dropped else []
        return out if self.finished else [*out, "other processes are still at work"]


@dataclass(frozen=True)
class Work:
    """One shard: items of one model, with the pictures that they start from."""

    model: int
    items: list[Item]
    pictures: list[Callable[[], bytes]] | None = None


def generate_dataset(config: GenerateConfig, rank: int = 0, world: int = 1) -> Generated:
    """The whole of ``diffalign generate``: the shards of this process.

    Raises:
        ConfigError: every prompt is excluded, or a reward is not measured.
        DataError: a prompt is evaluated on, and that is refused; the folder holds images of another plan.
    """
    from tqdm import tqdm

    from diffalign.data.images import sha256

    folder = Path(config.output_dir)
    out = Generated(folder)
    todo, out.excluded = plan_work(config)
    maker = Maker(config)
    plan = config.plan()
    ids = dict.fromkeys(item.prompt.id for work in todo for item in work.items)
    plan["prompts_hash"] = sha256(json.dumps(list(ids)).encode())
    with tqdm(total=sum(len(w.items) for w in todo), desc="generate", unit="image", dynamic_ncols=True) as bar:

        def shard(n: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            rows, scores, unsafe = maker.make(todo[n], bar.update)
            out.made += len(rows)
            flagged = sum(unsafe) if config.safety is not None and config.safety.action == "flag" else 0
            if not flagged:
                rows = [row for row, bad in zip(rows, unsafe, strict=True) if not bad]
            if scores:
                write_shard(folder, "scores", n, scores)
            return rows, {"images": len(rows), "flagged": flagged, "dropped": 0 if flagged else sum(unsafe)}

        run_shards(folder, "images", plan, len(todo), shard, rank, world)
    for path in (shard_path(folder, "images", n) for n in range(len(todo))):
        if not path.exists():
            out.finished = False
            continue
        for name, count in read_notes(path).items():
            setattr(out, name, getattr(out, name) + count)
    return out


def plan_work(config: GenerateConfig) -> tuple[list[Work], int]:
    """What there is to do, in shards, and how many prompts are excluded."""
    k = config.images_per_prompt if config.preview is None else config.preview.images_per_prompt
    sources: list[Callable[[], bytes]] | None = None
    if config.start_from is not None:
        from itertools import islice

        from diffalign.data.sources import open_source

        rows = list(islice(open_source(config.start_from.path, config.start_from.image_root).rows(), config.num_prompts))
        if nameless := [r.id for r in rows if not r.prompt]:
            raise DataError(f"{config.start_from.path}: {nameless[0]} has no prompt", hint="images are made for prompts")
        found = [Prompt(str(r.prompt), config.negative_prompt) for r in rows]
        sources = [r.open for r in rows]
    else:
        found = prompts_of(config.prompts, config.num_prompts, config.seed, config.split_salt, config.negative_prompt)
    where = config.start_from.path if config.start_from is not None else config.prompts
    out = Barrier(config).left_out([p.text for p in found], where)
    kept = [n for n, barred in enumerate(out) if not barred]
    if not kept:
        raise ConfigError(f"exclude: none of the {len(found)} prompts is left")
    seen: dict[str, int] = {}
    items, pictures = [], []
    for n in kept:
        first = seen.get(found[n].id, 0)  # several pictures may have one prompt: their images have other seeds
        seen[found[n].id] = first + k
        items += [Item(found[n], first + i) for i in range(k)]
        pictures += [sources[n]] * k if sources is not None else []
    size = config.shard_size
    if config.preview is not None:  # whole prompts, so many that about shard_size images remain of them
        size = k * max(1, config.shard_size // config.images_per_prompt)
    starts = range(0, len(items), size)
    return [
        Work(m, items[s : s + size], pictures[s : s + size] if sources is not None else None)
        for m in range(1 + len(config.gallery))
        for s in starts
    ], len(found) - len(kept)


class Maker:
    """Makes shards; models are loaded when their first shard comes, one at a time."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.specs = [config.model, *config.gallery]
        self.loaded: tuple[int, Model] | None = None
        self.gate = Gate(config.safety) if config.safety is not None else None
        self.scorers: list[Scorer] = make_scorers(config.preview.scorers) if config.preview is not None else []
        self.versions = json.dumps(environment()["versions"])

    def model(self, number: int) -> Model:
        if self.loaded is None or self.loaded[0] != number:
            self.loaded = None  # before the next one takes its place in memory
            self.loaded = (number, ready_model(self.specs[number]))
        return self.loaded[1]

    def make(
        self, work: Work, on_batch: Callable[[int], object]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[bool]]:
        """Rows of the images table and of the gate's scores, and which images are below its floor."""
        from diffalign.data.images import encode_png, fingerprint, sha256, to_pil

        config, model, spec = self.config, self.model(work.model), self.specs[work.model]
        shared = {
            "seed": config.seed, "model": spec.path, "revision": spec.revision,
            "adapter": spec.lora.path if spec.lora else None,
            "sampler": config.scheduler or type(model.scheduler).__name__,
            "num_inference_steps": config.sampling.num_inference_steps, "guidance_scale": config.sampling.guidance_scale,
            "versions": self.versions, "licence": config.licence,
        }  # fmt: skip
        rows, scores, unsafe = list[dict[str, Any]](), list[dict[str, Any]](), list[bool]()
        for batch, made in self._sampled(model, work, on_batch):
            pictures = to_pil(made)
            data = [encode_png(p) for p in pictures]
            hashes = [sha256(d) for d in data]
            if self.gate is not None:
                bad, said = self.gate(pictures, [i.prompt.text for i in batch], hashes)
                unsafe, scores = unsafe + bad, scores + said
            else:
                unsafe += [False] * len(batch)
            for item, picture, png, digest in zip(batch, pictures, data, hashes, strict=True):
                name = f"{item.prompt.id}-{config.seed}-{item.k}" + (f"-{work.model}" if work.model else "")
                rows.append({
                    **shared, "image_id": name, "sha256": digest, "prompt_id": item.prompt.id, "prompt": item.prompt.text,
                    "negative_prompt": item.prompt.negative, "image": {"bytes": png, "path": None}, "k": item.k,
                    "width": picture.width, "height": picture.height, "phash": fingerprint(picture),
                })  # fmt: skip
        return rows, scores, unsafe

    def _sampled(self, model: Model, work: Work, on_batch: Callable[[int], object]) -> Iterator[tuple[list[Item], Tensor]]:
        config = self.config
        if work.pictures is not None:
            yield from self._from_pictures(model, work, on_batch)
            return
        items = work.items if config.preview is None else self._previewed(model, work.items, on_batch)
        for batch in _batches(items, config.sampling.batch_size):
            yield batch, sample(model, batch, config.sampling, config.seed, once=True, scheduler=config.scheduler)
            if config.preview is None:
                on_batch(len(batch))

    def _previewed(self, model: Model, items: Sequence[Item], on_batch: Callable[[int], object]) -> list[Item]:
        """The items of a shard that are made at full length."""
        import torch

        from diffalign.scorers.combine import weighted
        from diffalign.train.evaluate import score_images

        config, preview = self.config, self.config.preview
        assert preview is not None
        quick = config.sampling.model_copy(update={"num_inference_steps": preview.num_inference_steps})
        parts = []
        for batch in _batches(items, quick.batch_size):
            parts.append(sample(model, batch, quick, config.seed, once=True, scheduler=config.scheduler))
            on_batch(len(batch))
        k = preview.images_per_prompt
        images = torch.cat(parts)
        values = score_images(self.scorers, [i.prompt.text for i in items[::k]], images.view(-1, k, *images.shape[1:]))
        if unknown := sorted(set(preview.reward) - set(values)):
            raise ConfigError(f"preview.reward: no scorer gives {unknown[0]!r}", hint=f"given: {', '.join(values)}")
        reward = weighted(values, preview.reward)
        chosen = []
        for p, order in enumerate(reward.argsort(dim=1, descending=True, stable=True).tolist()):
            n = config.images_per_prompt
            best = order[: n - n // 2] + order[k - n // 2 :] if preview.keep == "ends" else order[:n]
            chosen += [items[p * k + i] for i in sorted(best)]
        return chosen

    def _from_pictures(
        self, model: Model, work: Work, on_batch: Callable[[int], object]
    ) -> Iterator[tuple[list[Item], Tensor]]:
        """One picture's images at a time: they share its strength."""
        import torch

        from diffalign.data.images import decode, to_tensor

        config, start = self.config, self.config.start_from
        assert start is not None
        assert work.pictures is not None
        low, high = start.strength
        groups: dict[int, list[int]] = {}
        for n, source in enumerate(work.pictures):
            groups.setdefault(id(source), []).append(n)
        for rows in groups.values():
            first = work.items[rows[0]]
            pixels = to_tensor(decode(work.pictures[rows[0]](), first.prompt.text), model.resolution)[None]
            with torch.no_grad():
                latents = model.encode_images(pixels)
            strength = low + (high - low) * unit(config.seed, first.prompt.id, first.k - first.k % config.images_per_prompt)
            for batch in _batches([work.items[n] for n in rows], config.sampling.batch_size):
                more: dict[str, Any] = {"start": latents, "strength": strength, "once": True, "scheduler": config.scheduler}
                yield batch, sample(model, batch, config.sampling, config.seed, **more)
                on_batch(len(batch))


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
