"""From a configuration to a run: the only place that wires the packages together."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from diffalign.between import Between, final_weights, select_prompts, unwrapped
from diffalign.building import build_model, environment, make_accelerator, ready_model
from diffalign.data.files import atomic_folder, write_json, write_text
from diffalign.direct import consistent as direct_consistent
from diffalign.direct import direct_feed
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import EvaluateSpec, asked_of, measure
from diffalign.hub import licence
from diffalign.models import LoRA, Model, ModelSpec, Phase
from diffalign.objectives import OBJECTIVES, Objective, Total
from diffalign.online import InMemory, check_ratio, online_feed
from diffalign.online import consistent as online_consistent
from diffalign.round_pairs import Judged
from diffalign.rounds import Rounds, contradictions, run_rounds
from diffalign.scorers.wins import comparing
from diffalign.scoring import make_scorers
from diffalign.spec import Spec, dump, load
from diffalign.timesteps import TIMESTEPS, TimestepPolicy, Uniform
from diffalign.train.coupling import Coupling
from diffalign.train.direct import Direct, DirectFeed
from diffalign.train.online import Online
from diffalign.train.online_feed import OnlineFeed
from diffalign.train.references import OF_RUN, REFERENCES, Base, OfRun, ReferencePolicy
from diffalign.train.state import TrainSettings, TrainState, checkpoints, make_optimizer
from diffalign.train.watch import Limits
from diffalign.training_data import DataSpec, consistent, offline_feeds
from diffalign.watching import Watch, make_watcher, watched_prompts
from diffalign.watching import consistent as watch_consistent

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data.prompts import Prompt
    from diffalign.train.feeds import Feed, Offline
    from diffalign.training_data import Rows


Objectives = OBJECTIVES.one_or_more() if not TYPE_CHECKING else tuple[Objective, ...]


log = logging.getLogger(__name__)


class TrainConfig(Spec):
    """A training run, from model and pairs to report."""

    version: Literal[1] = 1
    model: ModelSpec = ModelSpec(path="shapes-unet", lora=LoRA())
    data: DataSpec = DataSpec()
    objective: Objectives  # type: ignore[valid-type]
    """One objective ``{type: sigmoid, beta: 5000}``, or a list of such with ``weight``."""
    timesteps: Annotated[TimestepPolicy, TIMESTEPS] = Uniform()
    coupling: Coupling = Coupling()
    """What the pictures of a pair or group share."""
    reference: Annotated[ReferencePolicy, REFERENCES] = Base()
    """What the policy is compared with."""
    online: Online | None = None
    """Learn from the model's own samples, scored as they come, instead of from ``data``."""
    direct: Direct | None = None
    """Learn from the gradient of rewards through the sampler, instead of from ``data``."""
    train: TrainSettings = TrainSettings()
    rounds: Rounds | None = None
    """Training again and again on images that the model samples in between."""
    evaluate: EvaluateSpec = EvaluateSpec()
    watch: Watch | None = None
    """What is looked at while training, so that a reward that is exploited shows."""
    start_from: str | None = None
    """A finished run of the same model and layers, whose weights training begins with; the base stays what it is."""
    output_dir: str
    resume_from: str | None = None
    """``latest`` (there must be a checkpoint), ``auto`` (go on if there is one) or a checkpoint folder."""

    @model_serializer(mode="wrap")
    def _read_sections(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without pairs that an online run does not read."""
        out: dict[str, Any] = serialize(self)
        if self.online is not None or self.direct is not None:
            out.pop("data", None)
        return out

    @model_validator(mode="after")
    def _possible(self) -> Self:
        s = self.train
        consistent(self)
        direct_consistent(self)
        online_consistent(self)
        watch_consistent(self)
        if s.metric_for_best.startswith("heldout/") and self.data.holdout == 0 and (s.early_stopping_patience or s.load_best):
            raise ValueError(f"train.metric_for_best is {s.metric_for_best}, but data.holdout is 0: set data.holdout above 0")
        held = self.data.holdout > 0 and self.online is None and self.direct is None
        if s.winner_drift_patience and not (s.eval_steps and held):
            raise ValueError(
                "train.winner_drift_patience needs train.eval_steps and data.holdout above 0, and pairs or labels"
            )
        if s.early_stopping_patience and not s.eval_steps:
            raise ValueError("train.early_stopping_patience needs train.eval_steps above 0")
        if s.load_best and not s.eval_steps:
            raise ValueError("train.load_best needs train.eval_steps above 0")
        if s.metric_for_best == "select/score" and not self.evaluate.prompts.startswith("shapes:"):
            raise ValueError("train.metric_for_best: select/score needs evaluate.prompts of the built-in world (shapes:...)")
        if self.rounds is not None:
            contradictions(self)
        return self

    @property
    def trains_at(self) -> Phase:
        """The stage of the model while it is trained: where it samples too, nothing of it is put away."""
        return "train" if self.online is None and self.direct is None else "sample"

    @property
    def total(self) -> Total:
        """The objectives as one."""
        return Total(self.objective, self.train.protect_winner, self.train.balance_kinds)


def licences(config: TrainConfig) -> list[dict[str, str | None]]:
    """What a run is made from: its part, its name, and the licence that it states; None where it states none."""
    from diffalign.data.tables import read_table
    from diffalign.scorers.combine import members_of
    from diffalign.shapes.assets import ASSETS, LICENCE

    model, data = config.model, config.data.path
    found = [("base model", model.path, licence(model.path, model.revision))]
    if model.lora is not None and model.lora.path is not None:
        found.append(("first adapter", model.lora.path, licence(model.lora.path)))
    stated: set[str | None] = set()
    if data not in ASSETS:
        with suppress(DataError):  # no dataset folder, or one without the column
            stated = set(read_table(Path(data), "images", ["licence"])["licence"].to_pylist())
    of_images = ", ".join(sorted(x or "unknown for some images" for x in stated)) if stated - {None} else None
    own = config.direct or config.online  # samples, instead of pairs
    if own is None and (config.rounds is None or config.rounds.uses_data):
        found.append(("pairs", data, of_images or licence(data, kind="dataset")))
    scorers = list(config.evaluate.scorers) if config.evaluate.enabled else []
    if config.rounds is not None and isinstance(config.rounds.source, Judged):
        scorers += config.rounds.source.scorers
    scorers += own.reward.scorers if own is not None else []
    scorers += config.watch.scorers if config.watch is not None else []
    for name in dict.fromkeys(member for scorer in scorers for member in members_of(scorer)):
        kind, _, rest = name.partition(":")
        found.append(("scorer", name, LICENCE if kind in ("shapes", "taste") else licence(rest) if kind == "clip" else None))
    return [{"part": part, "name": name, "licence": stated_licence} for part, name, stated_licence in found]


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    folder: Path
    metrics: dict[str, Any]


def resume_point(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from; refuses a folder that already holds a run."""
    folder, wanted = Path(config.output_dir), config.resume_from
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"output_dir: nothing can be written to {folder}: {there} is read-only or no folder")
    found = checkpoints(folder)
    if wanted in ("latest", "auto"):
        if not found and wanted == "latest":
            raise ConfigError(f"resume_from: {folder} holds no checkpoint", hint="use resume_from=auto, or leave it out")
        return found[-1] if found else None
    if wanted is not None:
        if not (Path(wanted) / "state.json").exists():
            raise ConfigError(f"resume_from: {wanted} is not a checkpoint")
        if found and found[-1].resolve() != Path(wanted).resolve():  # later ones would be taken for this run's
            raise ConfigError(
                f"resume_from: {folder} holds {found[-1].name}, not {wanted}, as its last",
                hint="choose another output_dir, or delete the later checkpoints",
            )
        return Path(wanted)
    if found or (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"output_dir: {folder} already holds a run", hint="resume_from=latest goes on with it; or choose another folder"
        )
    return None


def train(
    config: TrainConfig,
    pairs: Rows | None = None,
    finished: Callable[[Path], object] = lambda folder: None,
    given: InMemory | None = None,
) -> Run:
    """The whole of ``diffalign train``: one run, or rounds of them. Every process of a launch calls it.

    ``pairs`` in memory, or single images with labels, stand in for those at ``config.data.path``, and what is ``given`` for
    what ``config.online`` names; ``finished`` hears of each round's folder.
    """
    import torch

    if config.rounds is None:
        run = train_once(config, pairs, given)
    elif pairs is not None:
        raise ConfigError("rounds: pairs cannot be given as rows in memory", hint="give a table or a dataset folder")
    else:
        about_run = environment() | {"licences": licences(config)}
        run = Run(Path(config.output_dir), run_rounds(config, about_run, train_once, finished))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return run


def train_once(config: TrainConfig, pairs: Rows | None = None, given: InMemory | None = None) -> Run:
    """Fit, export, evaluate."""
    import torch
    from accelerate.utils import set_seed

    from diffalign.train.feeds import Offline
    from diffalign.train.groups import learner
    from diffalign.train.loop import fit
    from diffalign.train.tracking import Tracker

    folder, s = Path(config.output_dir), config.train
    checkpoint = resume_point(config)
    accelerator = make_accelerator(s.mixed_precision, s.report_to, folder)
    main = accelerator.is_main_process
    resolved = dump(config)
    set_seed(s.seed)
    make_optimizer([torch.nn.Parameter(torch.zeros(1))], s)  # if it cannot be had, say so now
    model = build_model(config.model)
    read_runs(model, config)
    model.stage("pictures", accelerator.device)
    scorers = make_scorers(config.evaluate.scorers)
    # what is wrong with the evaluation shows before the training, not after it
    asked = asked_of(config.evaluate, model) if config.evaluate.enabled else []
    watched = watched_prompts(config, model)

    def tell(step: int, values: dict[str, float]) -> None:
        tracker.write(step, values)

    state, feed, held, read = feeds(config, model, accelerator, asked + watched + select_prompts(config), pairs, given, tell)
    cut = model.truncated(read)
    if cut and main:
        log.warning("%d prompts are longer than the text encoder reads, and are cut", cut)
    state.feed, state.limits = feed, Limits(config.watch.limits if config.watch else None)
    single = config.online is None or not comparing(config.online.reward.scorers)  # else one model's pictures win one half
    reward = feed.rewards.judge if isinstance(feed, OnlineFeed | DirectFeed) and single else None
    watcher = make_watcher(config, model, watched, reward, dict(zip(config.evaluate.scorers, scorers, strict=True)))
    if checkpoint is not None:
        state.load(checkpoint)
    noise = check_ratio(config, feed, accelerator.autocast) if isinstance(feed, OnlineFeed) and feed.collector.replays else {}
    if main:  # nothing was wrong: from here on the folder holds a run
        write_text(folder / "config.resolved.yaml", resolved)
        write_json(folder / "env.json", environment() | {"licences": licences(config)})
    tracker = Tracker(folder, accelerator, s.max_steps, s.report_to, config.model_dump(mode="json"))

    learned = learner(config.total, feed.examples if isinstance(feed, Offline) else (), config.data.groups)
    between = Between(config, state, feed, held, scorers, watcher)
    save = lambda: state.save(folder, resolved)  # noqa: E731
    fit(state, feed, learned, tracker, between.heldout, save, between.drift, between.watch)

    metrics: dict[str, Any] = {"steps": state.step, "denoiser_passes": state.cost, "train_seconds": round(state.seconds, 1)}
    if cut:
        metrics["truncated_prompts"] = cut
    metrics |= noise | (feed.totals() if isinstance(feed, OnlineFeed | DirectFeed) else {})
    if config.watch is not None:
        metrics |= {"best": state.best, "events": state.limits.events, "stopped": state.limits.stopped}
    if main and (config.evaluate.enabled or config.model.lora is None):  # a whole pipeline is exported with all its parts
        model.stage("sample")
    if main:
        with unwrapped(state), final_weights(model, state.final_weights):
            atomic_folder(folder, lambda to: model.export(to, about=about(config)))
            if config.evaluate.enabled:
                metrics |= measure(model, config.evaluate, scorers, folder)
        write_json(folder / "metrics.json", metrics)
    accelerator.wait_for_everyone()
    return Run(folder, metrics)


def feeds(
    config: TrainConfig,
    model: Model,
    accelerator: Accelerator,
    apart: Sequence[Prompt],
    pairs: Rows | None,
    given: InMemory | None,
    tell: Callable[[int, dict[str, float]], None],
) -> tuple[TrainState, Feed, Offline | None, set[str]]:
    """The state of a run, what feeds it, what is held out, and all prompts that are read; none of those kept ``apart``."""
    s = config.train
    if config.trains_at == "train":
        feed, held = offline_feeds(config, model, accelerator, apart, pairs)
        model.stage("train")  # all is cached
        state = TrainState(model, accelerator, s, config.reference)
        return state, feed, held, {p for one in (feed, held) if one is not None for p in one.prompts}
    model.stage("sample")
    state = TrainState(model, accelerator, s, config.reference)
    bare = lambda: unwrapped(state)  # noqa: E731
    own: OnlineFeed | DirectFeed
    if config.direct is not None:
        own = direct_feed(config, state, apart, bare)
    else:
        own = online_feed(config, state, apart, bare, tell, given or InMemory())
    return state, own, None, {p.text for p in own.prompts}


def read_runs(model: Model, config: TrainConfig) -> None:
    """The weights that finished runs left: those to compare with, and those to begin with."""
    if isinstance(config.reference, OfRun):
        model.named_weights.take(OF_RUN)
        with model.weights(OF_RUN):
            model.restore(Path(config.reference.path))
    if config.start_from is not None:
        model.restore(Path(config.start_from))


def evaluate_run(target: str, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """``diffalign evaluate``: measure a finished run again, with overrides of its ``evaluate`` section."""
    folder = Path(target)
    if not (folder / "config.resolved.yaml").is_file():
        raise ConfigError(f"{target} is not a run: it has no config.resolved.yaml", hint="give the output_dir of a run")
    config = load(TrainConfig, folder / "config.resolved.yaml", [f"evaluate.{o}" for o in overrides])
    name = "-".join(re.sub(r"[^\w.]+", "_", o) for o in overrides)[:100] or "again"
    model = ready_model(config.model)
    model.restore(folder)
    out = folder / "evaluations" / name
    metrics = measure(model, config.evaluate, make_scorers(config.evaluate.scorers), out)
    write_json(out / "metrics.json", metrics)
    return out, metrics


def about(config: TrainConfig) -> dict[str, str]:
    """What an adapter's file says of where it comes from."""
    objective = json.dumps(config.model_dump(mode="json")["objective"])
    version = environment()["versions"]["diffalign"]
    return {"base_model": config.model.path, "objective": objective, "diffalign_version": version}
