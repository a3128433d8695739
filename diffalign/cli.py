"""The ``diffalign`` command. Every verb is a thin door; those of preference data are in :mod:`diffalign.data_cli`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from diffalign import data_cli
from diffalign.console import CONFIG, JSON, SHARD, BesideBars, Group, launched, shard_of, show, split
from diffalign.errors import ConfigError, DiffalignError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffalign")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Align text-to-image diffusion models with preferences.

    \b
    diffalign train configs/shapes-dpo.yaml
    diffalign train configs/shapes-dpo.yaml train.learning_rate=1e-4 output_dir=runs/mine
    """
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[BesideBars()])
    sys.path.insert(0, "")  # `pkg.mod:Class` of the working directory


@main.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@JSON
def train(config: tuple[str, ...], as_json: bool) -> None:
    """Fine-tune a model on preferences, then evaluate it and write a report."""
    from diffalign.recipes import TrainConfig, train
    from diffalign.report import write_report
    from diffalign.spec import load_config

    run = train(load_config(TrainConfig, *split(config)), finished=write_report)
    if launched()[0] != 0:
        return
    page = write_report(run.folder)
    m = run.metrics
    lines = [f"trained {m['steps']} steps in {m['train_seconds']} s"]
    lines += [round_line(row) for row in m.get("rounds", ())]
    if m.get("stopped"):
        lines.append(f"stopped by a limit: {m['stopped']}")
    if "aligned" in m:
        lines += _compared(m)
    show({**m, "report": str(page)}, as_json, [*lines, f"report: {page}"])


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@JSON
def evaluate(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure a finished RUN again: base against trained at the same prompts and seeds.

    Overrides are keys of the run's evaluate section: num_prompts=512 prompts=shapes:select scorers=[shapes,taste:size]
    """
    from diffalign.recipes import evaluate_run

    folder, metrics = evaluate_run(run, overrides)
    show(metrics, as_json, [*_compared(metrics), f"written to {folder}"])


@main.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@SHARD
@JSON
def score(config: tuple[str, ...], shard: str | None, as_json: bool) -> None:
    """Score pictures with reward models; the same command again fills what is missing.

    diffalign score path=FOLDER scorers=[clip:PATH,pickscore] output_dir=out
    """
    from diffalign.cells import ScoreConfig, score
    from diffalign.data.scores import read_scored
    from diffalign.data.sources import open_source
    from diffalign.gallery import write_gallery
    from diffalign.spec import load_config
    from diffalign.spread import diversity, diversity_line
    from diffalign.suites import open_suite, suite_lines, suite_report
    from diffalign.tally import export, summary, summary_lines

    loaded = load_config(ScoreConfig, *split(config))
    done = score(loaded, *shard_of(shard))
    result: dict[str, Any] = {"scored": done.images, "cells": done.cells, "failed": sum(done.errors.values())}
    lines = [f"{done.images} images and {done.cells} cells scored now, in {loaded.output_dir}"]
    if done.finished:  # whichever process ends last
        folder = Path(loaded.output_dir)
        rows = read_scored(folder)
        result |= summary(rows)
        lines += summary_lines(result)
        if result["failed"]:
            lines.append(f"{result['failed']} cells have no value now; attempt={loaded.attempt + 1} tries them again")
        if loaded.suite:
            result["suite"] = suite_report(open_suite(loaded.suite), rows)
            lines += suite_lines(result["suite"])
        result["diversity"] = diversity(folder, rows)
        lines += [f"embeddings {name[:12]}: {diversity_line(said)}" for name, said in result["diversity"].items()]
        if loaded.export:
            lines.append(f"written: {export(rows, folder, loaded.export)}")
        if loaded.gallery:
            source = open_source(loaded.path, loaded.image_root)
            result["gallery"] = str(write_gallery(rows, source, folder / "gallery.html", loaded.gallery))
            lines.append(f"gallery: {result['gallery']}")
    show(result, as_json, lines)
    if done.cells and sum(done.errors.values()) == done.cells:
        raise DiffalignError("no cell got a value", hint="the reasons are above")


@main.command()
@click.argument("scorers", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Another host opens the scorers to the network.")
@click.option("--port", default=8421, show_default=True, help="0 takes a free one.")
@click.option("--max-batch", default=64, show_default=True, help="Pictures a request.")
def serve(scorers: tuple[str, ...], host: str, port: int, max_batch: int) -> None:
    """Serve SCORERS over HTTP until interrupted; the token is DIFFALIGN_TOKEN, or a new one that is printed."""
    import os
    import secrets

    from diffalign.scorers.http import TOKEN
    from diffalign.serve import ScorerServer

    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    with ScorerServer(scorers, token, host, port, max_batch) as server:
        for name in server.scorers:
            click.echo(f"http:http://{host}:{server.server_address[1]}/{name}")
        if TOKEN not in os.environ:
            click.echo(f"{TOKEN}={token}")
        server.serve_forever()


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--inception", type=click.Path(path_type=Path), help="torch-fidelity's weights: FID and KID as published.")
@JSON
def compare(a: Path, b: Path, inception: Path | None, as_json: bool) -> None:
    """Win rate of the scored folder B over A, per scorer and category, paired by prompt; ties one half."""
    from diffalign.versus import compare, compare_lines

    said = compare(a, b, inception=inception)
    show(said, as_json, compare_lines(said))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html and the model card of a RUN again."""
    from diffalign.report import write_report

    click.echo(f"report: {write_report(run)}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format", "format_", type=click.Choice(["diffusers", "kohya", "merged"]), default="diffusers", show_default=True
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of a merged pipeline; the run's if not given."
)
def export(run: Path, output: Path | None, format_: Any, dtype: str | None) -> None:
    """Write the trained weights of a RUN, with their card, to OUTPUT (RUN/exports/FORMAT if not given).

    \b
    diffusers  the adapter, or the whole pipeline, as the run left it
    kohya      the adapter for ComfyUI and other programs
    merged     the whole pipeline, the adapter folded into its weights
    """
    from diffalign.exporting import export_run
    from diffalign.report import write_card

    folder = export_run(run, format_, output, dtype)
    click.echo(f"written: {write_card(run, folder, format_).parent}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True, help="If the repository is made now, for you alone.")
def push(run: Path, repository: str, private: bool) -> None:
    """Upload the trained weights of a RUN and its card to the hub, as REPOSITORY (owner/name).

    Log in with `hf auth login` first.
    """
    from diffalign import hub
    from diffalign.report import write_card

    card = write_card(run, run, repository=repository)
    click.echo(f"uploaded: {hub.push(run, [*hub.exported(run), card], repository, private)}")


data_cli.register(main)


@main.group()
def config() -> None:
    """Look at configurations without running them."""


def _config_class(kind: str) -> Any:
    from diffalign import recipes
    from diffalign.cells import ScoreConfig
    from diffalign.generation import GenerateConfig
    from diffalign.importing import ImportConfig
    from diffalign.selection import SelectConfig

    ours = {"generate": GenerateConfig, "score": ScoreConfig, "pairs": SelectConfig, "import": ImportConfig}
    return {"train": recipes.TrainConfig, **ours}[kind]


KINDS = ["train", "generate", "score", "pairs", "import"]
KIND = click.option("--kind", type=click.Choice(KINDS), default="train", help="Which configuration.")


@config.command("show")
@CONFIG
@KIND
def configshow(config: tuple[str, ...], kind: str) -> None:
    """Print the configuration with every default filled in."""
    from diffalign.spec import dump, load_config

    click.echo(dump(load_config(_config_class(kind), *split(config))), nl=False)


@config.command("validate")
@CONFIG
@KIND
def config_validate(config: tuple[str, ...], kind: str) -> None:
    """Check a configuration and report every mistake."""
    from diffalign.spec import load_config

    load_config(_config_class(kind), *split(config))
    click.echo("valid")


@config.command("schema")
@KIND
def config_schema(kind: str) -> None:
    """Print the JSON Schema, for editors."""
    click.echo(json.dumps(_config_class(kind).model_json_schema(), indent=2))


@config.command("new")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--from", "source", default="shapes-dpo", help="Which shipped configuration to start from.")
def config_new(path: Path, source: str) -> None:
    """Write a new configuration file to edit."""
    from diffalign.catalogue import shipped_configs
    from diffalign.data.files import write_text

    known = shipped_configs()
    if source not in known:
        raise ConfigError(f"no shipped configuration {source!r}", hint=f"known: {', '.join(known)}")
    if path.exists():
        raise ConfigError(f"{path} exists already")
    write_text(path, known[source].read_text())
    click.echo(f"written: {path}")


@config.command("diff")
@click.argument("a")
@click.argument("b")
@KIND
def config_diff(a: str, b: str, kind: str) -> None:
    """Print the keys in which two configurations or runs differ."""
    from diffalign.spec import differences, load_config

    cls = _config_class(kind)
    for key, x, y in differences(load_config(cls, a, []), load_config(cls, b, [])):
        click.echo(f"{key}: {x!r} -> {y!r}")


@main.command("list")
@click.argument("what", type=click.Choice(["models", "objectives", "scorers", "presets", "rules", "formats"]))
def list_(what: str) -> None:
    """Print what is built in."""
    from diffalign.catalogue import catalogue

    rows = catalogue(what)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")


@main.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@click.option("--measure", is_flag=True, help="Also take two steps on this machine's CUDA device and show what they took.")
@JSON
def estimate(config: tuple[str, ...], measure: bool, as_json: bool) -> None:
    """Tell what a training configuration will take, without weights: memory by phase, operations, what would help most."""
    from diffalign.estimate import estimate, lines
    from diffalign.recipes import TrainConfig
    from diffalign.spec import load_config

    result = estimate(load_config(TrainConfig, *split(config)), measure)
    show(result, as_json, lines(result))


@main.command()
@click.argument("scorer")
@JSON
def verify(scorer: str, as_json: bool) -> None:
    """Check the weights of a SCORER: digests, architecture, published constants, a self-test.

    diffalign verify clip:PATH
    """
    from dataclasses import asdict

    from diffalign.scoring import verify_scorer

    checks = verify_scorer(scorer)
    marks = {True: "ok  ", False: "FAIL", None: "    "}
    show({"checks": [asdict(c) for c in checks]}, as_json, [f"{marks[c.ok]} {c.what}: {c.said}" for c in checks])
    if any(c.ok is False for c in checks):
        raise DiffalignError(f"{scorer} failed {sum(c.ok is False for c in checks)} checks", hint="fetch the weights again")


@main.command()
@JSON
def env(as_json: bool) -> None:
    """Print versions and devices, for bug reports."""
    from diffalign.building import environment

    found = environment()
    lines = [f"{k}: {v}" for k, v in {**{k: v for k, v in found.items() if k != "versions"}, **found["versions"]}.items()]
    show(found, as_json, lines)


def round_line(row: dict[str, Any]) -> str:
    """What a round was trained on, and where the model stood after it."""
    said = f"round {row['round']}: {row['pairs']} pairs of {row['images']} images"
    said += "" if row["reward"] is None else f" of reward {row['reward']:.3f}"
    return said + "".join(f", {n} {row[n]:.3f}" for n in ("exact", "score") if n in row)


def _compared(m: dict[str, Any]) -> list[str]:
    """The comparison in three lines."""
    names = [n for n in ("exact", "score") if n in m["difference"]] or list(m["difference"])[:2]
    lines = []
    for n in names:
        d = m["difference"][n]
        interval = "(one prompt, no interval)" if d["low"] is None else f"[{d['low']:+.3f}, {d['high']:+.3f}]"
        lines.append(f"{n}: base {m['base'][n]:.3f}, aligned {m['aligned'][n]:.3f}, difference {d['value']:+.3f} {interval}")
    w = m["win_rate"]
    lines.append(f"win rate: {w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}] (ties one half)")
    if "gap_closed" in m:
        lines.append(f"gap closed: {100 * m['gap_closed']:.1f} % of the way to the ceiling {m['ceiling']['exact']:.3f}")
    return lines
