"""Every method on the built-in world, by one protocol.

    python benchmarks/leaderboard.py run                # fill the rows that are missing (minutes each, resumable)
    python benchmarks/leaderboard.py run dpo-lora sft   # only these
    python benchmarks/leaderboard.py table              # print the table and write docs/leaderboard.md
    python benchmarks/leaderboard.py select dpo-lora objective.beta=1000 train.learning_rate=3e-4
                                                        # one trial on the select split, appended to trials.jsonl
    python benchmarks/leaderboard.py --world dit run    # the same on the flow world, in results/dit

Test prompts are never used to choose: settings come from ``select``. A row is ``results/ROW-SEED.json`` with one value
per prompt, the hashes of configuration, assets and prompts, and the cost; mixed hashes are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import DIT_ROWS, LABELLED, ROWS, SCORERS, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "leaderboard"
SEEDS = (0, 1, 2)
PROMPTS, PER_PROMPT = 512, 2
COST = ("seed", "train_seconds", "denoiser_passes", "images_generated", "drift/winner", "drift/loser")


CONTROLS = {
    "base": "the base",
    "best-of-4": "best of 4 of the base by the learned CLIP (4 times the inference)",
    "base-guided": "the base, sampled at guidance 4 (no training)",
}


@dataclass(frozen=True)
class World:
    """A base, its main job, and where its rows are kept. Rows of two worlds never stand in one table."""

    name: str
    what: str
    model: str
    pairs: str
    config: Path
    rows: dict[str, Row]
    controls: dict[str, str]
    results: Path
    work: Path


WORLDS = {
    "unet": World(
        "unet", "The UNet: noise prediction, shapes-unet", "shapes-unet", "shapes-pairs", ROOT / "configs" / "shapes-dpo.yaml",
        ROWS, CONTROLS, RESULTS, WORK,
    ),
    "dit": World(
        "dit", "The flow world: an MMDiT on a straight path, shapes-dit", "shapes-dit", "shapes-dit-pairs",
        ROOT / "configs" / "shapes-dit-dpo.yaml", DIT_ROWS, CONTROLS, RESULTS / "dit", WORK / "dit",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="unet")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join([*CONTROLS, *ROWS])}")
    run.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    run.add_argument("--minutes", type=float, default=0, help="start no further run after this long; 0 never stops")
    verbs.add_parser("table")
    select = verbs.add_parser("select")
    select.add_argument("row", choices=ROWS)
    select.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    world = WORLDS[args.world]
    known = [*world.controls, *world.rows]
    if unknown := {*getattr(args, "rows", ()), *([args.row] if args.verb == "select" else ())} - set(known):
        parser.error(f"unknown row {sorted(unknown)[0]}; {world.name} has {', '.join(known)}")
    if args.verb == "run":
        fill(world, args.rows or known, args.seeds, args.minutes)
    elif args.verb == "select":
        trial(world, args.row, args.overrides)
    else:
        print(write_tables())


# --- running --------------------------------------------------------------------------------------------------------


def fill(world: World, rows: Sequence[str], seeds: Sequence[int], minutes: float) -> None:
    """Run what is missing, row by row."""
    world.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in rows:
        for seed in (None,) if name in world.controls else [s for s in world.rows[name].seeds if s in seeds]:
            path = world.results / (f"{name}.json" if seed is None else f"{name}-{seed}.json")
            if path.exists():
                continue
            if minutes and time.monotonic() - began > 60 * minutes:
                print("time is up; run again to go on", file=sys.stderr)
                return
            print(f"== {path.stem}", file=sys.stderr)
            write(path, control(world, name) if seed is None else run_row(world, name, seed))


def run_row(world: World, name: str, seed: int) -> dict[str, Any]:
    """Train one row with one seed and measure it on the test prompts."""
    from diffalign.train.tracking import read_metrics

    row = world.rows[name]
    if row.sampled_again:
        other, guidance = row.sampled_again
        trained = json.loads((world.results / f"{other}-{seed}.json").read_text())
        folder = final_folder(world, other, seed)
        return measured(world, name, folder, "shapes:test", guidance=guidance) | {k: trained[k] for k in COST}
    seconds, passes, generated = 0.0, 0, 0
    previous: Path | None = None
    for n in range(row.rounds):
        out = None if row.rounds == 1 else final_folder(world, name, seed).with_name(f"round-{n}")
        extra = [f"train.seed={seed}", "evaluate.enabled=false"]
        if row.config is None:
            data = pairs_for(world, row, n, previous)
            generated += data[1]
            extra.append(f"data.path={data[0]}")
        if previous is not None:  # go on from the last round; the reference moves along
            extra.append(f"model.lora.path={previous}")
        final, metrics = train_once(world, row, [*row.overrides, *extra], out)
        generated += metrics.get("reward_calls", 0) + metrics.get("images_generated", 0)
        seconds, passes, previous = seconds + metrics["train_seconds"], passes + metrics["denoiser_passes"], final
    last = next((x for x in reversed(read_metrics(final)) if "heldout/drift/winner" in x), {})
    return measured(world, name, final, "shapes:test") | {
        "seed": seed,
        "train_seconds": round(seconds, 1),
        "denoiser_passes": passes,
        "images_generated": generated,
        **{k: last.get(f"heldout/{k}") for k in ("drift/winner", "drift/loser")},
    }


def final_folder(world: World, name: str, seed: int) -> Path:
    """Where the last of several rounds is trained."""
    return world.work / f"{name}-{seed}" / f"round-{world.rows[name].rounds - 1}"


def pairs_for(world: World, row: Row, n: int, previous: Path | None) -> tuple[str, int]:
    """The pairs of a round, made where they are missing, and how many images that took."""
    from diffalign.own_pairs import PairsConfig, make_pairs
    from diffalign.spec import validate

    sys.path.insert(0, str(ROOT / "scripts"))
    from build_assets import PAIRS

    if not row.pairs:
        path = chosen_again(world, row) if row.chosen else world.pairs
        return path, PAIRS["num_prompts"] * PAIRS["images_per_prompt"]
    settings = {**PAIRS, "seed": 7 + 100 * n, **row.pairs}
    if world.name != "unet":
        settings |= {"model": {"path": world.model}}
    if previous is not None:
        settings |= {"adapter": str(previous), "model": {"path": world.model, "lora": lora_spec(world)}}
    # rows and seeds that ask for the same pairs share them; fresh ones come from the seed's own model
    folder = world.work / f"pairs-{digest(json.dumps(settings).replace(str(world.work), '').encode())}"
    settings["output_dir"] = str(folder)
    config = validate(PairsConfig, settings)
    make_pairs(config)
    return str(folder), config.num_prompts * config.images_per_prompt


def chosen_again(world: World, row: Row) -> str:
    """The shipped pairs as ``diffalign pairs`` writes them, with weights or captions of their own."""
    from diffalign.own_pairs import PairsConfig
    from diffalign.selection import SelectConfig, select
    from diffalign.shapes import asset
    from diffalign.spec import validate

    reward = PairsConfig(output_dir="unused").reward  # the one that the shipped pairs were chosen by
    settings = {"path": str(asset(world.pairs)), "reward": reward, **row.chosen}
    folder = str(world.work / f"chosen-{digest(json.dumps(row.chosen).encode())}")
    select(validate(SelectConfig, settings | {"output_dir": folder}))
    return folder


def lora_spec(world: World) -> dict[str, Any]:
    from diffalign.spec import load_yaml

    return load_yaml(world.config)["model"]["lora"]


def train_once(world: World, row: Row, overrides: Sequence[str], folder: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Train in this process; a finished run is read back, an unfinished one goes on.

    Without a folder of its own a run lies under the digest of its settings, so that the trial that was chosen is
    trained once.
    """
    from diffalign.recipes import TrainConfig, train
    from diffalign.spec import load

    file = ROOT / "configs" / row.config if row.config else world.config
    if folder is None:
        settings = load(TrainConfig, file, [*overrides, "output_dir=unused"]).model_dump_json()
        folder = world.work / f"run-{digest(settings.replace(str(world.work), '').encode())}"
    if (folder / "metrics.json").exists():
        return folder, json.loads((folder / "metrics.json").read_text())
    return folder, train(load(TrainConfig, file, [*overrides, f"output_dir={folder}", "resume_from=auto"])).metrics


def measured(
    world: World, name: str, run: Path | None, prompts: str, count: int = PROMPTS, guidance: float | None = None
) -> dict[str, Any]:
    """Per-prompt means of every value, of a run or of the base."""
    from diffalign import stats
    from diffalign.building import build_model
    from diffalign.evaluation import EvaluateSpec, prompts_of
    from diffalign.models.guidance import guided_away
    from diffalign.recipes import TrainConfig
    from diffalign.scoring import make_scorers
    from diffalign.spec import load
    from diffalign.train.evaluate import evaluate

    config = load(TrainConfig, world.config if run is None else run / "config.resolved.yaml", ["output_dir=unused"])
    spec: EvaluateSpec = config.evaluate
    scorers = make_scorers(world.rows[name].scorers if name in world.rows else SCORERS)
    model = build_model(config.model)
    if run is not None:
        model.restore(run)
    said = prompts_of(prompts, count, spec.seed)
    sampling = spec.sampling.model_copy(update={"guidance_scale": guidance} if guidance else {})
    away = name in world.rows and world.rows[name].guided_away
    with guided_away(model) if away else nullcontext():
        result = evaluate(model, said, scorers, sampling, per_prompt=PER_PROMPT, seed=spec.seed)
    return {
        "row": name,
        "world": world.name,
        "values": per_prompt(result.values),
        "diversity": stats.diversity(result.images.double() / 255),
        "hashes": hashes(world, spec, said)
        | {"config": digest((Path(run) / "config.resolved.yaml").read_bytes()) if run else ""},
    }


def per_prompt(values: dict[str, Any]) -> dict[str, list[float]]:
    """Means over each prompt's images; a value that not all prompts ask for holds those that do."""
    means = {k: v.mean(1) for k, v in values.items()}
    return {k: [round(x, 6) for x in v[v.isfinite()].tolist()] for k, v in means.items()}


def control(world: World, name: str) -> dict[str, Any]:
    """The base with its ceiling, or the best of four of its samples by the learned reward."""
    import torch

    from diffalign.building import build_model
    from diffalign.evaluation import ceiling, prompts_of
    from diffalign.recipes import TrainConfig
    from diffalign.scoring import make_scorers
    from diffalign.spec import load
    from diffalign.train.evaluate import Evaluation, evaluate, score_images

    if name == "base-guided":
        return measured(world, name, None, "shapes:test", guidance=4.0)
    out = measured(world, name, None, "shapes:test") if name == "base" else {}
    config = load(TrainConfig, world.config, ["output_dir=unused"])
    model, said = build_model(config.model), prompts_of("shapes:test", PROMPTS, config.evaluate.seed)
    judge = make_scorers(SCORERS)
    texts = tuple(p.text for p in said)
    if name == "base":
        blank = Evaluation(texts, {}, torch.zeros(PROMPTS, 1, 3, 32, 32, dtype=torch.uint8))
        top = ceiling(model, blank, judge)
        return out | {"ceiling": {k: v.nanmean().item() for k, v in top.values.items()}}
    four = evaluate(model, said, make_scorers(("clip:shapes-clip",)), config.evaluate.sampling, per_prompt=8, seed=2000)
    best = four.values["clip"].view(PROMPTS, PER_PROMPT, 4).argmax(-1)  # two independent groups of four
    chosen = four.images.view(PROMPTS, PER_PROMPT, 4, *four.images.shape[2:])
    images = chosen[torch.arange(PROMPTS)[:, None], torch.arange(PER_PROMPT)[None], best]
    values = score_images(judge, texts, images)
    from diffalign import stats

    return {
        "row": name,
        "world": world.name,
        "values": per_prompt(values),
        "diversity": stats.diversity(images.double() / 255),
        "hashes": hashes(world, config.evaluate, said) | {"config": ""},
    }


def trial(world: World, name: str, overrides: Sequence[str]) -> None:
    """One setting on the select split; every trial is counted."""
    row = world.rows[name]
    extra = ["train.seed=0", "evaluate.enabled=false"]
    extra += [f"data.path={pairs_for(world, row, 0, None)[0]}"] if row.config is None else []
    folder, metrics = train_once(world, row, [*row.overrides, *extra, *overrides])
    found = measured(world, name, folder, "shapes:select", 256)
    base = world.results / "select-base.json"
    if not base.exists():
        write(base, measured(world, "base", None, "shapes:select", 256))
    before = json.loads(base.read_text())["values"]
    means = {k: sum(v) / len(v) for k, v in found["values"].items()}
    line = {
        "row": name,
        "overrides": list(overrides),
        "config": digest(world.config.read_bytes()),
        "train_seconds": metrics["train_seconds"],
        **{k: round(m, 4) for k, m in means.items()},
        **{f"{k}_gain": round(m - sum(before[k]) / len(before[k]), 4) for k, m in means.items() if k in ("exact", "score")},
    }
    with (world.results / "trials.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")
    print(json.dumps(line))


# --- hashes and files -----------------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def hashes(world: World, spec: Any, prompts: Sequence[Any]) -> dict[str, str]:
    """What must agree between rows that stand in one table."""
    from diffalign.shapes import asset

    weights = b"".join(p.read_bytes() for p in sorted(asset(world.model).rglob("*.safetensors")))
    return {
        "assets": digest(weights),
        "prompts": digest(json.dumps([p.id for p in prompts]).encode()),
        "evaluation": digest(spec.sampling.model_dump_json().encode() + str((spec.seed, PER_PROMPT)).encode()),
    }


def write(path: Path, value: dict[str, Any]) -> None:
    from diffalign.data.files import write_text

    write_text(path, json.dumps(value) + "\n")


# --- the tables -----------------------------------------------------------------------------------------------------


def write_tables() -> str:
    """The leaderboard as Markdown, also written to docs/leaderboard.md with its figure."""
    from table import HEAD, SHOWN, entries, figure, labelled, table

    from diffalign.data.files import write_text

    parts = [HEAD.format(prompts=PROMPTS, per_prompt=PER_PROMPT), "![Gains of every row](leaderboard.svg)", SHOWN]
    bars = {}
    for world in WORLDS.values():
        if (world.results / "base.json").exists():
            rows = world.controls | {k: r.what for k, r in world.rows.items()}
            seeds = dict.fromkeys(world.controls, (None,)) | {k: r.seeds for k, r in world.rows.items()}
            bars[world.what] = entries(world.results, rows, seeds)
            parts += [f"## {world.what}", table(world.results, bars[world.what])]
            if by_label := labelled(world.results, {k: v for k, v in LABELLED.items() if k in world.rows}, SEEDS):
                parts += [f"### {world.model}: the quality of labels", by_label]
    text = "\n\n".join(parts)
    write_text(ROOT / "docs" / "leaderboard.md", text + "\n")
    write_text(ROOT / "docs" / "leaderboard.svg", figure(bars))
    return text


if __name__ == "__main__":
    main()
