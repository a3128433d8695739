"""``diffalign compare A B``: two scored folders, picture by picture of the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.scores import Scored, read_scored
from diffalign.errors import DataError
from diffalign.scorers.inception import NAME as INCEPTION
from diffalign.scorers.inception import Inception
from diffalign.scoring import device
from diffalign.spread import distances, distances_line, diversity, diversity_line, embed
from diffalign.stats import bootstrap_mean
from diffalign.tally import columns_of

Pair = tuple[Scored, Scored]


def compare(a: Path, b: Path, examples: int = 3, inception: Path | None = None) -> dict[str, Any]:
    """Win rate of B over A (ties one half) and mean difference B - A per scorer, with intervals clustered by prompt.

    Pictures are paired by prompt and number ``k``; where tables have no ``k``, by their order within the prompt. A picture
    without a value on either side is left out and counted, never taken as lost. ``inception`` are torch-fidelity's weights:
    its features are then kept beside the embeddings, and distances are told by them too.

    Raises:
        DataError: the folders share no prompt, or no scorer of the same version.
    """
    left, right = read_scored(a), read_scored(b)
    if inception is not None:
        look = Inception(inception, device())
        for folder in (a, b):
            embed(folder, look, INCEPTION)
    pairs = _paired(left, right)
    if not pairs:
        raise DataError(f"{a} and {b} share no prompt", hint="score pictures of the same prompts")
    names = [n for n in columns_of(left) if n in set(columns_of(right))]
    known = {n: [p for p in pairs if all(s.values.get(n) is not None for s in p)] for n in names}
    scorers = {n: _measured(n, found, len(pairs), examples) for n, found in known.items() if found}
    if not scorers:
        raise DataError(f"{a} and {b} share no scorer", hint="score both with the same scorer and weights")
    return {
        "a": str(a),
        "b": str(b),
        "pairs": len(pairs),
        "unpaired": len(left) + len(right) - 2 * len(pairs),
        "scorers": scorers,
        "distances": distances(a, b, left, right),
        "diversity": {"a": diversity(a, left), "b": diversity(b, right)},
    }


def _paired(left: Sequence[Scored], right: Sequence[Scored]) -> list[Pair]:
    a, b = _keyed(left), _keyed(right)
    return [(a[key], b[key]) for key in a if key in b]


def _keyed(rows: Sequence[Scored]) -> dict[tuple[str, int], Scored]:
    groups: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        if row.prompt is not None:
            groups[row.prompt].append(row)
    out = {}
    for prompt, group in groups.items():
        numbers = [row.k for row in group]
        told = None not in numbers and len(set(numbers)) == len(numbers)
        for place, row in enumerate(group):
            out[prompt, row.k if told and row.k is not None else place] = row
    return out


def _measured(name: str, pairs: Sequence[Pair], total: int, examples: int) -> dict[str, Any]:
    ordered = sorted(pairs, key=lambda p: _gap(name, p), reverse=True)
    categories: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if category := pair[0].category or pair[1].category:
            categories[category].append(pair)
    return {
        **_estimates(name, pairs),
        "missing": total - len(pairs),
        "categories": {c: _estimates(name, found) for c, found in sorted(categories.items())},
        "best": [_example(name, p) for p in ordered[:examples] if _gap(name, p) > 0],
        "worst": [_example(name, p) for p in ordered[: -examples - 1 : -1] if _gap(name, p) < 0],
    }


def _estimates(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    groups: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        groups[str(pair[0].prompt)].append(_gap(name, pair))
    gaps = [torch.tensor(g, dtype=torch.float64) for g in groups.values()]
    win = asdict(_clustered([(g > 0).double() + 0.5 * (g == 0).double() for g in gaps]))
    return {
        "win_rate": win, "difference": asdict(_clustered(gaps)), "pairs": len(pairs), "prompts": len(groups),
        "ties": sum(int((g == 0).sum()) for g in gaps),
    }  # fmt: skip


def _clustered(groups: Sequence[Tensor]) -> Any:
    """Each prompt counts once, whatever the number of its pictures, and is drawn whole."""
    return bootstrap_mean(torch.stack([g.mean() for g in groups])[None])


def _gap(name: str, pair: Pair) -> float:
    a, b = pair[0].values[name], pair[1].values[name]
    assert a is not None
    assert b is not None
    return b - a


def _example(name: str, pair: Pair) -> dict[str, Any]:
    a, b = pair
    return {"prompt": a.prompt, "a": a.image_id, "b": b.image_id, "value_a": a.values[name], "value_b": b.values[name]}


def compare_lines(said: dict[str, Any]) -> list[str]:
    """The comparison for people."""
    out = [
        f"B = {said['b']} against A = {said['a']}: {said['pairs']} pairs" + _left(said["unpaired"], "pictures without partner")
    ]
    for name, s in said["scorers"].items():
        out.append(f"{name}: {_line(s)}{_left(s['missing'], 'pairs without both values')}")
        out += [f"  {category}: {_line(c)}" for category, c in s["categories"].items()]
        for which in ("best", "worst"):
            out += [f"  {which}: {_said(e)}" for e in s[which]]
    for encoder, d in said["distances"].items():
        out.append(distances_line(encoder, d))
        for side in "ab":
            out += [f"  {side.upper()}: {diversity_line(v)}" for e, v in said["diversity"][side].items() if e == encoder]
    return out


def _line(s: dict[str, Any]) -> str:
    w, d = s["win_rate"], s["difference"]
    return (
        f"win rate {w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}], difference {d['value']:+.4g} [{d['low']:+.4g},"
        f" {d['high']:+.4g}], {s['prompts']} prompts"
    )


def _said(example: dict[str, Any]) -> str:
    a, b = example["value_a"], example["value_b"]
    return f"{b - a:+.4g} ({a:.4g} to {b:.4g}) {example['prompt']!r}, {example['b']}"


def _left(count: int, what: str) -> str:
    return f", {count} {what}" if count else ""
