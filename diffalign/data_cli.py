"""The verbs of preference data: ``generate``, ``pairs``, ``import``, ``data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffalign.console import CONFIG, JSON, SHARD, shard_of, show, split
from diffalign.errors import ConfigError, DataError


def register(main: click.Group) -> None:
    """Add the verbs to the command."""
    for command in (generate, pairs, import_, data):
        main.add_command(command)


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@SHARD
@JSON
def generate(config: tuple[str, ...], shard: str | None, as_json: bool) -> None:
    """Make images of many prompts by one or several models; a killed run goes on where it stopped."""
    from diffalign.generation import GenerateConfig, generate_dataset
    from diffalign.spec import load_config

    done = generate_dataset(load_config(GenerateConfig, *split(config)), *shard_of(shard))
    show(vars(done) | {"folder": str(done.folder)}, as_json, done.lines())


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@SHARD
@JSON
def pairs(config: tuple[str, ...], shard: str | None, as_json: bool) -> None:
    """Select preference pairs from scored images by a rule; tells what it kept and dropped, and why.

    diffalign pairs path=FOLDER reward.clip=1 rule.type=all units=std rule.min_margin=1 output_dir=FOLDER
    """
    from diffalign.selection import SelectConfig, select
    from diffalign.spec import load_config

    loaded = load_config(SelectConfig, *split(config))
    done = select(loaded, *shard_of(shard))
    show(vars(done), as_json, done.lines(loaded.output_dir))


@click.command("import", context_settings={"ignore_unknown_options": True})
@CONFIG
@SHARD
@JSON
def import_(config: tuple[str, ...], shard: str | None, as_json: bool) -> None:
    """Read a published preference dataset, a table or folders into a dataset folder; counts what it drops, and why.

    diffalign import format=pickapic path=FOLDER output_dir=OUT
    """
    from diffalign.importing import ImportConfig, import_pairs
    from diffalign.spec import load_config

    loaded = load_config(ImportConfig, *split(config))
    done = import_pairs(loaded, *shard_of(shard))
    show(vars(done), as_json, done.lines(loaded.output_dir))


FOLDER = click.argument("folder", type=click.Path(path_type=Path))
OUT = click.argument("out", type=click.Path(path_type=Path))


@click.group()
def data() -> None:
    """Look at dataset folders, check, split, merge, clean and export them."""


@data.command("show")
@FOLDER
@click.option("--rows", default=3, show_default=True, help="Pairs to print.")
@JSON
def show_(folder: Path, rows: int, as_json: bool) -> None:
    """Tables, sizes, and the first pairs."""
    from diffalign.inspection import show_dataset, show_lines

    said = show_dataset(folder, rows)
    show(said, as_json, show_lines(said))


@data.command()
@FOLDER
@JSON
def stats(folder: Path, as_json: bool) -> None:
    """Counts, ties, margins, models and their wins, licences, agreement of raters."""
    from diffalign.inspection import stats_lines, stats_of

    said = stats_of(folder)
    show(said, as_json, stats_lines(said))


@data.command()
@FOLDER
@click.option("--pictures", is_flag=True, help="Also decode every picture and compare it with its hash.")
@JSON
def validate(folder: Path, pictures: bool, as_json: bool) -> None:
    """Say what is wrong with the tables; exit status 2 if anything is."""
    from diffalign.inspection import validate_dataset, validate_lines

    found = validate_dataset(folder, pictures)
    show({"findings": [vars(f) for f in found]}, as_json, validate_lines(found))
    if wrong := [f for f in found if f.wrong]:
        raise DataError(f"{folder}: {len(wrong)} kinds of mistakes", hint="they are listed above")


@data.command("split")
@FOLDER
@OUT
@click.argument("shares", nargs=-1, required=True, metavar="NAME=SHARE...")
@click.option("--by", type=click.Choice(["prompt", "user"]), default="prompt", show_default=True)
@click.option("--salt", default="split", show_default=True, help="Another salt makes another split.")
@click.option("--no-pictures", is_flag=True, help="Leave the pictures out: only ids are read and written.")
@JSON
def split_(folder: Path, out: Path, shares: tuple[str, ...], by: Any, salt: str, no_pictures: bool, as_json: bool) -> None:
    """Write OUT/NAME for each NAME=SHARE; no prompt, and no image, stands in two of them.

    diffalign data split FOLDER OUT train=0.9 test=0.1
    """
    from diffalign.curation import split_dataset

    try:
        wanted = {name: float(share) for name, _, share in (s.partition("=") for s in shares)}
    except ValueError as e:
        raise ConfigError(f"cannot read the shares {' '.join(shares)}", hint="write train=0.9 test=0.1") from e
    said = split_dataset(folder, out, wanted, by, salt, not no_pictures)
    show(said, as_json, [f"{out / name}: {_counted(counts)}" for name, counts in said.items()])


@data.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@OUT
@JSON
def merge(sources: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put several dataset folders into OUT: images once, other pictures under their own ids, no pair twice."""
    from diffalign.curation import merge_datasets

    said = merge_datasets(sources, out)
    show(said, as_json, [f"{out}: {_counted(said)}"])


@data.command()
@FOLDER
@OUT
@click.option("--exclude", multiple=True, metavar="PROMPTS", help="Prompt file, suite NAME:PATH or shapes:test to leave out.")
@click.option("--exact", is_flag=True, help="Only the same bytes, not pictures of nearly the same look.")
@JSON
def dedup(folder: Path, out: Path, exclude: tuple[str, ...], exact: bool, as_json: bool) -> None:
    """Write OUT without copies of pictures, repeated pairs, and pairs of evaluation prompts."""
    from diffalign.curation import dedup_dataset
    from diffalign.excluding import excluded_prompts

    counts, reasons = dedup_dataset(folder, out, excluded_prompts(exclude), not exact)
    lines = [f"{out}: {_counted(counts)}", *(f"  removed: {n} {why}" for why, n in reasons.most_common())]
    show({"rows": counts, "removed": reasons}, as_json, lines)


@data.command()
@FOLDER
@OUT
@click.option("--shots", default=4, show_default=True, help="Examples a user.")
@JSON
def profiles(folder: Path, out: Path, shots: int, as_json: bool) -> None:
    """Write OUT (.jsonl): some examples of each user's taste, and the user's pairs that share nothing with them."""
    from diffalign.profiles import write_profiles

    said = write_profiles(folder, out, shots)
    kept = f"{said['users']} users with {shots} examples each and {said['pairs']} other pairs, in {out}"
    show(said, as_json, [f"{kept}; {said['users_left_out']} users have too few"])


@data.command("export")
@FOLDER
@OUT
@click.option(
    "--format", "format_", default="parquet", show_default=True,
    type=click.Choice(["parquet", "webdataset", "datasets", "label-studio", "argilla"]),
)  # fmt: skip
def export_(folder: Path, out: Path, format_: str) -> None:
    """Write pairs with their pictures for other programs.

    \b
    parquet       prompt, chosen, rejected: what TRL and `datasets` read
    webdataset    tar shards
    datasets      what datasets.load_from_disk opens
    label-studio  tasks.json with predictions, labelling.xml, images/
    argilla       records.json with suggestions, images/
    """
    from diffalign.data.exports import EXPORTS

    click.echo(f"written: {', '.join(str(p) for p in EXPORTS[format_](folder, out)[:5])}")


@data.command("push")
@FOLDER
@click.argument("repository")
@click.option("--private", is_flag=True, help="If the repository is made now, for you alone.")
def push_(folder: Path, repository: str, private: bool) -> None:
    """Upload a dataset folder and its card to the hub, as REPOSITORY (owner/name)."""
    from diffalign.publishing import push_dataset

    click.echo(f"uploaded: {push_dataset(folder, repository, private)}")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {table}" for table, n in counts.items())
