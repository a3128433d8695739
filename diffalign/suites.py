"""Evaluation suites, from ``NAME:PATH`` to their numbers: which picture answers which prompt, and whose mean is published."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.scores import Scored
from diffalign.data.suites import SUITES, Suite, read_suite
from diffalign.errors import DataError
from diffalign.hub import resolve_data
from diffalign.tally import columns_of


def open_suite(spec: str) -> Suite:
    """The suite of ``NAME:PATH``; the path is a file, a folder or a hub dataset id.

    Raises:
        DataError: no such suite, or none at that path.
    """
    name, _, path = spec.partition(":")
    if name in SUITES and not path:
        raise DataError(
            f"the prompts of {name} are not shipped", hint=f"write {name}:PATH, with the file or folder that is published"
        )
    if name not in SUITES:
        raise DataError(f"{spec!r} is no suite", hint=f"write NAME:PATH with one of {', '.join(SUITES)}")
    return read_suite(name, resolve_data(path, SUITES[name].files))


def suite_report(suite: Suite, rows: Sequence[Scored]) -> dict[str, Any]:
    """The suite's numbers for each scorer: overall, by category, and what is missing of the published protocol.

    A prompt without a picture or a value is counted, never taken as 0.
    """
    find = suite.finder()
    answered: dict[str, list[Scored]] = defaultdict(list)
    strangers = 0
    for row in rows:
        task = find(row.image_id, row.prompt)
        if task is None:
            strangers += 1
        else:
            answered[task.id].append(row)
    return {
        "suite": suite.name, "prompts": len(suite.tasks), "pictures": len(rows) - strangers, "strangers": strangers,
        "without_picture": sum(t.id not in answered for t in suite.tasks),
        "per_prompt": suite.format.per_prompt,
        "other_count": sum(len(found) != suite.format.per_prompt for found in answered.values()),
        "overall_is": f"mean of {suite.format.overall}",
        "scorers": {name: found for name in columns_of(rows) if (found := _numbers(suite, answered, name))},
    }  # fmt: skip


def _numbers(suite: Suite, answered: dict[str, list[Scored]], name: str) -> dict[str, Any] | None:
    form = suite.format
    by_task = {
        t.id: [form.scale * v for r in answered.get(t.id, ()) if (v := r.values.get(name)) is not None] for t in suite.tasks
    }
    known = [t for t in suite.tasks if by_task[t.id]]
    if not known:
        return None
    categories: dict[str, list[float]] = defaultdict(list)
    for t in known:
        values = by_task[t.id]
        categories[t.category or ""] += values if form.overall != "prompts" else [statistics.fmean(values)]
    means = {c: statistics.fmean(v) for c, v in sorted(categories.items())}
    everything = [v for values in categories.values() for v in values]
    out: dict[str, Any] = {
        "overall": statistics.fmean(means.values() if form.overall == "categories" else everything),
        "without_value": len(suite.tasks) - len(known),
    }
    if set(means) != {""}:
        out["categories"] = means
    if form.blocks:
        out["block_deviation"] = {c: _deviation(v, form.blocks) for c, v in sorted(categories.items())}
    return out


def _deviation(values: Sequence[float], size: int) -> float | None:
    """Of the means of whole blocks, with N; None of less than two."""
    blocks = [statistics.fmean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
    return statistics.pstdev(blocks) if len(blocks) > 1 else None


def suite_lines(said: dict[str, Any]) -> list[str]:
    """The report for people."""
    out = [f"{said['suite']}: {said['pictures']} pictures of {said['prompts']} prompts, {said['overall_is']}"]
    gaps = [
        f"{said[key]} {what}"
        for key, what in (
            ("without_picture", "prompts without a picture"),
            ("other_count", f"prompts with another number of pictures than {said['per_prompt']}"),
            ("strangers", "pictures of no prompt of the suite"),
        )
        if said[key]
    ]
    if gaps:
        out.append(f"  not the published protocol: {', '.join(gaps)}")
    for name, s in said["scorers"].items():
        lacking = f", {s['without_value']} prompts without a value" if s["without_value"] else ""
        out.append(f"  {name}: {s['overall']:.4f}{lacking}")
        for category, mean in s.get("categories", {}).items():
            spread = s.get("block_deviation", {}).get(category)
            out.append(f"    {category}: {mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    return out


def suite_prompts(spec: str) -> list[str]:
    """Distinct prompts, in order."""
    return list(dict.fromkeys(t.prompt for t in open_suite(spec).tasks))


def is_suite(source: str | Path) -> bool:
    """Whether a source of prompts begins with the name of a suite, as NAME:PATH does."""
    return str(source).partition(":")[0] in SUITES
