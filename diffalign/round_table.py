"""What rounds leave beside their own folders: a table, and a whole run of the last one's weights and all log lines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffalign.data.files import atomic_folder, write_text
from diffalign.hub import exported
from diffalign.round_pairs import Made
from diffalign.train.tracking import read_metrics

FILE = "rounds.json"


def read_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The lines of the table that are there, by round."""
    path = folder / FILE
    return {row["round"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def row_of(number: int, folder: Path, sampled_by: int, compared_with: str | None, made: Made) -> dict[str, Any]:
    """A line of the table: what a round was trained on, what that took, and where the model stood after it."""
    metrics = json.loads((folder / "metrics.json").read_text())
    row: dict[str, Any] = {
        "round": number, "folder": folder.name, "sampled_by": sampled_by, "compared_with": compared_with,
        "images": made.images, "pairs": made.pairs, "reward": made.reward,
        **{k: metrics[k] for k in ("steps", "denoiser_passes", "train_seconds")},
    }  # fmt: skip
    held = [x for x in read_metrics(folder) if "heldout/drift/winner" in x]
    row |= {k: held[-1][f"heldout/{k}"] for k in ("drift/winner", "drift/loser") if held}
    if "aligned" in metrics:
        names = [n for n in ("score", "exact") if n in metrics["aligned"]]
        row |= {n: metrics["aligned"][n] for n in names} | {f"base_{n}": metrics["base"][n] for n in names}
        row["win_rate"] = metrics["win_rate"]
    return row


def summary(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last round measured, and what all of them cost."""
    last = json.loads((folder / rows[-1]["folder"] / "metrics.json").read_text())
    added = {k: sum(row[k] for row in rows) for k in ("steps", "denoiser_passes")}
    added["train_seconds"] = round(sum(row["train_seconds"] for row in rows), 1)
    return last | added | {"images_generated": sum(row["images"] for row in rows), "rounds": rows}


def gather(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The last round's weights and samples, and the log lines of all, so that the folder is a finished run."""
    last = folder / rows[-1]["folder"]
    samples = [f for f in (last / "samples").rglob("*") if f.is_file()]

    def fill(to: Path) -> None:
        for file in (*exported(last), *samples):
            place = to / file.relative_to(last)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another file system
                shutil.copyfile(file, place)

    atomic_folder(folder, fill)
    lines, before = [], 0
    for row in rows:
        mine = read_metrics(folder / row["folder"])
        lines += [line | {"step": line["step"] + before, "round": row["round"]} for line in mine]
        before += row["steps"]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
