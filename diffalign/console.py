"""What the verbs of the command line share: arguments, output, errors as one line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from typing import Any

import click

from diffalign.errors import ConfigError, DiffalignError


class BesideBars(logging.Handler):
    """Log lines above progress bars instead of behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


CONFIG = click.argument("config", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
SHARD = click.option("--shard", metavar="i/n", help="Only every n-th shard, from the i-th (0 to n-1); default: this rank's.")


def split(words: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The configuration file, if any, and the overrides."""
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise ConfigError(
            f"more than one configuration: {', '.join(files)}",
            hint="overrides are written key=value, in quotes where there are spaces",
        )
    return (files[0] if files else None), [w for w in words if "=" in w]


def show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines))


class Group(click.Group):
    """Turns our errors into one line and the exit status that DESIGN promises."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DiffalignError as e:
            if ctx.params.get("debug"):
                raise
            click.echo(f"diffalign: {e}", err=True)
            ctx.exit(e.exit_status)
        except KeyboardInterrupt:
            click.echo("diffalign: interrupted", err=True)
            ctx.exit(130)
        except Exception as e:
            if type(e).__name__ == "Interrupted":  # from the loop, which is not imported here
                click.echo(f"diffalign: {e}; go on with resume_from=latest", err=True)
                ctx.exit(130)
            if ctx.params.get("debug") or isinstance(e, click.exceptions.ClickException | click.exceptions.Exit):
                raise
            click.echo(f"diffalign: {type(e).__name__}: {' '.join(str(e).split())} (--debug shows where)", err=True)
            ctx.exit(1)


def shard_of(text: str | None) -> tuple[int, int]:
    """(rank, world) of ``i/n``, or of this process in an accelerate or torchrun launch."""
    match = re.fullmatch(r"(\d+)/(\d+)", text or "{}/{}".format(*launched()))
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text}: expected i/n with i below n", hint="--shard 0/4")
    return int(match[1]), int(match[2])


def launched() -> tuple[int, int]:
    """(rank, world) of an accelerate or torchrun launch; (0, 1) outside of one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
