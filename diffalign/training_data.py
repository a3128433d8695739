"""What a run is trained on: the ``data`` section, the examples that it names, and which settings contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from diffalign.errors import ConfigError, DataError
from diffalign.hub import cache_dir, resolve
from diffalign.objectives import Total
from diffalign.objectives.listwise import RankDPO, in_unit
from diffalign.objectives.pairwise import AOT
from diffalign.profiles import Profiles, with_profiles, without_some
from diffalign.spec import Spec
from diffalign.train.feeds import Curriculum
from diffalign.train.groups import Groups, names_of
from diffalign.train.references import Base

if TYPE_CHECKING:
    from diffalign.data.examples import Example
    from diffalign.data.pairs import Pair
    from diffalign.data.prompts import Prompt
    from diffalign.models import Model
    from diffalign.recipes import TrainConfig
    from diffalign.train.feeds import Offline

    Rows = Sequence[Pair] | Sequence[Example]
    """What is given in memory instead of a path: pairs, or single images with labels."""


class Labels(Spec):
    """The ``data.labels`` section: single images of a scored dataset folder, good or bad."""

    score: str
    """A name in the scores table."""
    at: float
    """Images of this value or more are good."""


class DataSpec(Spec):
    """The ``data`` section."""

    path: str = "shapes-pairs"
    """A dataset folder, a table with prompt, chosen and rejected, a hub dataset id, or ``shapes-pairs``."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first pairs."""
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of prompts kept out of training, for held-out loss and accuracy."""
    holdout_by: Literal["prompt", "user"] = "prompt"
    """Keep whole prompts out, or whole users: the second asks how a personal model does on people it never saw."""
    resolution: int | None = Field(default=None, ge=8)
    """Side in pixels; the model's own if not given."""
    buckets: bool = False
    """Cut each pair to the size of about that area that its winner's shape is nearest to, instead of to a square."""
    shuffle_labels: bool = False
    """Exchange winner and loser by a coin: the control that a method must beat."""
    evaluation_prompts: Literal["refuse", "drop", "keep"] = "refuse"
    """Training pairs whose prompt is evaluated on as well, whatever its case, punctuation and spaces."""
    swap_labels: bool = False
    """Train on the opposite preference, for a model to be guided away from (Diffusion-NPO)."""
    flip_labels: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of training pairs whose label is exchanged: noise that robust losses are made for."""
    p_win_scale: float | None = Field(default=None, gt=0)
    """Soft labels from scores: p_win = sigmoid(p_win_scale (R_w - R_l))."""
    standardize_scores: bool = False
    """Divide scores by the standard deviation of all training scores."""
    curriculum: Curriculum | None = None
    """Bring pairs in by their gap in score, the clearest first."""
    maps: Literal["region", "segments", "judged_region", "judged_segments"] | None = None
    """Where a pair counts. ``region``: errors are means weighted by that column, a picture of weights or a box; ``segments``:
    sums over the column's boxes with labels, 1 where the winner is better and -1 where the loser is. ``judged_``: by the judge
    of the built-in world, from the objects that are wrong."""
    positive_share: float | None = Field(default=None, gt=0, lt=1)
    """Of labels: weigh them so that good images carry this share."""
    group_size: int = Field(default=4, ge=2)
    """Images per group, for losses on groups."""
    labels: Labels | None = None
    """Take labels from a score, instead of from pairs."""
    groups: Groups | None = None
    """Tell pairs apart by whom they come from: balanced, or with more weight on whoever fares worst."""
    profiles: Profiles | None = None
    """Put words about each pair's user in front of its prompt."""


def consistent(c: TrainConfig) -> None:
    """Refuse what contradicts itself between objective, data, coupling and reference, with the remedy."""
    total, data, noise = c.total, c.data, c.coupling.noise
    names = total.names
    pairs_only = {
        "data.shuffle_labels": data.shuffle_labels,
        "data.swap_labels": data.swap_labels,
        "data.flip_labels": data.flip_labels > 0,
        "data.p_win_scale": data.p_win_scale is not None,
        "data.curriculum": data.curriculum is not None,
        "train.protect_winner": c.train.protect_winner is not None,
        "train.balance_kinds": c.train.balance_kinds is not None,
        "train.gradient_angle_steps": c.train.gradient_angle_steps > 0,
        "data.maps": data.maps is not None,
        "coupling.captions: own": c.coupling.captions == "own",
        "data.groups": data.groups is not None,
        "data.profiles": data.profiles is not None,
        "data.holdout_by: user": data.holdout_by == "user",
    }
    wrong = [key for key, is_set in pairs_only.items() if is_set and total.data != "pairs"]
    if wrong:
        raise ValueError(f"{wrong[0]} is about pairs, but {names} is about {total.data}: drop it")
    if total.data == "labels" and noise == "shared":
        raise ValueError(f"coupling.noise is shared, but {names} sees single images, each with its own noise: drop it")
    if noise == "replay":
        if total.data != "pairs" or "loser" not in total.needs or total.needs & {"scores", "p_win"}:
            raise ValueError(
                f"coupling.noise: replay makes losers without scores or labels, but {names} reads others: drop it"
            )
        if wrong := [key for key, is_set in pairs_only.items() if is_set]:
            raise ValueError(f"coupling.noise: replay reads winners alone, but {wrong[0]} is about pairs: drop one")
    if data.maps is not None and data.maps.endswith("segments"):
        reading = [Total((part,)).names for part in total.parts if not part.in_rewards]
        reading += ["train.protect_winner"] if total.protect is not None else []
        if reading:
            raise ValueError(
                f"data.maps: {data.maps} adds and subtracts errors, but {reading[0]} reads errors that are not against the "
                "reference: drop it, or take region"
            )
    if "loser" not in frozenset[str]().union(*(part.needs for part in total.parts)):
        for key in ("train.protect_winner", "train.gradient_angle_steps"):
            if pairs_only[key]:
                raise ValueError(f"{key} is about winners and losers, but {names} reads winners alone: drop it")
    if data.p_win_scale is not None and "p_win" not in total.needs:
        raise ValueError(f"data.p_win_scale makes p_win, which {names} does not read: drop it, or take soft or smpo")
    if data.standardize_scores and not total.needs & {"scores", "p_win"}:
        raise ValueError(f"data.standardize_scores is about scores, which {names} does not read: drop it")
    if data.standardize_scores and "scores" not in total.needs and data.p_win_scale is None:
        raise ValueError("data.standardize_scores is about scores, which nothing reads: set data.p_win_scale, or drop it")
    if c.train.per_device_train_batch_size == 1 and any(isinstance(part, AOT) for part in total.parts):
        raise ValueError(
            "aot sorts the margins of a micro-batch, and of one pair it is sigmoid: raise "
            "train.per_device_train_batch_size, or take sigmoid"
        )
    if c.train.balance_kinds is not None and "loser" not in total.needs:
        raise ValueError(f"train.balance_kinds is about pairs, but {names} reads winners alone: drop it")
    for key, value in (("positive_share", data.positive_share), ("labels", data.labels)):
        if value is not None and total.data != "labels":
            raise ValueError(f"data.{key} is about labels, but {names} is about {total.data}: drop it")
    if not isinstance(c.reference, Base) and "reference" not in total.needs:
        more = ", or set objective.beta above 0" if any(getattr(part, "beta", None) == 0 for part in total.parts) else ""
        raise ValueError(f"reference is set, but {names} does without one: drop it{more}")
    if c.train.protect_winner is not None and noise not in (None, "shared"):
        raise ValueError(f"train.protect_winner compares residuals at the same noise, but coupling.noise is {noise}: drop one")
    if data.curriculum is not None and data.buckets:
        raise ValueError("data.curriculum orders pairs, and so does data.buckets: drop one")
    orders = "curriculum" if data.curriculum is not None else "buckets" if data.buckets else None
    if data.groups is not None and data.groups.balanced and orders:
        raise ValueError(f"data.groups.balanced orders pairs, and so does data.{orders}: drop one")
    if c.train.metric_for_best.startswith("heldout/worst_group") and data.groups is None:
        raise ValueError(f"train.metric_for_best is {c.train.metric_for_best}, which needs data.groups")
    if data.shuffle_labels and data.flip_labels:
        raise ValueError("data.shuffle_labels and data.flip_labels both exchange labels: drop one")


def source_of(spec: DataSpec) -> str:
    """Where the data is; what is shipped is a folder of the package."""
    from diffalign.shapes.assets import ASSETS

    return str(resolve(spec.path)) if spec.path in ASSETS else spec.path


def build_pairs(spec: DataSpec, seed: int, given: Sequence[Pair] | None = None) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs), of ``given`` ones or of those at ``spec.path``."""
    from diffalign.data.pairs import flipped, read_pairs, shuffled_labels, split_by

    pairs = read_pairs(source_of(spec), spec.limit) if given is None else list(given)[: spec.limit]
    if spec.profiles is not None:
        pairs = with_profiles(pairs, spec.profiles)
    if spec.maps is not None and spec.maps.startswith("judged_"):
        pairs = judged(pairs)
    keys = [p.prompt for p in pairs] if spec.holdout_by == "prompt" else named(pairs, "user", "data.holdout_by", spec.path)
    training, held = split_by(pairs, keys, spec.holdout)
    if not training:
        raise DataError(f"{spec.path}: no pair is left for training", hint="lower data.holdout or raise data.limit")
    training = without_some(training, spec.profiles.dropout, seed) if spec.profiles is not None else training
    share = 0.5 if spec.shuffle_labels else spec.flip_labels
    training = shuffled_labels(training, seed, share) if share else training
    return tuple([flipped(p) if spec.swap_labels else p for p in some] for some in (training, held))  # type: ignore[return-value]


def judged(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of the built-in world with the judge's maps. It comes before labels are exchanged, which takes segments along."""
    from dataclasses import replace

    from diffalign.data.maps import Maps
    from diffalign.shapes.maps import maps_of

    out: list[Pair] = []
    for start in range(0, len(pairs), 256):
        some = pairs[start : start + 256]
        found = maps_of([p.chosen.load() for p in some], [p.rejected.load() for p in some], [p.prompt for p in some])
        out += [replace(p, maps=Maps(*m, p.chosen.where)) for p, m in zip(some, found, strict=True)]
    return out


def build_examples(config: TrainConfig, given: Rows | None = None) -> tuple[list[Example], list[Example]]:
    """(training, held out) examples of the kind that the objective is about.

    Raises:
        DataError: the data lacks what the objective reads; names the column.
    """
    import torch

    from diffalign.data.examples import balanced, labels_of, read_groups, read_labels, read_rated
    from diffalign.data.pairs import Pair, split_by_prompt

    spec, total = config.data, config.total
    source = source_of(spec)
    match total.data:
        case "pairs" if config.coupling.noise == "replay":
            found = labels_of(given) if given is not None else read_labels(source, spec.limit)
            training, held = split_by_prompt([x for x in found if x.good], spec.holdout)
        case "pairs":
            rows = None if given is None else [p for p in given if isinstance(p, Pair)]
            training, held = (_of_pairs(some, spec) for some in build_pairs(spec, config.train.seed, rows))
        case "labels":
            if given is not None:
                found = labels_of(given)
            elif spec.labels is not None:
                found = read_rated(source, spec.labels.score, spec.labels.at, spec.limit)
            else:
                found = read_labels(source, spec.limit)
            training, held = split_by_prompt(found, spec.holdout)
        case "groups":
            if given is not None:
                raise ConfigError("data: groups cannot be given as rows in memory", hint="give a table or a dataset folder")
            training, held = split_by_prompt(read_groups(source, spec.group_size, spec.limit), spec.holdout)
    if not training:
        raise DataError(f"{spec.path}: no example is left for training", hint="lower data.holdout or raise data.limit")
    if spec.groups is not None and len(names := names_of(training)) < 2:
        raise DataError(f"{spec.path}: all training pairs have the {spec.groups.by} {names[0]!r}", hint="drop data.groups")
    reads_scores = "scores" in total.needs or spec.standardize_scores or spec.p_win_scale or spec.curriculum
    if reads_scores and any(x.scores is None for x in (*training, *held)):
        raise DataError(
            f"{spec.path}: some examples have no scores",
            hint="a table needs chosen_score and rejected_score, a dataset folder one margin per pair",
        )
    if config.coupling.captions == "own" and all(x.prompts[0] == x.prompts[1] for x in training):
        raise DataError(
            f"{spec.path}: coupling.captions is own, but no loser has a caption of its own", hint="add rejected_prompt"
        )
    if config.train.balance_kinds is not None and len({x.kind for x in training}) < 2:
        raise DataError(f"{spec.path}: all pairs are of one kind", hint="fill the column kind with 0 and 1")
    training, held = scored(training, training, spec), scored(held, training, spec)
    if "p_win" in total.needs and all(x.p_win == 1 for x in training):
        raise DataError(
            f"{spec.path}: {total.names} reads p_win, but every pair is as good as certain: its p_win is 1",
            hint="give pairs a column p_win, set data.p_win_scale where they have scores, or take sigmoid",
        )
    if any(isinstance(part, RankDPO) for part in total.parts):
        in_unit(torch.tensor([x.scores for x in (*training, *held)]))
    return (balanced(training, spec.positive_share) if spec.positive_share else training), held


def _of_pairs(pairs: Sequence[Pair], spec: DataSpec) -> list[Example]:
    from dataclasses import replace

    from diffalign.data.examples import of_pair

    if spec.groups is None:
        return [of_pair(p) for p in pairs]
    names = named(pairs, spec.groups.by, "data.groups.by", spec.path)
    return [replace(of_pair(p), group=name) for p, name in zip(pairs, names, strict=True)]


def named(pairs: Sequence[Pair], column: str, key: str, where: str) -> list[str]:
    """What a column says of each pair.

    Raises:
        DataError: it says nothing of some.
    """
    names = [getattr(p, column) for p in pairs]
    if missing := sum(not n for n in names):
        raise DataError(
            f"{where}: {missing} of {len(pairs)} pairs have no {column}, which {key} asks for",
            hint=f"give pairs a column {column}, or drop {key.rpartition('.')[0] if key.endswith('.by') else key}",
        )
    return names


def scored(examples: Sequence[Example], of: Sequence[Example], spec: DataSpec) -> list[Example]:
    """Scores in units of their spread over ``of``, and soft labels from them, as far as the settings ask."""
    from dataclasses import replace

    import numpy as np

    out = list(examples)
    if spec.standardize_scores:
        spread = float(np.std([x.scores or () for x in of])) or 1.0
        out = [replace(x, scores=tuple(s / spread for s in x.scores or ())) for x in out]
    if spec.p_win_scale is not None:
        gaps = np.array([x.scores[0] - x.scores[1] if x.scores else 0.0 for x in out])
        likely = 1 / (1 + np.exp(-spec.p_win_scale * gaps))
        out = [replace(x, p_win=float(p)) for x, p in zip(out, likely, strict=True)]
    return out


def offline_feeds(
    config: TrainConfig, model: Model, accelerator: Any, asked: Sequence[Prompt], given: Rows | None = None
) -> tuple[Offline, Offline | None]:
    """The feed of training and that of what is held out, everything encoded; no training prompt is one of ``asked``."""
    from diffalign.data.pairs import apart
    from diffalign.train.feeds import Offline

    s, spec, total = config.train, config.data, config.total
    training, held = build_examples(config, given)
    if asked:
        training = apart(training, [p.text for p in asked], spec.evaluation_prompts)
    shared: dict[str, Any] = {
        "size": (spec.resolution,) * 2 if spec.resolution else model.resolution,
        "granularity": model.granularity if spec.buckets else None,
        "batch_size": s.per_device_train_batch_size,
        "seed": s.seed,
        "data": total.data,
        "coupling": config.coupling,
        "maps": spec.maps.removeprefix("judged_") if spec.maps else None,
    }

    def feed_of(examples: Sequence[Example], **more: Any) -> Offline:
        return Offline(model, examples, config.timesteps, cache_dir(), **shared, **more)

    with accelerator.main_process_first():  # the first fills the cache, the others read it
        feed = feed_of(
            training,
            accumulation=s.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            caption_dropout=s.caption_dropout,
            curriculum=spec.curriculum,
            balanced=spec.groups is not None and spec.groups.balanced,
        )
        return feed, feed_of(held) if held else None
