"""What a round of training is trained on: images that a model samples now, beside one another or beside those of the data."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from diffalign.building import ready_model
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import known_scorers
from diffalign.own_pairs import Shard, rewarded
from diffalign.pairs import PAIR_RULES, BestWorst, Group, PairRule, Preference
from diffalign.sampling import Item, Sampler, sample_items, unit
from diffalign.scoring import make_scorers
from diffalign.spec import Choice, Spec, dump

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.data.pairs import Picture
    from diffalign.models import ModelSpec


@dataclass(frozen=True)
class Task:
    """Images to sample for a prompt, from the ``first``-th on; with a picture of the data, what they stand beside."""

    prompt: Prompt
    first: int = 0
    picture: Picture | None = None


class Source(Spec):
    """How a round's pairs come about."""

    has_losers: ClassVar[bool] = True
    """Whether the second image of a pair is thought to be worse; where not, only the first is to be trained on."""
    has_scores: ClassVar[bool] = False

    @property
    def reads_data(self) -> bool:
        """Whether pictures at ``data.path`` are trained on."""
        return False

    @property
    def per_prompt(self) -> int:
        """Images that are sampled for a task."""
        return 1

    def add(self, to: Shard, task: Task, images: Tensor, group: Group | None) -> None:
        """The pairs of a task's images, (K, 3, H, W), and what they are worth, as rows of a shard."""
        own = to.sampled(task.prompt, task.first, images[0], {})
        chosen = own if task.picture is None else to.given(task.prompt, task.picture)
        to.pair(f"{own}-pair", task.prompt, chosen, own, rule=dump(self).strip())


class Judged(Source):
    """Images of one prompt, scored."""

    has_scores: ClassVar[bool] = True

    scorers: list[str] = Field(min_length=1)
    """As in ``evaluate.scorers``."""
    reward: dict[str, float] = Field(min_length=1)
    """Weights of the scorers' values, such as {score: 0.8, cleanliness: 0.2} of ``shapes`` or {clip: 1} of ``clip:PATH``."""
    images_per_prompt: int = Field(default=8, ge=2)

    _known = field_validator("scorers")(known_scorers)

    @property
    def per_prompt(self) -> int:
        return self.images_per_prompt

    @abstractmethod
    def pick(self, group: Group, draw: Callable[[int], float]) -> list[Preference]:
        """Pairs of a prompt's images; ``draw`` gives a number in [0, 1) to each image, always the same."""

    def add(self, to: Shard, task: Task, images: Tensor, group: Group | None) -> None:
        assert group is not None
        for p in self.pick(group, lambda k: unit(to.seed, task.prompt.id, k)):
            both = (p.chosen, p.rejected)
            ids = [to.sampled(task.prompt, j, images[j], {n: group.scores[n][j] for n in self.reward}) for j in both]
            name = f"{task.prompt.id}-{to.seed}-{p.chosen}-{p.rejected}"
            to.pair(name, task.prompt, *ids, margins=json.dumps({"reward": round(p.margin, 6)}), rule=dump(self).strip())


class Scored(Judged):
    """A rule picks pairs by their reward (iterative DPO, CRPO)."""

    type: Literal["scored"] = "scored"
    rule: Annotated[PairRule, PAIR_RULES] = BestWorst()

    def pick(self, group: Group, draw: Callable[[int], float]) -> list[Preference]:
        return self.rule(group)


class Curated(Judged):
    """One of K images is kept, with P(k) = softmax(reward / temperature), to be imitated (Ferbach et al. 2024).

    The second image of a pair is another of the K: it shows in held-out drifts, and says nothing of preference.
    """

    has_losers: ClassVar[bool] = False

    type: Literal["curated"] = "curated"
    temperature: float = Field(default=1.0, ge=0)
    """0 keeps the best."""
    real: float = Field(default=0.0, ge=0)
    """Winners of the data for each image that was kept (the paper's lambda): they hold the loop in place."""

    @property
    def reads_data(self) -> bool:
        return self.real > 0

    def pick(self, group: Group, draw: Callable[[int], float]) -> list[Preference]:
        """The maximum of R / T and Gumbel noise falls on k with the probability softmax(R / T)_k."""
        chosen = max(range(len(group)), key=lambda k: (group.reward[k] + self.temperature * _gumbel(draw(k)), -k))
        return [group.preference(chosen, (chosen + 1) % len(group))]


class SelfPlay(Source):
    """The data's winners against images of the model's own for the same prompts (SPIN, DDO, SePPO)."""

    type: Literal["self_play"] = "self_play"

    @property
    def reads_data(self) -> bool:
        return True


class Own(Source):
    """Images of the model's own, to be imitated: each is both sides of its pair (Self-NPO)."""

    has_losers: ClassVar[bool] = False

    type: Literal["own"] = "own"


SOURCES = Choice(Source, {"scored": Scored, "self_play": SelfPlay, "curated": Curated, "own": Own})


def tasks_of(prompts: Sequence[Prompt], winners: Sequence[tuple[Prompt, Picture]], source: Source) -> list[Task]:
    """What a round samples; a prompt with several winners gets as many images."""
    if not isinstance(source, SelfPlay):
        return [Task(p) for p in prompts]
    seen: dict[str, int] = {}
    out = []
    for prompt, picture in winners:
        out.append(Task(prompt, seen.get(prompt.id, 0), picture))
        seen[prompt.id] = out[-1].first + 1
    return out


def drawn(rows: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """``count`` of the rows, or all, in an order that the seed decides. Rows are prompts, or (prompt, picture)."""

    def place(i: int) -> bytes:
        prompt = rows[i][0] if isinstance(rows[i], tuple) else rows[i]
        return hashlib.sha256(f"{seed}|{prompt.id}|{i}".encode()).digest()

    return [rows[i] for i in sorted(range(len(rows)), key=place)[:count]]


@dataclass(frozen=True)
class Made:
    """What stands in the dataset folder of a round."""

    images: int
    """Sampled, of which those without a pair are not kept."""
    pairs: int
    reward: float | None
    """Mean over all that were sampled: what the model was worth when the round began."""


def make_round(
    folder: Path,
    source: Source,
    tasks: Sequence[Task],
    real: Sequence[tuple[Prompt, Picture]],
    *,
    model: ModelSpec,
    adapter: str | None,
    sampling: Sampler,
    seed: int,
    shard_size: int,
    plan: dict[str, Any],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Sample, score and pair into a dataset folder: the missing shards of this process. ``real`` is mixed in.

    Raises:
        DataError: the folder holds a round of another plan.
    """
    from tqdm import tqdm

    from diffalign.data.tables import run_shards, shard_path, shards_of

    shards = -(-len(tasks) // shard_size)
    plan |= {"source": SOURCES.serialize(source), "model": model.model_dump(mode="json"), "sampling": sampling.model_dump()}
    plan |= {"seed": seed, "shard_size": shard_size, "tasks": _digest(tasks, real)}
    missing = [n for n in range(rank, shards, world) if not shard_path(folder, "pairs", n).exists()]
    network = ready_model(model) if missing else None
    if network is not None and adapter is not None:
        network.restore(Path(adapter))
    scorers = make_scorers(source.scorers) if missing and isinstance(source, Judged) else []
    bar = tqdm(total=len(missing) * shard_size * source.per_prompt, desc="sample", unit="image", dynamic_ncols=True)

    def shard(n: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        assert network is not None
        some = tasks[n * shard_size : (n + 1) * shard_size]
        items = [Item(t.prompt, t.first + j) for t in some for j in range(source.per_prompt)]
        images = sample_items(network, items, sampling, seed, bar.update)
        images = images.view(len(some), source.per_prompt, *images.shape[1:])
        out, notes = Shard(network, model, adapter, seed, sampling), {"images": float(len(items))}
        groups: list[Group | None] = [None] * len(some)
        if isinstance(source, Judged):
            values, reward = rewarded(scorers, source.reward, [t.prompt for t in some], images)
            groups = [Group(reward[i].tolist(), {name: v[i].tolist() for name, v in values.items()}) for i in range(len(some))]
            notes["reward"] = reward.sum().item()
        for task, mine, group in zip(some, images, groups, strict=True):
            source.add(out, task, mine, group)
        for prompt, picture in real[n::shards]:
            name = out.given(prompt, picture)
            out.pair(f"{name}-real", prompt, name, name, rule="real")
        return out.write(folder, n), notes

    try:
        with bar:
            run_shards(folder, "pairs", plan, shards, shard, rank, world)
    except (ConfigError, DataError):
        if not shards_of(folder, "pairs"):  # wrong input leaves nothing behind
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_round(folder: Path, where: str) -> Made:
    """What was made, once all processes are done.

    Raises:
        DataError: no prompt gave a pair.
    """
    from diffalign.data.tables import read_notes, read_table, shards_of

    notes = [read_notes(path) for path in shards_of(folder, "pairs")]
    images = int(sum(n["images"] for n in notes))
    pairs = len(read_table(folder, "pairs", ["pair_id"]))
    if not pairs:
        raise DataError(
            f"{where}: none of {images} images stands in a pair", hint="lower rule.min_margin, or raise images_per_prompt"
        )
    scored = all("reward" in n for n in notes)
    return Made(images, pairs, sum(n["reward"] for n in notes) / images if scored else None)


def _gumbel(u: float) -> float:
    return -math.log(-math.log(min(max(u, 1e-12), 1 - 1e-12)))


def _digest(tasks: Sequence[Task], real: Sequence[tuple[Prompt, Picture]]) -> str:
    said = [(t.prompt.id, t.first, t.picture.where if t.picture else None) for t in tasks]
    return hashlib.sha256(json.dumps([said, [(p.id, x.where) for p, x in real]]).encode()).hexdigest()[:16]
