"""From preference pairs to the terms that objectives read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffalign.data.cache import TensorCache
from diffalign.data.images import frame, to_tensor
from diffalign.data.pairs import Pair
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
    cond: Cond
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
    """

    def __init__(
        self,
        model: Model,
        pairs: Sequence[Pair],
        timesteps: TimestepPolicy,
        cache: Path,
        *,
        size: tuple[int, int],
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
        self._order: tuple[int, list[int]] = (-1, [])
        key = model.fingerprint()
        self.latents = TensorCache(cache / f"pictures-{key}-{size[0]}x{size[1]}")
        self.texts = TensorCache(cache / f"texts-{key}")
        self._encode(size)

    def _encode(self, size: tuple[int, int]) -> None:
        pictures = [p for pair in self.pairs for p in (pair.chosen, pair.rejected)]
        self.keys = [p.key for p in pictures]

        def latents(rows: list[int]) -> dict[str, Tensor]:
            images = [pictures[i].load() for i in rows]
            x0 = self.model.encode_images(torch.stack([to_tensor(image, size) for image in images]))
            return {"x0": x0, "frame": torch.stack([frame(image, size) for image in images])}

        self.latents.fill(self.keys, latents)
        prompts = list(dict.fromkeys([None, *(p.prompt for p in self.pairs)]))
        self.texts.fill(
            [text_key(p) for p in prompts], lambda rows: self.model.encode_prompts([prompts[i] for i in rows]).parts()
        )
        self.cond: type[Cond] = type(self.model.encode_prompts([None]))

    @property
    def pairs_per_step(self) -> int:
        """Pairs that one optimizer step sees, over all processes."""
        return self.batch_size * self.accumulation * self.world

    def batches(self, step: int) -> Iterator[PairBatch]:
        """This process's micro-batches of one optimizer step."""
        first = step * self.pairs_per_step
        for micro in range(self.accumulation):
            start = first + (micro * self.world + self.rank) * self.batch_size
            yield self.batch([self._at(p) for p in range(start, start + self.batch_size)])

    def fixed(self, draws: int = 1) -> Iterator[PairBatch]:
        """Every pair once per draw, always with the same noise: for held-out evaluation."""
        for draw in range(draws):
            for start in range(0, len(self.pairs), self.batch_size):
                yield self.batch([(-1 - draw, i) for i in range(start, min(start + self.batch_size, len(self.pairs)))])

    def _at(self, position: int) -> tuple[int, int]:
        """(epoch, pair) at a position of the endless stream of shuffled epochs."""
        epoch, offset = divmod(position, len(self.pairs))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.pairs), generator=_generator(self.seed, "order", epoch)).tolist()
            self._order = (epoch, order)
        return epoch, self._order[1][offset]

    def batch(self, rows: Sequence[tuple[int, int]]) -> PairBatch:
        """Pairs with the noise of their (epoch, index), drawn once for both members."""
        us, noises, texts = [], [], []
        for epoch, i in rows:
            g = _generator(self.seed, epoch, self.keys[2 * i], self.keys[2 * i + 1])
            us.append(self.timesteps.draw(1, g))
            noises.append(torch.randn(self.latents[self.keys[2 * i]]["x0"].shape, generator=g))
            dropped = epoch >= 0 and torch.rand((), generator=g).item() < self.caption_dropout
            texts.append(text_key(None if dropped else self.pairs[i].prompt))
        winners = [self.latents[self.keys[2 * i]] for _, i in rows]
        losers = [self.latents[self.keys[2 * i + 1]] for _, i in rows]
        return PairBatch(
            torch.stack([p["x0"] for p in winners]),
            torch.stack([p["x0"] for p in losers]),
            torch.stack([p["frame"] for p in winners]),
            torch.stack([p["frame"] for p in losers]),
            torch.stack(noises),
            torch.cat(us),
            self.cond.cat([self.cond(**{part: x[None] for part, x in self.texts[t].items()}) for t in texts]),
            torch.ones(len(rows)),
        )

    def terms(self, model: Model, batch: PairBatch, needs: frozenset[Need]) -> PairTerms:
        """Denoise errors of the batch under the current weights and, if needed, the reference."""
        return pair_terms(model, batch, self.timesteps, needs)


def pair_terms(model: Model, batch: PairBatch, timesteps: TimestepPolicy, needs: frozenset[Need]) -> PairTerms:
    """Errors at one (t, eps) per pair, winners and losers in one forward pass per set of weights."""
    both = "loser" in needs
    device = model.timestep(batch.u).device
    x0 = torch.cat([batch.winner, batch.loser]) if both else batch.winner
    eps, u = (torch.cat([batch.eps] * 2), torch.cat([batch.u] * 2)) if both else (batch.eps, batch.u)
    cond = model.sized(batch.cond, batch.winner_frame)
    if both:
        cond = batch.cond.cat([cond, model.sized(batch.cond, batch.loser_frame)])
    x0, eps, cond = x0.to(device), eps.to(device), cond.to(device)
    t = model.timestep(u, (x0.shape[-2], x0.shape[-1]))
    c = model.coeffs(t)
    x, wanted = add_noise(x0, eps, c), target(model.kind, x0, eps, c)
    scale = timesteps.weight(c)

    def errors() -> tuple[Tensor, Tensor | None]:
        e = scale * denoise_error(model.predict(x, t, cond), wanted)
        w, *rest = e.chunk(2) if both else (e,)
        return w, rest[0] if rest else None

    ref_w = ref_l = None
    if "reference" in needs:
        with torch.no_grad(), model.weights("reference"):
            ref_w, ref_l = errors()
    winner, loser = errors()
    return PairTerms(winner, loser, ref_w, ref_l, batch.u.to(device), batch.weight.to(device))


def text_key(prompt: str | None) -> str:
    """Cache key of a prompt, or of its absence."""
    return "none" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
