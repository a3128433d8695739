"""Which images of the tables become pairs of one shard, under which captions, and the rows that say so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from diffalign.data.grouped import Floats, Images, Ints, coded, in_units
from diffalign.data.prompts import Prompt
from diffalign.data.tables import conform
from diffalign.data.wording import Similar
from diffalign.excluding import Barrier
from diffalign.negatives import Captions, Crossed, leaves_world
from diffalign.pairs import Group, capped, sigmoid
from diffalign.spec import Spec, dump

if TYPE_CHECKING:
    from diffalign.selection import SelectConfig

USABLE, NO_VALUE, UNREADABLE, BLANK, COPY, OUTSIDE, EVALUATED = range(7)
WHY = (
    "", "a score is missing", "cannot be read", "blank", "a copy within the prompt", "outside the limits",
    "of a prompt that is evaluated on",
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Row:
    """A pair with rows of the images table as its ends."""

    chosen: int
    rejected: int
    rule: str
    margin: float | None = None
    """None where no reward was compared."""
    rejected_prompt: str | None = None
    made_by: str | None = None


@dataclass
class Chosen:
    """The pairs of one shard, and what was turned down."""

    prompts: int
    pairs: list[Row] = field(default_factory=list)
    ties: int = 0
    images_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def notes(self) -> dict[str, Any]:
        made_by = Counter(p.made_by for p in self.pairs if p.made_by)
        return {**vars(self), "pairs": len(self.pairs), "made_by": made_by}


class Selection:
    """Groups, rewards and rules over images that were read once."""

    def __init__(self, config: SelectConfig, images: Images) -> None:
        self.config, self.images = config, images
        self.order, self.starts = images.groups()
        self.scores = {n: in_units(images.value(n), images.prompt, config.units, n) for n in self._names()}
        weighted = [w * self.scores[n] for n, w in config.reward.items()]
        self.reward: Floats = np.sum(weighted, axis=0) if weighted else np.zeros(len(images))
        self.barrier = Barrier(config)
        _, self.sha = coded(images.table["sha256"])
        self.status = self._status()
        self.ids = self._ids()

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self.config.reward, *(self.config.rule.needs if self.config.rule else ())]))

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
        status[pc.equal(images.table["phash"], "blank").fill_null(False).to_numpy()] = BLANK
        status[(self.sha < 0) | pc.is_valid(images.table["error"]).to_numpy()] = UNREADABLE
        first = np.unique(np.stack([images.prompt, self.sha]), axis=1, return_index=True)[1]
        again = np.ones(len(status), bool)
        again[first] = False
        status[again & (status == USABLE)] = COPY
        barred = np.array([*self.barrier.left_out(images.prompts, ", ".join(self.config.path)), False])
        status[barred[images.prompt]] = EVALUATED  # the last one is for images without a prompt
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
        out = Chosen(len(self.prompts_of(n)))
        for prompt in self.prompts_of(n):
            everything = self.rows_of(prompt)
            if len(self.usable(prompt)) < len(everything):
                out.images_dropped.update(WHY[s] for s in self.status[everything] if s != USABLE)
        out.pairs = self._by_rule(n, out)
        if (captions := self.config.captions) is not None:
            out.pairs = self._captioned(captions, n, out)
        if self.config.crossed is not None:
            out.pairs += self._crossed(self.config.crossed, n, out)
        out.ties = sum(self.p_win(p.margin) == 0.5 for p in out.pairs)
        return out

    def _by_rule(self, n: int, out: Chosen) -> list[Row]:
        config, rule, pairs = self.config, self.config.rule, list[Row]()
        if rule is None:
            return pairs
        said = dump(rule).strip()
        floors = {name: (self.images.value(name), floor) for name, floor in config.floors.items()}
        for prompt in self.prompts_of(n):
            rows = self.usable(prompt)
            if len(rows) < 2:
                out.dropped["prompts with fewer than two usable images"] += 1
                continue
            group = Group(self.reward[rows].tolist(), {name: v[rows].tolist() for name, v in self.scores.items()})
            kept = []
            for one in rule.candidates(group, out.dropped):
                at = int(rows[one.chosen])
                if low := next((name for name, (v, floor) in floors.items() if v[at] < floor), None):
                    out.dropped[f"winner below the floor of {low}"] += 1
                elif one.margin > rule.min_margin or config.ties == "keep":
                    kept.append(one)
                else:
                    out.dropped["margin too small"] += 1
            kept = capped(kept, config.max_per_image, config.max_per_prompt, out.dropped)
            pairs += [Row(int(rows[p.chosen]), int(rows[p.rejected]), said, p.margin) for p in kept]
        return pairs

    def _captioned(self, captions: Captions, n: int, out: Chosen) -> list[Row]:
        """The shard's pairs and every usable image against itself, or the pairs alone, with edited captions for the losers."""
        if captions.of == "images":
            said = dump(captions).strip()
            bare = [Row(int(r), int(r), said) for p in self.prompts_of(n) for r in self.usable(p)]
        else:
            bare = out.pairs
        prompts = list(dict.fromkeys(int(self.images.prompt[p.chosen]) for p in bare))
        made = captions.made([self.images.prompts[p] for p in prompts], self._refused, out.dropped)
        edits = dict(zip(prompts, made, strict=True))
        found = [
            replace(p, rejected_prompt=e.text, made_by=f"edited {e.kind}")
            for p in bare
            for e in edits[int(self.images.prompt[p.chosen])]
        ]
        return found if captions.of == "losers" else out.pairs + found

    def _refused(self, prompt: str, caption: str) -> str | None:
        return leaves_world(prompt, caption) or ("a prompt that is evaluated on" if caption in self.barrier else None)

    def _crossed(self, crossed: Crossed, n: int, out: Chosen) -> list[Row]:
        said, pairs, prompts = dump(crossed).strip(), list[Row](), self.images.prompts

        def usable(prompt: int) -> bool:
            return len(self.usable(prompt)) > 0

        for prompt in filter(usable, self.prompts_of(n)):
            best = self._end(prompt, "best")
            for other in crossed.neighbours_of(prompt, prompts, self.similar, usable, out.dropped):
                lost = self._end(other, crossed.take)
                if self.sha[best] == self.sha[lost]:
                    out.dropped["crossings: the same picture has both prompts"] += 1
                    continue
                if "images" in crossed.pairs:
                    pairs.append(Row(best, lost, said, made_by="crossed images"))
                if "captions" in crossed.pairs:
                    pairs.append(Row(best, best, said, rejected_prompt=prompts[other], made_by="crossed captions"))
        return pairs

    def _end(self, prompt: int, which: Literal["best", "worst"]) -> int:
        """The best or the worst usable image of a prompt."""
        rows = self.usable(prompt)
        order = rows[np.lexsort((rows, -self.reward[rows]))]
        return int(order[0 if which == "best" else -1])

    def shown(self, n: int, chosen: Chosen) -> Ints:
        """Rows whose pictures the shard's pairs and groups need; those of crossed pairs lie in the shards of their prompts."""
        mine = self.prompts_of(n)
        ends = [r for p in chosen.pairs for r in (p.chosen, p.rejected) if self.images.prompt[r] in mine]
        if (crossed := self.config.crossed) is not None:
            ends += [self._end(p, w) for p in mine if len(self.usable(p)) for w in ("best", crossed.take)]  # type: ignore[arg-type]
        return np.unique([*ends, *(self.listed(n) if self.config.lists else ())]).astype(np.int64)

    def p_win(self, margin: float | None) -> float:
        if margin is None or self.config.rule is None:
            return 1.0
        if margin <= self.config.rule.min_margin:
            return 0.5
        return 1.0 if self.config.temperature is None else sigmoid(margin / self.config.temperature)

    @cached_property
    def similar(self) -> Similar:
        """Of all prompts."""
        assert self.config.crossed is not None
        return Similar(self.images.prompts, self.config.crossed.least)

    @cached_property
    def edges(self) -> Floats:
        """Margins at which a new bin begins, of all pairs of all shards: every process finds the same."""
        margins = [p.margin or 0.0 for n in range(self.shards) for p in self._by_rule(n, Chosen(0))]
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

        config, table, pairs = self.config, self.images.table, chosen.pairs
        win, lose = (pa.array([getattr(p, side) for p in pairs], pa.int64()) for side in ("chosen", "rejected"))
        weight: list[float | None] = [None] * len(pairs)
        place: list[int | None] = [None] * len(pairs)
        if config.density is not None:
            both = np.sqrt(self.rarity[win.to_numpy()] * self.rarity[lose.to_numpy()])
            weight = (both**config.density.exponent).tolist()
        if config.bins is not None:
            place = [None if p.margin is None else int(np.sum(p.margin <= self.edges)) for p in pairs]
        prompt_id, prompt = table["prompt_id"].take(win), table["prompt"].take(win)
        ids = [self.ids.take(side) for side in (win, lose)]
        strings: dict[str, list[str | None]] = {
            "margins": [self._margins(p) for p in pairs], "rule": [p.rule for p in pairs],
            "scores": [None if p.margin is None else self.said for p in pairs], "source": [p.made_by for p in pairs],
            "rejected_prompt": [p.rejected_prompt for p in pairs],
        }  # fmt: skip
        rows = {
            "pair_id": pa.array(self._pair_ids(ids, pairs), pa.string()), "prompt_id": prompt_id, "prompt": prompt,
            "chosen_id": ids[0], "rejected_id": ids[1], "p_win": pa.array([self.p_win(p.margin) for p in pairs], pa.float64()),
            "weight": pa.array(weight, pa.float64()), "bin": pa.array(place, pa.int64()),
            **{name: pa.array(values, pa.string()) for name, values in strings.items()},
        }  # fmt: skip
        return conform(pa.table(rows), "pairs")

    @staticmethod
    def _pair_ids(ids: Any, pairs: Sequence[Row]) -> list[str]:
        """winner>loser, and the id of the loser's own caption, if it has one."""
        caption = [f"#{Prompt(p.rejected_prompt).id}" if p.rejected_prompt else "" for p in pairs]
        return [f"{a}>{b}{c}" for a, b, c in zip(*(side.to_pylist() for side in ids), caption, strict=True)]

    @property
    def said(self) -> str:
        """What the reward was made of."""
        return " + ".join(f"{w:g} {name}" for name, w in self.config.reward.items()) + f", {self.config.units}"

    def _margins(self, pair: Row) -> str | None:
        if pair.margin is None:
            return None
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
