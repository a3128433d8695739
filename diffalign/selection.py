"""``diffalign pairs``: from scored images to preference pairs, prompt by prompt, shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from diffalign.data.copies import copy_images
from diffalign.data.grouped import Floats, Images, Ints, Units, coded, in_units, read_images
from diffalign.data.tables import fingerprint, read_notes, run_shards, shard_path, write_shard
from diffalign.pairs import PAIR_RULES, BestWorst, Group, PairRule, Preference, capped, sigmoid
from diffalign.spec import Spec, dump

USABLE, NO_VALUE, UNREADABLE, BLANK, COPY, OUTSIDE = range(6)
WHY = ("", "a score is missing", "cannot be read", "blank", "a copy within the prompt", "outside the limits")


class Density(Spec):
    """w = (numerator / sqrt(p_w p_l))^exponent, p the share of images whose reward falls into the same bin (VideoDPO)."""

    bin_width: float = Field(default=0.01, gt=0)
    exponent: float = Field(default=1.0, ge=0)
    numerator: float | None = Field(default=None, gt=0)
    """The largest share if not given, so that no weight is below 1; the published code has 0.72."""

    def weights(self, rewards: Floats) -> Floats:
        """(N,) of the single images: numerator / p; a pair's weight is the geometric mean of two, to the exponent."""
        places = np.floor(rewards / self.bin_width)
        _, inverse, counts = np.unique(places, return_inverse=True, return_counts=True)
        share = counts / max(len(rewards), 1)
        top = share.max(initial=0) if self.numerator is None else self.numerator
        out: Floats = top / share[inverse]
        return out


class SelectConfig(Spec):
    """Preference pairs, and groups for listwise losses, from the images and scores tables of dataset folders."""

    version: Literal[1] = 1
    path: list[str] = Field(min_length=1)
    """Dataset folders with images/ and scores/: one, or several, whose images of one prompt compete."""
    output_dir: str
    """The same folder as ``path`` to add pairs/ there; another one also gets the pictures that stand in pairs."""
    image_root: str | None = None
    """The folder or URL that pictures outside of their dataset folder are copied from, and may not lead out of."""
    reward: dict[str, float] = Field(min_length=1)
    """Scores by their names in the tables, with weights; ``name@version`` where there are several versions."""
    units: Units = "native"
    """What scores and margins are measured in: ``native``, ``std`` (deviations within prompts, pooled over all of them) or
    ``rank`` (the share of the prompt's other images that are worse). Sums of several scores want std or rank."""
    rule: Annotated[PairRule, PAIR_RULES] = BestWorst()
    ties: Literal["drop", "keep"] = "drop"
    """Pairs whose margin is no more than ``rule.min_margin``: left out, or written with p_win 0.5."""
    temperature: float | None = Field(default=None, gt=0)
    """p_win = sigmoid(margin / temperature) if given, else 1."""
    limits: dict[str, tuple[float | None, float | None]] = {}
    """Lowest and highest native value of a score that an image may have to compete at all; null is no limit."""
    floors: dict[str, float] = {}
    """Native values that a chosen image must reach (Prompt-A-Video)."""
    max_per_image: int | None = Field(default=None, ge=1)
    max_per_prompt: int | None = Field(default=None, ge=1)
    """Caps on pairs; the widest margins stay."""
    density: Density | None = None
    """Writes ``weight``: pairs of rare rewards weigh more."""
    bins: int | None = Field(default=None, ge=2)
    """Writes ``bin``: 0 for the widest margins (the easiest pairs) to bins - 1, equally many in each (Curriculum-DPO)."""
    lists: bool = False
    """Also write groups/: all usable images of a prompt, best first."""
    shard_size: int = Field(default=2000, ge=1)
    """Prompts a shard; a killed run goes on at the first missing shard."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass
class Selected:
    """What all processes together have selected so far."""

    finished: bool
    made: int
    """Shards made now by this process."""
    prompts: int = 0
    images: int = 0
    pairs: int = 0
    ties: int = 0
    images_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self, folder: str) -> list[str]:
        """For people."""
        out = [f"{self.pairs} pairs of {self.prompts} prompts and {self.images} images, in {folder}"]
        out += [f"{self.ties} of them are ties"] if self.ties else []
        out += [f"  images dropped: {n} {why}" for why, n in self.images_dropped.most_common()]
        out += [f"  dropped: {n} {why}" for why, n in self.dropped.most_common()]
        return out if self.finished else [*out, "other processes are still at work"]


def select(config: SelectConfig, rank: int = 0, world: int = 1) -> Selected:
    """The whole of ``diffalign pairs``: the shards of this process. The same tables and configuration give the same bytes.

    Raises:
        DataError: a folder without images, or a score that none has; the output holds pairs of another plan.
    """
    folders, out = [Path(p) for p in config.path], Path(config.output_dir)
    work = Selection(config, read_images(folders))
    inputs = [(f, sorted([*f.glob("images/*.parquet"), *f.glob("scores/*.parquet")])) for f in folders]
    plan = config.model_dump(mode="json", exclude={"output_dir"}) | {"fingerprint": [fingerprint(*i) for i in inputs]}
    in_place = len(folders) == 1 and folders[0].resolve() == out.resolve()

    def shard(n: int) -> tuple[Any, dict[str, Any]]:
        chosen = work.shard(n)
        if config.lists:
            write_shard(out, "groups", n, work.group_rows(n))
        if not in_place:
            rows = work.listed(n) if config.lists else np.unique([r for p in chosen.pairs for r in (p.chosen, p.rejected)])
            copy_images(work.images, rows, work.ids, out, n, config.image_root)
        return work.pair_rows(chosen), chosen.notes()

    made = run_shards(out, "pairs", plan, work.shards, shard, rank, world)
    there = [p for p in (shard_path(out, "pairs", n) for n in range(work.shards)) if p.exists()]
    total = Selected(len(there) == work.shards, made, images=len(work.images))
    for path in there:
        notes = read_notes(path)
        total.prompts, total.pairs, total.ties = (
            a + notes[k] for a, k in ((total.prompts, "prompts"), (total.pairs, "pairs"), (total.ties, "ties"))
        )
        total.images_dropped.update(notes["images_dropped"])
        total.dropped.update(notes["dropped"])
    if no_prompt := int((work.images.prompt < 0).sum()):
        total.images_dropped["without a prompt"] = no_prompt
    return total


@dataclass
class Chosen:
    """The pairs of one shard, with rows of the images table as their ends."""

    pairs: list[Preference]
    prompts: int
    ties: int
    images_dropped: Counter[str]
    dropped: Counter[str]

    def notes(self) -> dict[str, Any]:
        return {**vars(self), "pairs": len(self.pairs)}


class Selection:
    """Groups, rewards and rules over images that were read once."""

    def __init__(self, config: SelectConfig, images: Images) -> None:
        self.config, self.images = config, images
        self.order, self.starts = images.groups()
        self.scores = {n: in_units(images.value(n), images.prompt, config.units, n) for n in self._names()}
        weighted = [w * self.scores[n] for n, w in config.reward.items()]
        self.reward: Floats = np.sum(weighted, axis=0)
        self.status = self._status()
        self.ids = self._ids()

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self.config.reward, *self.config.rule.needs]))

    @property
    def shards(self) -> int:
        return -(-len(self.images.prompts) // self.config.shard_size)

    def _status(self) -> Ints:
        """(N,) why an image cannot compete; 0 where it can."""
        import pyarrow.compute as pc

        images, status = self.images, np.full(len(self.images), USABLE, np.int64)
        for name, (low, high) in self.config.limits.items():
            values = images.value(name)
            status[~((values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high)))] = OUTSIDE
        for name in self._names():
            status[~np.isfinite(self.scores[name])] = NO_VALUE
        for name in self.config.floors:
            status[~np.isfinite(images.value(name))] = NO_VALUE
        _, codes = coded(images.table["sha256"])
        status[pc.equal(images.table["phash"], "blank").fill_null(False).to_numpy()] = BLANK
        status[(codes < 0) | pc.is_valid(images.table["error"]).to_numpy()] = UNREADABLE
        first = np.unique(np.stack([images.prompt, codes]), axis=1, return_index=True)[1]
        again = np.ones(len(status), bool)
        again[first] = False
        status[again & (status == USABLE)] = COPY
        return status

    def _ids(self) -> Any:
        """Image ids; of ids that stand for several pictures (two models, the same prompt and seed) with their hash."""
        import pyarrow as pa
        import pyarrow.compute as pc

        ids, sha = self.images.table["image_id"], self.images.table["sha256"].fill_null("")
        both = pa.table({"id": ids, "sha": sha}).group_by("id").aggregate([("sha", "count_distinct")])
        shared = both.filter(pc.greater(both["sha_count_distinct"], 1))["id"]
        long = pc.binary_join_element_wise(ids, pc.utf8_slice_codeunits(sha, 0, 8), "-")
        return pc.if_else(pc.is_in(ids, value_set=shared.combine_chunks()), long, ids)

    def rows_of(self, prompt: int) -> Ints:
        return self.order[self.starts[prompt] : self.starts[prompt + 1]]

    def usable(self, prompt: int) -> Ints:
        rows = self.rows_of(prompt)
        return rows[self.status[rows] == USABLE]

    def prompts_of(self, shard: int) -> range:
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.images.prompts)))

    def shard(self, n: int) -> Chosen:
        """The pairs of a shard, and what was turned down."""
        config, out = self.config, Chosen([], len(self.prompts_of(n)), 0, Counter(), Counter())
        floors = {name: (self.images.value(name), floor) for name, floor in config.floors.items()}
        for prompt in self.prompts_of(n):
            everything = self.rows_of(prompt)
            rows = self.usable(prompt)
            if len(rows) < len(everything):
                out.images_dropped.update(WHY[s] for s in self.status[everything] if s != USABLE)
            if len(rows) < 2:
                out.dropped["prompts with fewer than two usable images"] += 1
                continue
            group = Group(self.reward[rows].tolist(), {name: v[rows].tolist() for name, v in self.scores.items()})
            kept, ties = [], 0
            for one in config.rule.candidates(group, out.dropped):
                at = int(rows[one.chosen])
                if low := next((name for name, (v, floor) in floors.items() if v[at] < floor), None):
                    out.dropped[f"winner below the floor of {low}"] += 1
                elif one.margin > config.rule.min_margin or config.ties == "keep":
                    kept.append(one)
                else:
                    out.dropped["margin too small"] += 1
            kept = capped(kept, config.max_per_image, config.max_per_prompt, out.dropped)
            ties = sum(one.margin <= config.rule.min_margin for one in kept)
            out.ties += ties
            out.pairs += [Preference(int(rows[p.chosen]), int(rows[p.rejected]), p.margin) for p in kept]
        return out

    def p_win(self, margin: float) -> float:
        if margin <= self.config.rule.min_margin:
            return 0.5
        return 1.0 if self.config.temperature is None else sigmoid(margin / self.config.temperature)

    @cached_property
    def edges(self) -> Floats:
        """Margins at which a new bin begins, of all pairs of all shards: every process finds the same."""
        margins = [p.margin for n in range(self.shards) for p in self.shard(n).pairs]
        n = self.config.bins or 1
        return np.quantile(margins, [1 - i / n for i in range(1, n)]) if margins else np.zeros(n - 1)

    @cached_property
    def rarity(self) -> Floats:
        """(N,) of usable images, by their bin of the density."""
        out = np.full(len(self.images), np.nan)
        usable = np.flatnonzero((self.status == USABLE) & (self.images.prompt >= 0))
        out[usable] = (self.config.density or Density()).weights(self.reward[usable])
        return out

    def pair_rows(self, chosen: Chosen) -> Any:
        """The shard's rows of the pairs table."""
        import pyarrow as pa
        import pyarrow.compute as pc

        config, table, pairs = self.config, self.images.table, chosen.pairs
        win, lose = (pa.array([getattr(p, side) for p in pairs], pa.int64()) for side in ("chosen", "rejected"))
        weight: list[float | None] = [None] * len(pairs)
        place: list[int | None] = [None] * len(pairs)
        if config.density is not None:
            both = np.sqrt(self.rarity[win.to_numpy()] * self.rarity[lose.to_numpy()])
            weight = (both**config.density.exponent).tolist()
        if config.bins is not None:
            place = [int(np.sum(p.margin <= self.edges)) for p in pairs]
        prompt_id, prompt = table["prompt_id"].take(win), table["prompt"].take(win)
        ids = [self.ids.take(side) for side in (win, lose)]
        none = pa.nulls(len(pairs), pa.string())
        return pa.table(
            {
                "pair_id": pc.binary_join_element_wise(*ids, ">"), "prompt_id": prompt_id, "prompt": prompt,
                "chosen_id": ids[0], "rejected_id": ids[1], "p_win": [self.p_win(p.margin) for p in pairs],
                "margins": [self._margins(p) for p in pairs], "rule": [dump(config.rule).strip()] * len(pairs),
                "scores": [self.said] * len(pairs), "annotator": none, "user": none, "group": none, "source": none,
                "weight": pa.array(weight, pa.float64()),
                "bin": pa.array(place, pa.int64()), "rejected_prompt": none,
            }
        )  # fmt: skip

    @property
    def said(self) -> str:
        """What the reward was made of."""
        return " + ".join(f"{w:g} {name}" for name, w in self.config.reward.items()) + f", {self.config.units}"

    def _margins(self, pair: Preference) -> str:
        parts = {n: round(float(v[pair.chosen] - v[pair.rejected]), 6) for n, v in self.scores.items()}
        return json.dumps({"reward": round(pair.margin, 6), **parts})

    def listed(self, n: int) -> Ints:
        """Rows that stand in the shard's groups."""
        return np.concatenate([np.empty(0, np.int64), *(g for _, g in self._groups(n))])

    def _groups(self, n: int) -> Iterator[tuple[int, Ints]]:
        for prompt in self.prompts_of(n):
            rows = self.usable(prompt)
            if len(rows) > 1:
                yield prompt, rows[np.lexsort((rows, -self.reward[rows]))]

    def group_rows(self, n: int) -> list[dict[str, Any]]:
        """The shard's rows of the groups table."""
        out = []
        for prompt, rows in self._groups(n):
            prompt_id = self.images.table["prompt_id"][int(rows[0])].as_py()
            out.append({
                "group_id": prompt_id, "prompt_id": prompt_id, "prompt": self.images.prompts[prompt], "scores": self.said,
                "image_ids": self.ids.take(rows).to_pylist(), "rewards": self.reward[rows].tolist(),
            })  # fmt: skip
        return out
