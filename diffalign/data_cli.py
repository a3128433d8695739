"""The verbs of preference data: ``pairs``, ``import``."""

from __future__ import annotations

import click

from diffalign.console import CONFIG, JSON, SHARD, shard_of, show, split


def register(main: click.Group) -> None:
    """Add the verbs to the command."""
    for command in (pairs, import_):
        main.add_command(command)


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@SHARD
@JSON
def pairs(config: tuple[str, ...], shard: str | None, as_json: bool) -> None:
    """Select preference pairs from scored images by a rule; tells what it kept and dropped, and why.

    diffalign pairs path=FOLDER reward.clip=1 rule.type=all units=std rule.min_margin=1 output_dir=FOLDER
    """
    from diffalign.recipes import load_config
    from diffalign.selection import SelectConfig, select

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
    from diffalign.recipes import load_config

    loaded = load_config(ImportConfig, *split(config))
    done = import_pairs(loaded, *shard_of(shard))
    show(vars(done), as_json, done.lines(loaded.output_dir))
