"""``diffalign pairs``: from scored images to preference pairs, prompt by prompt, shard by shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from diffalign.choosing import Density, Selection
from diffalign.data.copies import copy_images
from diffalign.data.grouped import Units, read_images
from diffalign.data.tables import fingerprint, read_notes, run_shards, shard_path, write_shard
from diffalign.excluding import Excluding
from diffalign.negatives import CAPTIONS, Captions, Crossed
from diffalign.pairs import PAIR_RULES, BestWorst, PairRule


class SelectConfig(Excluding):
    """Preference pairs, and groups for listwise losses, from the images and scores tables of dataset folders."""

    version: Literal[1] = 1
    path: list[str] = Field(min_length=1)
    """Dataset folders with images/ and scores/: one, or several, whose images of one prompt compete."""
    output_dir: str
    """The same folder as ``path`` to add pairs/ there; another one also gets the pictures that stand in pairs."""
    image_root: str | None = None
    """The folder or URL that pictures outside of their dataset folder are copied from, and may not lead out of."""
    reward: dict[str, float] = {}
    """Scores by their names in the tables, with weights; ``name@version`` where there are several versions."""
    units: Units = "native"
    """What scores and margins are measured in: ``native``, ``std`` (deviations within prompts, pooled over all of them) or
    ``rank`` (the share of the prompt's other images that are worse). Sums of several scores want std or rank."""
    rule: Annotated[PairRule, PAIR_RULES] | None = BestWorst()
    """Which images of a prompt become pairs; null for none, where captions or crossed make all of them."""
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
    captions: Annotated[Captions, CAPTIONS] | None = None
    """Pairs whose loser has an edited caption that is false of it."""
    crossed: Crossed | None = None
    """Pairs across similar prompts."""
    shard_size: int = Field(default=2000, ge=1)
    """Prompts a shard; a killed run goes on at the first missing shard."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rule is not None and not self.reward:
            raise ValueError("reward: name a score that the rule goes by, such as reward.clip=1, or set rule=null")
        if self.rule is None and self.captions is None and self.crossed is None:
            raise ValueError("rule is null, and so are captions and crossed: nothing makes pairs")
        if self.rule is None and self.captions is not None and self.captions.of == "losers":
            raise ValueError("captions.of: losers needs the pairs of a rule, and rule is null")
        return self


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
    made_by: Counter[str] = field(default_factory=Counter)
    """Pairs that differ in their text, by how they were made."""
    images_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self, folder: str) -> list[str]:
        """For people."""
        out = [f"{self.pairs} pairs of {self.prompts} prompts and {self.images} images, in {folder}"]
        out += [f"{self.ties} of them are ties"] if self.ties else []
        out += [f"  {how}: {n}" for how, n in self.made_by.most_common()]
        out += [f"  images dropped: {n} {why}" for why, n in self.images_dropped.most_common()]
        out += [f"  dropped: {n} {why}" for why, n in self.dropped.most_common()]
        return out if self.finished else [*out, "other processes are still at work"]


def select(config: SelectConfig, rank: int = 0, world: int = 1) -> Selected:
    """The whole of ``diffalign pairs``: the shards of this process. The same tables and configuration give the same bytes.

    Raises:
        DataError: a folder without images, or a score that none has; a prompt is evaluated on, and that is refused; the
            output holds pairs of another plan.
        ModelError: an endpoint that edits captions does not answer.
    """
    folders, out = [Path(p) for p in config.path], Path(config.output_dir)
    work = Selection(config, read_images(folders))
    inputs = [(f, sorted([*f.glob("images/*.parquet"), *f.glob("scores/*.parquet")])) for f in folders]
    plan = config.plan() | {"fingerprint": [fingerprint(*i) for i in inputs]}
    in_place = len(folders) == 1 and folders[0].resolve() == out.resolve()

    def shard(n: int) -> tuple[Any, dict[str, Any]]:
        chosen = work.shard(n)
        if config.lists:
            write_shard(out, "groups", n, work.group_rows(n))
        if not in_place:
            copy_images(work.images, work.shown(n, chosen), work.ids, out, n, config.image_root)
        return work.pair_rows(chosen), chosen.notes()

    made = run_shards(out, "pairs", plan, work.shards, shard, rank, world)
    there = [p for p in (shard_path(out, "pairs", n) for n in range(work.shards)) if p.exists()]
    total = Selected(len(there) == work.shards, made, images=len(work.images))
    for path in there:
        notes = read_notes(path)
        total.prompts, total.pairs, total.ties = (
            a + notes[k] for a, k in ((total.prompts, "prompts"), (total.pairs, "pairs"), (total.ties, "ties"))
        )
        total.made_by.update(notes.get("made_by", {}))
        total.images_dropped.update(notes["images_dropped"])
        total.dropped.update(notes["dropped"])
    if no_prompt := int((work.images.prompt < 0).sum()):
        total.images_dropped["without a prompt"] = no_prompt
    return total
