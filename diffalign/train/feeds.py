"""Which examples a step sees, with which noise: a function of the step, so that resuming needs no data state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffalign.data.buckets import Size, bucket_sizes, nearest
from diffalign.data.cache import BATCH, TensorCache
from diffalign.data.examples import Example
from diffalign.data.images import frame, to_tensor
from diffalign.data.maps import Kind
from diffalign.data.pairs import Picture
from diffalign.errors import DataError
from diffalign.models import Cond, Model
from diffalign.objectives import Data, Need, Terms
from diffalign.seeds import generator_of
from diffalign.spec import Spec
from diffalign.timesteps import TimestepPolicy
from diffalign.train.coupling import Coupling, draw, first_noise, require_first_noise
from diffalign.train.groups import Turns, names_of
from diffalign.train.replay import LAGGED
from diffalign.train.terms import Batch, terms_of, weigh


class Curriculum(Spec):
    """The ``data.curriculum`` section: pairs by their gap in score, the clearest first (Curriculum-DPO)."""

    chunks: int = Field(default=5, ge=2)
    """Parts of equal size; those that have come in stay in."""
    every: int = Field(default=400, ge=1)
    """Optimizer steps until the next part comes in."""


class Feed(Protocol):
    """Makes the micro-batches of a step and turns them into terms."""

    def batches(self, step: int) -> Iterator[Any]: ...
    def terms(self, model: Model, batch: Any, needs: frozenset[Need], reference: str = "reference") -> Terms: ...
    def state(self) -> dict[str, Any]:
        """What it keeps from step to step, for a checkpoint: tensors and plain values; empty if nothing."""

    def restore(self, state: dict[str, Any]) -> None: ...


class Offline:
    """Examples from disk, encoded once.

    Which of them a step sees and the noise of each are functions of (seed, step) and (seed, epoch, example): batch size,
    accumulation and processes do not change what is drawn.

    With a ``granularity`` in pixels each example is trained at the bucket (:mod:`diffalign.data.buckets`) that its first
    picture's shape is nearest to, all of them cut to it, and a micro-batch holds examples of one bucket. Each bucket goes
    through its own shuffled epochs, and comes up as often as it holds examples. Processes and accumulation may still be
    exchanged freely; ``batch_size`` then decides which examples stand together.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        timesteps: TimestepPolicy,
        cache: Path,
        *,
        size: Size,
        granularity: int | None = None,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        caption_dropout: float = 0.0,
        data: Data = "pairs",
        coupling: Coupling | None = None,
        curriculum: Curriculum | None = None,
        maps: Kind | None = None,
        balanced: bool = False,
    ) -> None:
        weigh(model, timesteps, model.coeffs(model.timestep(torch.zeros(1))))  # refused before anything is encoded
        self.model, self.timesteps, self.seed, self.caption_dropout = model, timesteps, seed, caption_dropout
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.data, self.coupling, self.curriculum = data, coupling or Coupling(), curriculum
        self.examples = list(examples)
        self.groups = names_of(self.examples)
        self.turns = Turns(self.examples, seed) if balanced else None
        self.ranked = sorted(range(len(self.examples)), key=lambda i: -_gap(self.examples[i]))
        sizes = bucket_sizes(size, granularity) if granularity else [size]
        shapes = [nearest(x.pictures[0].shape, sizes) for x in self.examples] if len(sizes) > 1 else None
        self.sizes = shapes or [size] * len(self.examples)
        """The bucket of each example."""
        if self.coupling.noise == "stored":
            for example, at in zip(self.examples, self.sizes, strict=True):
                for picture in example.pictures:
                    require_first_noise(picture, model, at)
        self.buckets = {s: n for s in sizes if (n := self.sizes.count(s))}
        """How many examples are in each."""
        self._orders: dict[Size, tuple[int, list[int]]] = {}
        self._schedule: tuple[int, list[tuple[Size, int]]] = (-1, [])
        key = model.fingerprint()
        self.latents = {s: TensorCache(cache / f"pictures-{key}-{s[0]}x{s[1]}") for s in self.buckets}
        self.texts = TensorCache(cache / f"texts-{key}")
        self._encode()
        self.maps = [self._map(i, maps) for i in range(len(self.examples))] if maps else []

    def _map(self, i: int, kind: Kind) -> Tensor:
        """(H, W) weights of the latents' places of an example."""
        example, x0 = self.examples[i], self.latents[self.sizes[i]][self.keys[i][0]]["x0"]
        if example.maps is None:
            raise DataError(
                f"{example.pictures[0].where}: it has no {kind}", hint=f"fill the column {kind}, or drop data.maps"
            )
        shapes = [p.shape for p in example.pictures]
        if len(set(shapes)) > 1:
            raise DataError(
                f"{example.maps.where}: its pictures differ in size, so that one {kind} cannot be of both",
                hint="resize them, or drop data.maps",
            )
        return example.maps.latent(kind, shapes[0], self.sizes[i], (x0.shape[-2], x0.shape[-1]))

    def _encode(self) -> None:
        self.keys = [[p.key for p in x.pictures] for x in self.examples]
        self.model.stage("pictures")
        for size, cache in self.latents.items():
            some = [(i, j) for i, s in enumerate(self.sizes) if s == size for j in range(len(self.keys[i]))]
            make = partial(self._latents, [self.examples[i].pictures[j] for i, j in some], size)
            cache.fill([self.keys[i][j] for i, j in some], make, pictures_at_once(size), self._told("picture"))
        self.prompts = list(dict.fromkeys(p for x in self.examples for p in x.said))
        if self.model.trains_texts:
            return
        self.model.stage("texts")
        prompts = [None, *self.prompts]
        read = lambda rows: self.model.encode_prompts([prompts[i] for i in rows]).parts()  # noqa: E731
        self.texts.fill([text_key(p) for p in prompts], read, unit=self._told("prompt"))

    def _told(self, unit: str) -> str | None:
        """What the bar of this process counts; None where another's is enough."""
        return unit if self.rank == 0 else None

    def _latents(self, pictures: Sequence[Picture], size: Size, rows: list[int]) -> dict[str, Tensor]:
        images = [pictures[i].load() for i in rows]
        x0 = self.model.encode_images(torch.stack([to_tensor(image, size) for image in images]))
        return {"x0": x0, "frame": torch.stack([frame(image, size) for image in images])}

    @property
    def per_step(self) -> int:
        """Examples that one optimizer step sees, over all processes."""
        return self.batch_size * self.accumulation * self.world

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of one optimizer step."""
        lagging, weights = self.coupling.noise == "replay" and self.coupling.replay_every > 1, self.model.named_weights
        if lagging and (step % self.coupling.replay_every == 0 or LAGGED not in weights.snapshots):
            weights.take(LAGGED)  # which checkpoints keep
        first = step * self.accumulation * self.world
        if self.curriculum is not None:
            yield from self._staged(step, self.curriculum)
            return
        for micro in range(self.accumulation):
            size, block = self._block(first + micro * self.world + self.rank)
            start = block * self.batch_size
            yield self.batch([self._at(size, p) for p in range(start, start + self.batch_size)])

    def fixed(self, draws: int = 1) -> Iterator[Batch]:
        """Every example once per draw, always with the same noise: for held-out evaluation."""
        for n in range(draws):
            for size in self.buckets:
                mine = [i for i, s in enumerate(self.sizes) if s == size]
                for start in range(0, len(mine), self.batch_size):
                    yield self.batch([(-1 - n, i) for i in mine[start : start + self.batch_size]])

    def _block(self, number: int) -> tuple[Size, int]:
        """The bucket of the run's ``number``-th micro-batch, and how many the bucket has had before.

        The buckets of all examples, shuffled, are who is next: after as many micro-batches as there are examples, each
        bucket has had its share exactly.
        """
        turn, offset = divmod(number, len(self.examples))
        if self._schedule[0] != turn:
            had = {size: turn * n for size, n in self.buckets.items()}
            blocks = []
            for i in self._shuffled("buckets", turn):
                blocks.append((self.sizes[i], had[self.sizes[i]]))
                had[self.sizes[i]] += 1
            self._schedule = (turn, blocks)
        return self._schedule[1][offset]

    def _at(self, size: Size, position: int) -> tuple[int, int]:
        """(epoch, example) at a position of a bucket's endless stream of shuffled epochs, or of groups that take turns."""
        if self.turns is not None:
            return self.turns.at(position)
        epoch, offset = divmod(position, self.buckets[size])
        if self._orders.get(size, (-1, []))[0] != epoch:
            self._orders[size] = (epoch, [i for i in self._shuffled("order", epoch) if self.sizes[i] == size])
        return epoch, self._orders[size][1][offset]

    def _shuffled(self, *key: object) -> list[int]:
        return torch.randperm(len(self.examples), generator=generator_of(self.seed, *key)).tolist()

    def arrived(self, stage: int, chunks: int) -> list[int]:
        """The examples that have come in by a stage of a curriculum, the clearest first."""
        return self.ranked[: -(-len(self.ranked) * (stage + 1) // chunks)]

    def _staged(self, step: int, plan: Curriculum) -> Iterator[Batch]:
        """Micro-batches of a step whose examples are those that have come in so far, in shuffled epochs of their own."""
        stage = min(step // plan.every, plan.chunks - 1)
        active = self.arrived(stage, plan.chunks)
        orders: dict[int, list[int]] = {}
        start = (step - stage * plan.every) * self.per_step
        for micro in range(self.accumulation):
            at = start + (micro * self.world + self.rank) * self.batch_size
            rows = []
            for position in range(at, at + self.batch_size):
                epoch, offset = divmod(position, len(active))
                if epoch not in orders:
                    g = generator_of(self.seed, "stage", stage, epoch)
                    orders[epoch] = torch.randperm(len(active), generator=g).tolist()
                rows.append((stage * 10**6 + epoch, active[orders[epoch][offset]]))
            yield self.batch(rows)

    def batch(self, rows: Sequence[tuple[int, int]]) -> Batch:
        """Examples with the noise of their (epoch, index), drawn once for all pictures unless they are independent."""
        us, noises, texts, pictures = [], [], [], []
        for epoch, i in rows:
            example = self.examples[i]
            g = generator_of(self.seed, epoch, *self.keys[i])
            pictures.append([self.latents[self.sizes[i]][key] for key in self.keys[i]])
            shape = pictures[-1][0]["x0"].shape
            u, eps = draw(self.coupling, self.timesteps, len(example.pictures), shape, g)
            if self.coupling.noise == "stored":
                own = torch.stack([first_noise(p, self.model) for p in example.pictures])
                eps = own[:, None].expand_as(eps)
            us.append(u)
            noises.append(eps)
            dropped = epoch >= 0 and torch.rand((), generator=g).item() < self.caption_dropout
            said = example.said if self.coupling.captions == "own" else example.said[:1]
            texts.append([None if dropped else p for p in said])
        some = [self.examples[i] for _, i in rows]
        return Batch(
            torch.stack([torch.stack([p["x0"] for p in row]) for row in pictures]),
            torch.stack([torch.stack([p["frame"] for p in row]) for row in pictures]),
            torch.stack(noises),
            torch.stack(us),
            tuple(
                tuple(column) if self.model.trains_texts else Cond.cat([self._cond(t) for t in column])
                for column in zip(*texts, strict=True)
            ),
            torch.tensor([x.weight for x in some]),
            self.data,
            _facts(some, self.groups),
            torch.stack([self.maps[i] for _, i in rows]) if self.maps else None,
        )

    def _cond(self, prompt: str | None) -> Cond:
        return Cond(**{part: x[None] for part, x in self.texts[text_key(prompt)].items()})

    def state(self) -> dict[str, Any]:
        """Nothing: which examples come next is a function of the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return

    def terms(self, model: Model, batch: Batch, needs: frozenset[Need], reference: str = "reference") -> Terms:
        """Denoise errors of the batch under the current weights and, if needed, the reference of that name."""
        return terms_of(model, batch, self.timesteps, needs, self.coupling, reference)


def _facts(examples: Sequence[Example], groups: Sequence[str] = ()) -> dict[str, Tensor]:
    facts = {name: torch.tensor([getattr(x, name) for x in examples]) for name in ("p_win", "good", "kind")}
    if all(x.scores is not None for x in examples):
        facts["scores"] = torch.tensor([x.scores for x in examples])
    if groups:
        facts["group"] = torch.tensor([groups.index(x.group) for x in examples if x.group is not None])
    return facts


def _gap(example: Example) -> float:
    """How much better the first picture is than the last."""
    return example.scores[0] - example.scores[-1] if example.scores else 0.0


def pictures_at_once(size: Size) -> int:
    """How many pictures are encoded together: at most a square of 1024 in all."""
    return max(1, min(BATCH, 1024**2 // (size[0] * size[1])))


def text_key(prompt: str | None) -> str:
    """Cache key of a prompt, or of its absence."""
    return "none" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()
