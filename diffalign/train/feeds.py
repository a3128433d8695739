"""From preference pairs to the terms that objectives read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffalign.data.buckets import Size, bucket_sizes, nearest
from diffalign.data.cache import BATCH, TensorCache
from diffalign.data.images import frame, to_tensor
from diffalign.data.pairs import Pair, Picture
from diffalign.models import Cond, Model
from diffalign.objectives import Need, PairTerms
from diffalign.path import add_noise, denoise_error, target
from diffalign.timesteps import TimestepPolicy


@dataclass(frozen=True)
class PairBatch:
    """B encoded pairs with their noise: ``u`` (B,) fractions of the schedule, the rest (B, C, H, W).

    The frames (B, 6) say how each picture was cut: see :meth:`diffalign.models.Model.sized`.
    """

    winner: Tensor
    loser: Tensor
    winner_frame: Tensor
    loser_frame: Tensor
    eps: Tensor
    u: Tensor
    cond: Cond | tuple[str | None, ...]
    """Encoded prompts; the prompts themselves where the text encoders are trained."""
    weight: Tensor

    def __len__(self) -> int:
        return len(self.u)


class Feed(Protocol):
    """Makes the micro-batches of a step and turns them into terms."""

    def batches(self, step: int) -> Iterator[PairBatch]: ...
    def terms(self, model: Model, batch: PairBatch, needs: frozenset[Need]) -> PairTerms: ...


class OfflinePairs:
    """Pairs from disk, encoded once.

    Which pairs a step sees and the noise of each are functions of (seed, step) and (seed, epoch, pair): resuming needs no
    data state, and batch size, accumulation and processes do not change what is drawn.

    With a ``granularity`` in pixels each pair is trained at the bucket (:mod:`diffalign.data.buckets`) that its winner's
    shape is nearest to, both members cut to it, and a micro-batch holds pairs of one bucket. Each bucket goes through its
    own shuffled epochs, and comes up as often as it holds pairs. Processes and accumulation may still be exchanged freely;
    ``batch_size`` then decides which pairs stand together.
    """

    def __init__(
        self,
        model: Model,
        pairs: Sequence[Pair],
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
    ) -> None:
        self.model, self.timesteps, self.seed, self.caption_dropout = model, timesteps, seed, caption_dropout
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.pairs = list(pairs)
        sizes = bucket_sizes(size, granularity) if granularity else [size]
        self.sizes = [nearest(p.chosen.shape, sizes) for p in self.pairs] if len(sizes) > 1 else [size] * len(self.pairs)
        """The bucket of each pair."""
        self.buckets = {s: n for s in sizes if (n := self.sizes.count(s))}
        """How many pairs are in each."""
        self._orders: dict[Size, tuple[int, list[int]]] = {}
        self._schedule: tuple[int, list[tuple[Size, int]]] = (-1, [])
        key = model.fingerprint()
        self.latents = {s: TensorCache(cache / f"pictures-{key}-{s[0]}x{s[1]}") for s in self.buckets}
        self.texts = TensorCache(cache / f"texts-{key}")
        self._encode()

    def _encode(self) -> None:
        pictures = [p for pair in self.pairs for p in (pair.chosen, pair.rejected)]
        self.keys = [p.key for p in pictures]
        self.model.stage("pictures")
        for size, cache in self.latents.items():
            some = [2 * i + side for i, s in enumerate(self.sizes) if s == size for side in (0, 1)]
            make = partial(self._latents, [pictures[j] for j in some], size)
            cache.fill([self.keys[j] for j in some], make, pictures_at_once(size))
        self.prompts = list(dict.fromkeys(p.prompt for p in self.pairs))
        if self.model.trains_texts:
            return
        self.model.stage("texts")
        prompts = [None, *self.prompts]
        self.texts.fill(
            [text_key(p) for p in prompts], lambda rows: self.model.encode_prompts([prompts[i] for i in rows]).parts()
        )

    def _latents(self, pictures: Sequence[Picture], size: Size, rows: list[int]) -> dict[str, Tensor]:
        images = [pictures[i].load() for i in rows]
        x0 = self.model.encode_images(torch.stack([to_tensor(image, size) for image in images]))
        return {"x0": x0, "frame": torch.stack([frame(image, size) for image in images])}

    @property
    def pairs_per_step(self) -> int:
        """Pairs that one optimizer step sees, over all processes."""
        return self.batch_size * self.accumulation * self.world

    def batches(self, step: int) -> Iterator[PairBatch]:
        """This process's micro-batches of one optimizer step."""
        first = step * self.accumulation * self.world
        for micro in range(self.accumulation):
            size, block = self._block(first + micro * self.world + self.rank)
            start = block * self.batch_size
            yield self.batch([self._at(size, p) for p in range(start, start + self.batch_size)])

    def fixed(self, draws: int = 1) -> Iterator[PairBatch]:
        """Every pair once per draw, always with the same noise: for held-out evaluation."""
        for draw in range(draws):
            for size in self.buckets:
                mine = [i for i, s in enumerate(self.sizes) if s == size]
                for start in range(0, len(mine), self.batch_size):
                    yield self.batch([(-1 - draw, i) for i in mine[start : start + self.batch_size]])

    def _block(self, number: int) -> tuple[Size, int]:
        """The bucket of the run's ``number``-th micro-batch, and how many the bucket has had before.

        The buckets of all pairs, shuffled, are who is next: after as many micro-batches as there are pairs, each bucket has
        had its share exactly.
        """
        turn, offset = divmod(number, len(self.pairs))
        if self._schedule[0] != turn:
            had = {size: turn * pairs for size, pairs in self.buckets.items()}
            blocks = []
            for i in self._shuffled("buckets", turn):
                blocks.append((self.sizes[i], had[self.sizes[i]]))
                had[self.sizes[i]] += 1
            self._schedule = (turn, blocks)
        return self._schedule[1][offset]

    def _at(self, size: Size, position: int) -> tuple[int, int]:
        """(epoch, pair) at a position of a bucket's endless stream of shuffled epochs."""
        epoch, offset = divmod(position, self.buckets[size])
        if self._orders.get(size, (-1, []))[0] != epoch:
            self._orders[size] = (epoch, [i for i in self._shuffled("order", epoch) if self.sizes[i] == size])
        return epoch, self._orders[size][1][offset]

    def _shuffled(self, *key: object) -> list[int]:
        return torch.randperm(len(self.pairs), generator=_generator(self.seed, *key)).tolist()

    def batch(self, rows: Sequence[tuple[int, int]]) -> PairBatch:
        """Pairs with the noise of their (epoch, index), drawn once for both members."""
        us, noises, texts, pictures = [], [], [], []
        for epoch, i in rows:
            g = _generator(self.seed, epoch, self.keys[2 * i], self.keys[2 * i + 1])
            us.append(self.timesteps.draw(1, g))
            pictures.append([self.latents[self.sizes[i]][self.keys[2 * i + side]] for side in (0, 1)])
            noises.append(torch.randn(pictures[-1][0]["x0"].shape, generator=g))
            dropped = epoch >= 0 and torch.rand((), generator=g).item() < self.caption_dropout
            texts.append(None if dropped else self.pairs[i].prompt)
        winners, losers = zip(*pictures, strict=True)
        return PairBatch(
            torch.stack([p["x0"] for p in winners]),
            torch.stack([p["x0"] for p in losers]),
            torch.stack([p["frame"] for p in winners]),
            torch.stack([p["frame"] for p in losers]),
            torch.stack(noises),
            torch.cat(us),
            tuple(texts) if self.model.trains_texts else Cond.cat([self._cond(t) for t in texts]),
            torch.ones(len(rows)),
        )

    def _cond(self, prompt: str | None) -> Cond:
        return Cond(**{part: x[None] for part, x in self.texts[text_key(prompt)].items()})

    def terms(self, model: Model, batch: PairBatch, needs: frozenset[Need]) -> PairTerms:
        """Denoise errors of the batch under the current weights and, if needed, the reference."""
        return pair_terms(model, batch, self.timesteps, needs)


def pair_terms(model: Model, batch: PairBatch, timesteps: TimestepPolicy, needs: frozenset[Need]) -> PairTerms:
    """Errors at one (t, eps) per pair, winners and losers in one forward pass per set of weights."""
    both = "loser" in needs
    device = model.timestep(batch.u).device
    x0 = torch.cat([batch.winner, batch.loser]) if both else batch.winner
    eps, u = (torch.cat([batch.eps] * 2), torch.cat([batch.u] * 2)) if both else (batch.eps, batch.u)
    frames = [batch.winner_frame, batch.loser_frame] if both else [batch.winner_frame]
    x0, eps = x0.to(device), eps.to(device)
    t = model.timestep(u, (x0.shape[-2], x0.shape[-1]))
    c = model.coeffs(t)
    x, wanted = add_noise(x0, eps, c), target(model.kind, x0, eps, c)
    scale = timesteps.weight(c)

    def errors() -> tuple[Tensor, Tensor | None]:
        read = batch.cond if isinstance(batch.cond, Cond) else model.encode_prompts(batch.cond)
        cond = Cond.cat([model.sized(read, frame) for frame in frames]).to(device)
        e = scale * denoise_error(model.predict(x, t, cond), wanted)
        w, *rest = e.chunk(2) if both else (e,)
        return w, rest[0] if rest else None

    ref_w = ref_l = None
    if "reference" in needs:
        with torch.no_grad(), model.weights("reference"):
            ref_w, ref_l = errors()
    winner, loser = errors()
    return PairTerms(winner, loser, ref_w, ref_l, batch.u.to(device), batch.weight.to(device))


def pictures_at_once(size: Size) -> int:
    """How many pictures are encoded together: at most a square of 1024 in all."""
    return max(1, min(BATCH, 1024**2 // (size[0] * size[1])))


def text_key(prompt: str | None) -> str:
    """Cache key of a prompt, or of its absence."""
    return "none" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
