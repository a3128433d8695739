"""What the scores table says: counts, copies, tables for other programs."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.duplicates import groups, near
from diffalign.data.files import atomic
from diffalign.data.scores import Scored


def columns_of(rows: Sequence[Scored]) -> list[str]:
    """Names of all measured values, in the order in which they first appear; those with no value anywhere come last.

    A scorer of several values, ``scorer/value``, has failures alone under its own name, which is no column then.
    """
    names = dict.fromkeys(n for r in rows for n, v in r.values.items() if v is not None)
    several = {n.partition("/")[0] for n in names if "/" in n}
    return list(names | dict.fromkeys(n for r in rows for n in r.values if n not in several))


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """Counts of pictures, values, failures by reason, blanks and copies; mean and deviation of each scorer."""
    scorers = {}
    for name in columns_of(rows):
        values = [v for r in rows if (v := r.values.get(name)) is not None]
        mean = math.fsum(values) / len(values) if values else None
        scorers[name] = {
            "values": len(values),
            "missing": sum(name in r.errors or name.partition("/")[0] in r.errors for r in rows),
            "truncated": sum(name in r.truncated for r in rows),
            "mean": mean,
            "std": math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if mean is not None else None,
        }
    looks = {r.image_id: r.phash for r in rows if r.phash not in (None, "blank")}
    exact = groups({r.image_id: r.sha256 for r in rows})
    copies = {frozenset(g) for g in exact}
    return {
        "images": len(rows),
        "unreadable": sum(r.error is not None for r in rows),
        "scorers": scorers,
        "reasons": dict(Counter(e for r in rows for e in set(r.errors.values())).most_common(10)),
        "blank": [r.image_id for r in rows if r.phash == "blank"],
        "duplicates": exact,
        "near_duplicates": [g for g in near(looks) if frozenset(g) not in copies],  # type: ignore[arg-type]
    }


def summary_lines(said: dict[str, Any]) -> list[str]:
    """The summary for people."""
    out = []
    for name, s in said["scorers"].items():
        numbers = "no value" if s["mean"] is None else f"mean {s['mean']:.4f}, deviation {s['std']:.4f}, {s['values']} values"
        missing = f", {s['missing']} missing" if s["missing"] else ""
        out.append(f"{name}: {numbers}{missing}" + (f", {s['truncated']} with cut prompts" if s["truncated"] else ""))
    if said["unreadable"]:
        out.append(f"{said['unreadable']} of {said['images']} pictures could not be read")
    out += [f"  {count} x {reason}" for reason, count in said["reasons"].items()]
    if said["blank"]:
        out.append(f"{len(said['blank'])} blank pictures: {_some(said['blank'])}")
    for key, what in (("duplicates", "the same bytes"), ("near_duplicates", "nearly the same look")):
        if said[key]:
            groups = "1 group" if len(said[key]) == 1 else f"{len(said[key])} groups"
            out.append(f"{groups} of {what}: {_some([' = '.join(g[:3]) for g in said[key]])}")
    return out


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def export(rows: Sequence[Scored], folder: Path, kind: str) -> Path:
    """``scores.csv`` or ``scores.jsonl``: one line a picture, one column a scorer, empty or null where there is no value."""
    names = columns_of(rows)

    def line(r: Scored) -> dict[str, Any]:
        said = {"image_id": r.image_id, "path": r.path, "prompt": r.prompt, "category": r.category, "sha256": r.sha256}
        errors = "; ".join(dict.fromkeys(r.errors.values())) or None
        return {**said, **{n: r.values.get(n) for n in names}, "error": errors}

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as f:
            if kind == "csv":
                writer = csv.DictWriter(f, [*line(rows[0])])
                writer.writeheader()
                writer.writerows(map(line, rows))
            else:
                f.writelines(json.dumps(line(r), ensure_ascii=False, allow_nan=False) + "\n" for r in rows)

    return atomic(folder / f"scores.{kind}", write)
