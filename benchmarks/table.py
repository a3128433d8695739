"""The tables of ``leaderboard.py``: each row paired with its world's base at the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffalign import stats

VERSUS = [
    *(("dpo-lora", x) for x in ("sft-winners", "dpo-shuffled", "mapo-lora", "dpo-clip", "dpo-full")),
    ("dpo-more", "dpo-lora"),
    ("dpo-rounds", "dpo-lora"),
    ("dpo-guided", "sft-guided"),
    ("dpo-rounds-at-4", "base-guided"),
]
KINDS = ("colour", "shape", "count", "relation", "background")
HEAD = """# Leaderboard

Worlds of 32 px and models of 3 to 4 million parameters: they say which method works and why, and do not predict beta, \
learning rate or rank for large models.

{prompts} test prompts x {per_prompt} seeds, paired with the base at the same seeds; intervals are a bootstrap over prompts \
crossed with training seeds. Settings were chosen on the select split; `trials` counts how many were tried. Drift: how much \
the denoising error on held-out winners and losers rose. Passes: forwards of one image through the denoiser, a backward \
counted twice, policy and reference, and of `online-` rows the sampling while they train; that of stored pairs is not in it. \
Printed by `python benchmarks/leaderboard.py table`."""


def table(results: Path, rows: Mapping[str, str], seeds: Mapping[str, Sequence[int | None]]) -> str:
    """The rows of one world, by name and what they are, paired with its base; ``None`` is the seed of what is not trained."""
    base = json.loads((results / "base.json").read_text())
    tried = results / "trials.jsonl"
    trials = [json.loads(x)["row"] for x in tried.read_text().splitlines()] if tried.exists() else []
    top, low = base["ceiling"]["exact"], mean(base["values"]["exact"])
    lines = [
        "| row | | seeds | exact | gain in exact, 95 % | each seed | gap closed | facts | clean | size | diversity"
        " | drift w | drift l | passes | s | trials |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = [f"| row | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    gains: dict[str, torch.Tensor] = {}
    for name, what in rows.items():
        files = [results / (f"{name}.json" if s is None else f"{name}-{s}.json") for s in seeds[name]]
        runs = [json.loads(f.read_text()) for f in files if f.exists()]
        if not runs:
            continue
        for run in runs:
            if any(run["hashes"][k] != base["hashes"][k] for k in ("assets", "prompts", "evaluation")):
                raise SystemExit(f"{name}: its hashes differ from the base's; delete its results and run it again")
        exact = torch.tensor([r["values"]["exact"] for r in runs])
        gain = exact - torch.tensor(base["values"]["exact"])
        gains[name] = gain
        e = stats.bootstrap_mean(gain)
        others = [f"{mean([mean(r['values'][k]) for r in runs]):.3f}" for k in ("score", "cleanliness", "taste_size")]
        figures = {"drift/winner": "+.4f", "drift/loser": "+.4f", "denoiser_passes": ".0f", "train_seconds": ".0f"}
        cost = [f"{mean([r[k] for r in runs]):{form}}" if runs[0].get(k) is not None else "" for k, form in figures.items()]
        shown = "" if name == "base" else f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
        each = "" if seeds[name] == (None,) else ", ".join(f"{g:+.3f}" for g in gain.mean(1).tolist())
        closed = "" if name == "base" else f"{100 * e.value / (top - low):.1f} %"
        diverse = f"{mean([r['diversity'] for r in runs]):.3f}"
        cells = [
            name,
            what,
            str(len(runs)),
            f"{exact.mean():.3f}",
            shown,
            each,
            closed,
            *others,
            diverse,
            *cost,
            str(trials.count(name)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        held = [f"{mean([mean(r['values'][k]) for r in runs]):.3f}" for k in KINDS]
        kinds.append(f"| {' | '.join([name, *held])} |")
    out = ["\n".join(lines), "How often each kind of fact holds:", "\n".join(kinds)]
    out += [f"Ceiling (perfect drawings through the base's autoencoder): exact {top:.3f}."]
    if taste := [
        json.loads(f.read_text()) for s in seeds.get("dpo-taste", ()) if (f := results / f"dpo-taste-{s}.json").exists()
    ]:
        moved = torch.tensor([r["values"]["taste_size"] for r in taste]) - torch.tensor(base["values"]["taste_size"])
        e = stats.bootstrap_mean(moved)
        out.append(
            f"A taste for size moves the drawn area from {mean(base['values']['taste_size']):.3f} by {e.value:+.3f}"
            f" [{e.low:+.3f}, {e.high:+.3f}] and makes it larger for {100 * (moved > 0).float().mean():.0f} % of prompts."
        )
    for one, other in VERSUS:
        if one in gains and other in gains and gains[other].shape[0] in (1, gains[one].shape[0]):
            e = stats.bootstrap_mean(gains[one] - gains[other])
            out.append(f"{one} over {other}: {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}] in exact.")
    return "\n\n".join(out)


def labelled(results: Path, rows: Mapping[str, str], seeds: Sequence[int]) -> str:
    """DPO by who labelled its pairs, from the same results; empty where fewer than two of ``rows`` were run."""
    base = torch.tensor(json.loads((results / "base.json").read_text())["values"]["exact"])
    lines = ["| row | labels by | seeds | exact | gain over the base, 95 % |", "|---|---|---|---|---|"]
    for name, who in rows.items():
        files = [f for s in seeds if (f := results / f"{name}-{s}.json").exists()]
        if not files:
            continue
        exact = torch.tensor([json.loads(f.read_text())["values"]["exact"] for f in files])
        e = stats.bootstrap_mean(exact - base)
        shown = f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
        lines.append(f"| {name} | {who} | {len(files)} | {exact.mean():.3f} | {shown} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
