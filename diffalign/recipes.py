"""From a configuration to objects: the only place that wires the packages together."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from diffalign.data.files import atomic, atomic_folder, write_json, write_text
from diffalign.data.prompts import Prompt, normalised, read_prompts
from diffalign.errors import ConfigError, DataError
from diffalign.hub import cache_dir, licence, resolve
from diffalign.models import Format, LoRA, Model, ModelSpec, load_model
from diffalign.objectives import OBJECTIVES, Objective, Total, metrics_of
from diffalign.pairs import PAIR_RULES, BestWorst, Group, PairRule
from diffalign.sampling import Sampler
from diffalign.scorers import card_of, table
from diffalign.scoring import device, make_scorers, quiet
from diffalign.spec import Spec, dump, load
from diffalign.suites import is_suite, suite_prompts
from diffalign.timesteps import TIMESTEPS, TimestepPolicy, Uniform
from diffalign.train.coupling import Coupling
from diffalign.train.references import MOVING, REFERENCES, Base, ReferencePolicy
from diffalign.train.state import TrainSettings, TrainState, checkpoints, make_optimizer
from diffalign.training_data import DataSpec, build_examples, consistent

if TYPE_CHECKING:
    from diffalign.data.examples import Example
    from diffalign.data.pairs import Pair
    from diffalign.scorers import Card, Scorer
    from diffalign.train.evaluate import Evaluation

Objectives = OBJECTIVES.one_or_more() if not TYPE_CHECKING else tuple[Objective, ...]

log = logging.getLogger(__name__)

SHAPES_PROMPTS = re.compile(r"shapes:(train|select|test)")


class EvaluateSpec(Spec):
    """The ``evaluate`` section: what is measured after training, for the base and the trained model alike."""

    enabled: bool = True
    prompts: str = "shapes:test"
    """A prompt file, a hub dataset id, an evaluation suite (``geneval:PATH``), or a split of the built-in world: shapes:test,
    shapes:select, shapes:train."""
    num_prompts: int = Field(default=256, ge=1)
    negative_prompt: str | None = None
    """For prompts that bring none of their own; it counts with ``guidance_scale`` above 1."""
    images_per_prompt: int = Field(default=2, ge=1)
    seed: int = Field(default=1000, ge=0)
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    """``shapes`` (the exact judge), ``taste:KIND``, a reward model of ``diffalign list scorers`` with or without the paths
    of its weights (``pickscore``, ``clip:MODEL``), a served one ``http:URL``, or a callable ``pkg.mod:obj``."""
    sampling: Sampler = Sampler()
    select_prompts: int = Field(default=64, ge=1)
    """Prompts of the select split that ``train.metric_for_best: select/score`` looks at."""
    split_salt: str = ""
    """Another salt makes another split of the built-in world."""

    @field_validator("scorers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != "shapes" and ":" not in name and name not in table():
                raise ValueError(f"unknown scorer {name!r}; use shapes, taste:KIND, {', '.join(table())} or pkg.mod:obj")
        return names


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
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSpec = EvaluateSpec()
    output_dir: str
    resume_from: str | None = None
    """``latest`` (there must be a checkpoint), ``auto`` (go on if there is one) or a checkpoint folder."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        s = self.train
        consistent(self)
        if s.metric_for_best.startswith("heldout/") and self.data.holdout == 0 and (s.early_stopping_patience or s.load_best):
            raise ValueError(f"train.metric_for_best is {s.metric_for_best}, but data.holdout is 0: set data.holdout above 0")
        if s.early_stopping_patience and not s.eval_steps:
            raise ValueError("train.early_stopping_patience needs train.eval_steps above 0")
        if s.load_best and not s.eval_steps:
            raise ValueError("train.load_best needs train.eval_steps above 0")
        if s.metric_for_best == "select/score" and not self.evaluate.prompts.startswith("shapes:"):
            raise ValueError("train.metric_for_best: select/score needs evaluate.prompts of the built-in world (shapes:...)")
        return self

    @property
    def total(self) -> Total:
        """The objectives as one."""
        return Total(self.objective, self.train.protect_winner)


# --- pieces ---------------------------------------------------------------------------------------------------------


def prompts_of(source: str, limit: int | None, seed: int = 0, salt: str = "", negative: str | None = None) -> list[Prompt]:
    """Prompts of a file, a hub dataset, a suite ``NAME:PATH``, or a split of the built-in world (``limit``, 256 if None)."""
    if match := SHAPES_PROMPTS.fullmatch(source):
        from diffalign.shapes.scene import sample_prompts

        found = [Prompt(text) for text in sample_prompts(limit or 256, match[1], seed, salt)]  # type: ignore[arg-type]
    elif is_suite(source):
        found = [Prompt(text) for text in suite_prompts(source)[:limit]]
    else:
        found = read_prompts(source, limit)
    return [Prompt(p.text, p.negative or negative) for p in found]


def excluded_prompts(sources: Sequence[str]) -> set[str]:
    """Prompts of files, suites ``NAME:PATH`` and splits of the built-in world, normalised for matching."""
    found: set[str] = set()
    for source in sources:
        if match := SHAPES_PROMPTS.fullmatch(source):
            found |= shapes_captions(match[1])
        else:
            found |= {normalised(p.text) for p in prompts_of(source, None)}
    return found


def shapes_captions(split: str) -> set[str]:
    """Every caption of a split of the built-in world, normalised."""
    from diffalign.shapes.scene import PHRASINGS, RELATIONS, all_scenes

    out = set()
    for scene in all_scenes(split):  # type: ignore[arg-type]
        stated = [replace(scene, relation=r) for r in RELATIONS] if scene.relation else [scene]
        both = [s for one in stated for s in (one, replace(one, things=one.things[::-1]))]
        out |= {normalised(s.caption(n)) for s in both for n in range(PHRASINGS)}
    return out


def build_model(spec: ModelSpec) -> Model:
    """Load a model by any kind of path. A LoRA's own path is resolved too."""
    quiet()
    if spec.lora is not None and spec.lora.path is not None:
        spec = spec.model_copy(update={"lora": spec.lora.model_copy(update={"path": str(resolve(spec.lora.path))})})
    return load_model(resolve(spec.path, spec.revision, spec.variant), spec)


def ready_model(spec: ModelSpec) -> Model:
    """A model that makes images, on this machine's device."""
    import torch

    return build_model(spec).to(torch.device(device()))


def environment() -> dict[str, Any]:
    """Versions and machine, for env.json."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else "mps" if torch.backends.mps.is_available() else "cpu",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def licences(config: TrainConfig) -> list[dict[str, str | None]]:
    """What a run is made from: its part, its name, and the licence that it states; None where it states none."""
    from diffalign.data.tables import read_table
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
    found.append(("pairs", data, of_images or licence(data, kind="dataset")))
    for name in config.evaluate.scorers if config.evaluate.enabled else ():
        kind, _, rest = name.partition(":")
        found.append(("scorer", name, LICENCE if kind in ("shapes", "taste") else licence(rest) if kind == "clip" else None))
    return [{"part": part, "name": name, "licence": stated_licence} for part, name, stated_licence in found]


def make_accelerator(precision: str = "no", report_to: Sequence[str] = (), project: Path | None = None) -> Any:
    """The process group, device and precision, from the environment that accelerate or torchrun set up."""
    from importlib.util import find_spec

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    for name in report_to:
        if find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed", hint=f"pip install {name}, or drop it")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.mixed_precision: fp16 needs a CUDA device", hint="use bf16 or no on this machine")
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    return Accelerator(mixed_precision=precision, log_with=list(report_to) or None, project_dir=project)


# --- train ----------------------------------------------------------------------------------------------------------


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


def train(config: TrainConfig, pairs: Sequence[Pair] | None = None) -> Run:
    """The whole of ``diffalign train``: fit, export, evaluate. Every process of a launch calls it.

    ``pairs`` in memory stand in for those at ``config.data.path``.
    """
    import torch
    from accelerate.utils import set_seed

    from diffalign.data.pairs import apart
    from diffalign.train.evaluate import evaluate, heldout_pairs
    from diffalign.train.feeds import Offline
    from diffalign.train.loop import fit
    from diffalign.train.tracking import Tracker

    folder, s = Path(config.output_dir), config.train
    checkpoint = resume_point(config)
    objective = config.total
    accelerator = make_accelerator(s.mixed_precision, s.report_to, folder)
    main = accelerator.is_main_process
    resolved = dump(config)
    set_seed(s.seed)
    make_optimizer([torch.nn.Parameter(torch.zeros(1))], s)  # if it cannot be had, say so now
    model = build_model(config.model).stage("pictures", accelerator.device)
    training, held = build_examples(config, pairs)
    scorers = make_scorers(config.evaluate.scorers)
    if config.evaluate.enabled:
        asked = asked_of(config.evaluate, model)  # what is wrong with them shows before the training, not after it
        training = apart(training, [p.text for p in asked], config.data.evaluation_prompts)
    size = (config.data.resolution,) * 2 if config.data.resolution else model.resolution
    shared: dict[str, Any] = {"size": size, "batch_size": s.per_device_train_batch_size, "seed": s.seed}
    shared["granularity"] = model.granularity if config.data.buckets else None

    shared |= {"data": objective.data, "coupling": config.coupling}

    def feed_of(examples: Sequence[Example], **more: Any) -> Offline:
        return Offline(model, examples, config.timesteps, cache_dir(), **shared, **more)

    with accelerator.main_process_first():  # the first fills the cache, the others read it
        feed = feed_of(
            training,
            accumulation=s.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            caption_dropout=s.caption_dropout,
            curriculum=config.data.curriculum,
        )
        held_feed = feed_of(held) if held else None

    cut = model.truncated({p for one in (feed, held_feed) if one is not None for p in one.prompts})
    if cut and main:
        log.warning("%d prompts are longer than the text encoder reads, and are cut", cut)
    model.stage("train")  # all is cached
    state = TrainState(model, accelerator, s, config.reference)
    if checkpoint is not None:
        state.load(checkpoint)
    if main:  # nothing was wrong: from here on the folder holds a run
        write_text(folder / "config.resolved.yaml", resolved)
        write_json(folder / "env.json", environment() | {"licences": licences(config)})
    tracker = Tracker(folder, accelerator, s.max_steps, s.report_to, config.model_dump(mode="json"))

    def heldout() -> dict[str, float]:
        values: dict[str, float] = {}
        with unwrapped(state), final_weights(model, "ema" if s.ema_decay else None):
            if held_feed is not None:
                values |= heldout_pairs(model, held_feed, objective)
            if s.metric_for_best == "select/score":
                e = config.evaluate
                some = prompts_of("shapes:select", e.select_prompts, 0, e.split_salt, e.negative_prompt)
                model.stage("sample")
                result = evaluate(model, some, scorers, e.sampling, per_prompt=e.images_per_prompt, seed=e.seed)
                model.stage("train")
                values["select/score"] = result.score.mean().item()
        return values

    @torch.no_grad()
    def drift() -> float:
        """|error under the moving reference - error under the base|, the mean over one fixed batch of winners."""
        batch = next(feed.fixed())
        with unwrapped(state), model.weights(MOVING):
            terms = feed.terms(model, batch, frozenset({"reference"}))
        gone = metrics_of(terms)["drift/winner"]
        return gone[gone.isfinite()].mean().abs().item()

    fit(state, feed, objective, tracker, heldout, lambda: state.save(folder, resolved), drift)
    metrics: dict[str, Any] = {"steps": state.step, "denoiser_passes": state.cost, "train_seconds": round(state.seconds, 1)}
    if cut:
        metrics["truncated_prompts"] = cut
    if main and (config.evaluate.enabled or config.model.lora is None):  # a whole pipeline is exported with all its parts
        model.stage("sample")
    if main:
        with unwrapped(state), final_weights(model, state.final_weights):
            atomic_folder(folder, lambda to: model.export(to, about=about(config)))
            if config.evaluate.enabled:
                metrics |= measure(model, config.evaluate, scorers, folder)
        write_json(folder / "metrics.json", metrics)
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return Run(folder, metrics)


@contextmanager
def unwrapped(state: TrainState) -> Iterator[None]:
    """The bare network in place of the distributed one, whose forward pass would wait for the other processes."""
    model = state.model
    wrapped, model.net = model.net, state.accelerator.unwrap_model(model.net)
    try:
        yield
    finally:
        model.net = wrapped


def final_weights(model: Model, name: str | None) -> Any:
    """Run with a snapshot, or with the weights as they are."""
    return nullcontext() if name is None else model.weights(name)


# --- evaluate -------------------------------------------------------------------------------------------------------


def asked_of(spec: EvaluateSpec, model: Model) -> list[Prompt]:
    """The prompts of an evaluation.

    Raises:
        ConfigError: some are negative, and the model does not take them; or they are not what the exact judge can read.
    """
    prompts = prompts_of(spec.prompts, spec.num_prompts, spec.seed, spec.split_salt, spec.negative_prompt)
    if spec.sampling.guidance_scale > 1 and not model.takes_negative and any(p.negative for p in prompts):
        raise ConfigError(f"evaluate: {model.path} takes no negative prompts", hint="its guidance is distilled; drop them")
    if "shapes" in spec.scorers:
        from diffalign.shapes.scene import parse_caption

        for prompt in prompts:
            try:
                parse_caption(prompt.text)
            except DataError as e:
                raise ConfigError(f"evaluate.scorers: shapes: {e.message}", hint="see diffalign list scorers") from e
    return prompts


def measure(model: Model, spec: EvaluateSpec, scorers: Sequence[Scorer], folder: Path) -> dict[str, Any]:
    """Base against trained on the same prompts and seeds; writes ``samples/`` and returns the comparison."""
    from tqdm import tqdm

    from diffalign.train.evaluate import compare, evaluate

    prompts = asked_of(spec, model)
    total = 2 * len(prompts) * spec.images_per_prompt
    began = time.monotonic()
    with tqdm(total=total, desc="evaluate", unit="image", dynamic_ncols=True) as bar:
        kwargs: dict[str, Any] = {"per_prompt": spec.images_per_prompt, "seed": spec.seed, "on_batch": bar.update}
        with model.weights("reference"):
            base = evaluate(model, prompts, scorers, spec.sampling, **kwargs)
        aligned = evaluate(model, prompts, scorers, spec.sampling, **kwargs)
    out = compare(base, aligned, ceiling(model, base, scorers) if spec.prompts.startswith("shapes:") else None)
    out["evaluate_seconds"] = round(time.monotonic() - began, 1)
    write_samples(folder / "samples", base, aligned)
    return out


def ceiling(model: Model, like: Evaluation, scorers: Sequence[Scorer]) -> Evaluation:
    """Perfect drawings of the same prompts, through the model's own autoencoder: the best that its latents allow."""
    import numpy as np
    import torch

    from diffalign.data.images import to_uint8
    from diffalign.shapes.render import draw
    from diffalign.shapes.scene import parse_caption
    from diffalign.train.evaluate import Evaluation, score_images

    per_prompt = like.images.shape[1]
    scenes = [parse_caption(p) for p in like.prompts for _ in range(per_prompt)]
    pixels = torch.from_numpy(draw(scenes, np.random.default_rng(0))).permute(0, 3, 1, 2).float() / 255
    parts = [to_uint8(model.decode(model.encode_images(p))).cpu() for p in torch.split(pixels, 128)]
    images = torch.cat(parts).view(len(like.prompts), per_prompt, *parts[0].shape[1:])
    return Evaluation(like.prompts, score_images(scorers, like.prompts, images), images)


def write_samples(folder: Path, base: Evaluation, aligned: Evaluation, limit: int = 32) -> None:
    """The first prompts' images before and after, with each image's values, for people and for the report."""
    from diffalign.data.images import to_pil

    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(base.prompts[:limit]):
        row: dict[str, Any] = {"prompt": prompt}
        for name, e in (("base", base), ("aligned", aligned)):
            file = f"{i:03d}-{name}.png"
            atomic(folder / file, partial(to_pil(e.images[i, :1])[0].save, format="PNG"))
            row[name] = {
                "file": file,
                "values": {k: round(v[i, 0].item(), 4) for k, v in e.values.items() if v[i, 0].isfinite()},
            }
        rows.append(row)
    facts = [{k: _listed(v) for k, v in e.values.items()} for e in (base, aligned)]
    write_json(folder / "samples.json", rows)
    write_json(folder / "values.json", {"prompts": list(base.prompts), "base": facts[0], "aligned": facts[1]})


def _listed(value: Any) -> list[list[float | None]]:
    """(P, K) as JSON can say it: null where the prompt does not ask."""
    return [[x if x == x else None for x in row] for row in value.tolist()]


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


# --- export ---------------------------------------------------------------------------------------------------------


def about(config: TrainConfig) -> dict[str, str]:
    """What an adapter's file says of where it comes from."""
    objective = json.dumps(config.model_dump(mode="json")["objective"])
    version = environment()["versions"]["diffalign"]
    return {"base_model": config.model.path, "objective": objective, "diffalign_version": version}


def exported(folder: Path) -> list[Path]:
    """The files of a run, or of an export, that are its model as stock diffusers loads it.

    Raises:
        ConfigError: there are none.
    """
    index = folder / "model_index.json"
    if index.is_file():
        parts = [folder / name for name in json.loads(index.read_text()) if (folder / name).is_dir()]
        return [index, *(f for part in parts for f in sorted(part.rglob("*")) if f.is_file())]
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")])
    if not files:
        raise ConfigError(f"{folder} is not a finished run: it holds no trained weights", hint="give the output_dir of a run")
    return files


def export_run(run: Path, format: Format, output: Path | None = None, dtype: str | None = None) -> Path:
    """The whole of ``diffalign export``: the trained weights of a finished run in another format; returns the folder."""
    import shutil

    files = exported(run)
    if dtype is not None and format != "merged":
        raise ConfigError(f"--dtype does not apply to {format}", hint="an adapter stays as it was trained, fp32")
    config = load(TrainConfig, run / "config.resolved.yaml", [] if dtype is None else [f"model.dtype={dtype}"])
    out = output or run / "exports" / format
    if format == "diffusers":
        for file in files:
            (out / file.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file.relative_to(run))
        return out
    model = build_model(config.model.model_copy(update={"quantization": "none", "attention": None}))
    model.restore(run)
    atomic_folder(out, lambda to: model.export(to, format, about(config)))
    return out


# --- pairs ----------------------------------------------------------------------------------------------------------


class PairsConfig(Spec):
    """Preference pairs from a model's own samples: K images a prompt, scored, and a rule that picks two."""

    version: Literal[1] = 1
    model: ModelSpec = ModelSpec(path="shapes-unet")
    adapter: str | None = None
    """A finished run whose trained weights make the images."""
    prompts: str = "shapes:train"
    num_prompts: int = Field(default=1000, ge=1)
    images_per_prompt: int = Field(default=8, ge=2)
    seed: int = Field(default=0, ge=0)
    sampling: Sampler = Sampler()
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    reward: dict[str, float] = Field(default={"score": 0.8, "cleanliness": 0.2}, min_length=1)
    """Weights of the scorers' values."""
    rule: Annotated[PairRule, PAIR_RULES] = BestWorst()
    shard_size: int = Field(default=100, ge=1)
    """Prompts per shard; a killed run goes on at the first missing shard."""
    split_salt: str = ""
    output_dir: str


def make_pairs(config: PairsConfig) -> Path:
    """Generate, score and pair; only images that stand in a pair are kept. Resumes shard by shard."""
    from tqdm import tqdm

    from diffalign.data.images import encode_png, sha256, to_pil
    from diffalign.data.tables import run_shards, write_shard
    from diffalign.sampling import generate
    from diffalign.scorers.combine import weighted
    from diffalign.train.evaluate import score_images

    folder = Path(config.output_dir)
    prompts = prompts_of(config.prompts, config.num_prompts, config.seed, config.split_salt)
    model = ready_model(config.model)
    if config.adapter is not None:
        model.restore(Path(config.adapter))
    scorers = make_scorers(config.scorers)
    said = " + ".join(f"{w:g} {name}" for name, w in config.reward.items())
    versions = json.dumps(environment()["versions"])
    bar = tqdm(total=len(prompts) * config.images_per_prompt, desc="pairs", unit="image", dynamic_ncols=True)

    def shard(n: int) -> list[dict[str, Any]]:
        mine = prompts[n * config.shard_size : (n + 1) * config.shard_size]
        k = config.images_per_prompt
        images = generate(model, mine, config.sampling, per_prompt=k, seed=config.seed, on_batch=bar.update)
        values = score_images(scorers, [p.text for p in mine], images)
        unknown = set(config.reward) - set(values)
        if unknown:
            raise ConfigError(f"reward: no scorer gives {sorted(unknown)[0]!r}", hint=f"given: {', '.join(values)}")
        reward = weighted(values, config.reward)
        if not reward.isfinite().all():
            raise ConfigError(
                "reward: some prompts do not ask for one of its values", hint="weigh score, exact or cleanliness"
            )
        rows: dict[str, list[dict[str, Any]]] = {"images": [], "scores": [], "pairs": []}
        for i, prompt in enumerate(mine):
            ids: dict[int, str] = {}
            for preference in config.rule(Group(reward[i].tolist(), {n: v[i].tolist() for n, v in values.items()})):
                for j in (preference.chosen, preference.rejected):
                    if j in ids:
                        continue
                    picture = to_pil(images[i, j][None])[0]
                    data = encode_png(picture)
                    digest = sha256(data)
                    ids[j] = f"{prompt.id}-{config.seed}-{j}"
                    rows["images"].append({
                        "image_id": ids[j], "sha256": digest, "prompt_id": prompt.id, "prompt": prompt.text,
                        "image": {"bytes": data, "path": None}, "k": j, "seed": config.seed,
                        "model": config.model.path, "revision": config.model.revision, "adapter": config.adapter,
                        "sampler": type(model.scheduler).__name__, "versions": versions,
                        "num_inference_steps": config.sampling.num_inference_steps,
                        "guidance_scale": config.sampling.guidance_scale,
                        "width": picture.width, "height": picture.height,
                    })  # fmt: skip
                    for name in config.reward:
                        rows["scores"].append({
                            "image_sha256": digest, "prompt_sha256": sha256(prompt.text.encode()),
                            "scorer": name, "version": "1", "preprocess_version": "1", "value": values[name][i, j].item(),
                        })  # fmt: skip
                rows["pairs"].append({
                    "pair_id": f"{prompt.id}-{config.seed}-{preference.chosen}-{preference.rejected}",
                    "prompt_id": prompt.id, "prompt": prompt.text, "p_win": 1.0,
                    "chosen_id": ids[preference.chosen], "rejected_id": ids[preference.rejected],
                    "margins": json.dumps({"reward": round(preference.margin, 6)}),
                    "rule": dump(config.rule).strip(), "scores": said, "source": config.model.path,
                })  # fmt: skip
        write_shard(folder, "images", n, rows["images"])
        write_shard(folder, "scores", n, rows["scores"])
        return rows["pairs"]

    plan = {k: v for k, v in config.model_dump(mode="json").items() if k != "output_dir"}
    run_shards(folder, "pairs", plan, -(-len(prompts) // config.shard_size), shard)
    bar.close()
    return folder


def shipped_configs() -> dict[str, Path]:
    """Worked examples and presets by name, of an installed wheel or a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "configs", package.parent / "configs"):
        if root.is_dir():
            found = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
            return {name: p for name, p in found.items() if not name.startswith("accelerate/")}  # for another program
    return {}


def catalogue(what: str) -> list[tuple[str, str]]:
    """(name, one line) of everything built in of one kind."""
    from diffalign.models import FAMILIES, find_family
    from diffalign.scorers.vlm import judges
    from diffalign.shapes.taste import Kind

    match what:
        case "models":
            said = "{0}: trains the {1.net_name}, {2}; tested with {1.tested}"
            found = [(name, find_family(name)) for name in FAMILIES]
            return [(cls.family, said.format(name, cls, " or ".join(cls.kinds))) for name, cls in found]
        case "objectives":
            rows = [(name, _objective_line(cls)) for name, cls in OBJECTIVES.options.items()]
            return rows + [(alias, f"alias of {name}") for alias, name in OBJECTIVES.aliases.items()]
        case "scorers":
            cards = [(name, card_of(name)) for name in table()]
            return [
                ("shapes", "the exact judge of the built-in world"),
                *((f"taste:{k}", "a taste of the built-in world") for k in get_args(Kind)),
                *((f"{name}:pkg.mod:obj" if c and c.plugin else name, _card_line(c)) for name, c in cards),
                *((f"{name}:URL,MODEL", cls.card.summary) for name, cls in judges().items()),
                ("http:URL", "a scorer of `diffalign serve`"),
                ("pkg.mod:obj", "any callable f(images, prompts)"),
            ]
        case "rules":
            return [(name, (cls.__doc__ or "").strip().splitlines()[0]) for name, cls in PAIR_RULES.options.items()]
        case "formats":
            from diffalign.data.formats import LAYOUTS

            found = [(name, (layout.read.__doc__ or "").strip().splitlines()[0]) for name, layout in LAYOUTS.items()]
            return [*found, ("folders", "chosen/ and rejected/ with pictures of the same names, prompts in .txt files")]
        case "presets":
            heads = {n: p.read_text().splitlines()[0].removeprefix("# ") for n, p in shipped_configs().items()}
            return list(heads.items())
    raise ConfigError(f"nothing is listed as {what!r}")


def _objective_line(cls: Any) -> str:
    """Formula, data, paper and how it was checked."""
    formula = (cls.__doc__ or "").strip().splitlines()[0].removesuffix(".")
    extra = {"reference": "a reference", "p_win": "p_win", "scores": "scores"}
    data = [cls.data if "loser" in cls.needs or cls.data != "pairs" else "winners"]
    data += [said for need, said in extra.items() if need in cls.needs]
    return f"{formula} | {', '.join(data)} | {cls.paper} | checked: {cls.checked}"


def _card_line(card: Card | None) -> str:
    if card is None:
        return "a callable of another package"
    known = "verified" if card.verified else "not verified"
    return f"{card.summary} ({card.licence}{f'; {known} against published weights' if card.weights else ''})"
