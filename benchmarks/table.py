"""The tables of ``leaderboard.py``: each row paired with its world's base at the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from diffalign import stats

AGAINST = ("sft-winners", "dpo-lora")
"""What every trained row is compared with."""
VERSUS = [
    ("robust-flipped", "dpo-flipped"), ("dpo-guided", "sft-guided"), ("dpo-rounds-at-4", "base-guided"),
    ("mixgrpo", "grpo"), ("nft", "grpo"), ("online-dpo", "grpo"),
]  # fmt: skip
KINDS = ("colour", "shape", "count", "relation", "background")
HEAD = """# Leaderboard

Worlds of 32 px and models of 3 to 4 million parameters: they say which method works and why, and do not predict beta, \
learning rate or rank for large models.

{prompts} test prompts x {per_prompt} seeds, paired with the base at the same seeds; intervals are a bootstrap over \
prompts crossed with training seeds. Settings were chosen on the select split, and `trials` counts how many were tried \
there: two for a method of the core, the main job's and one with its own strength or rate changed; more for DPO and SFT, \
which set the main job; at 0 the main job's were taken as they are. Drift: how much the denoising error on held-out \
winners and losers rose. Passes: forwards of one image through the denoiser, a backward counted twice, policy and \
reference, and of rows that sample as they train that sampling; that of stored pairs is not in it. Facts: the share that \
holds for the exact judge; second: for the second judge, which labelled nothing but `dpo-ensemble`. Printed by `python \
benchmarks/leaderboard.py table`."""

SHOWN = """## What it shows, and what it does not

It shows that most of these losses learn what the pairs say: nine surely beat SFT on the winners on the UNet and eleven \
on the flow world, where half the steps gain about half as much, and shuffled labels gain nothing. DSPO, MaPO and \
Diffusion-DRO beat SFT on neither with the best of their trials, and robust DPO on flipped labels gained no more than DPO \
on the same labels: they are shown as they are. Three things moved the result more than the choice among the losses that \
work. Where pairs come from: fresh ones, in rounds or online, gain nearly twice as much from the same loss. Who labels \
them: see the quality of labels. How strong the loss is, and its rate: several losses of regression and of \
lists were near SFT at the main job's beta and near the top at a smaller one, and DMPO and noise by inversion (SmPO, \
DDIM-Inversion PO) broke the model at its rate and learned at a lower one (`benchmarks/results/trials.jsonl`). The base at \
guidance 4, which nobody trained, stands among the best losses on stored pairs. Methods that sample as they train and are \
paid by the judge go furthest on both worlds, for two to eleven times the passes of DPO: GRPO, and MixGRPO on the \
UNet, which lose the most variety; DiffusionNFT, level with GRPO on the flow world at twice its variety and half its \
passes; online DPO. DRaFT \
of the learned CLIP, which the judge does not pay, gains about as much as online DPO on the UNet, surely more than DPO at \
fewer passes, and keeps nearly the base's variety; its rate is five times the first that was tried. On the flow world it \
gains nothing at either.

It does not show that one of these losses is better than Diffusion-DPO at the same pairs and passes: no such \
difference stands after Holm's correction with three seeds, two trials find nobody's best settings, the order is not the \
same on the two worlds (RDP, near the top of one, is surely below DPO on the other), and rows of one seed, most of them \
at settings that were not tried, are a first look. It says nothing of real pictures, of people's tastes, of larger \
models, or of what noise in the labels does to losses other than DPO and robust DPO. Passes count training and not the \
sampling of stored pairs. A gain in exact may cost variety: see diversity. No row is there for RPO, whose pictures of a \
subject the built-in world does not have; reconstructions have none either."""


@dataclass(frozen=True)
class Entry:
    """The runs of a row. ``gain`` is (runs, prompts), over the base in the share of images that are exact."""

    name: str
    what: str
    runs: list[dict[str, Any]]
    gain: torch.Tensor
    trained: bool

    @cached_property
    def estimate(self) -> stats.Estimate:
        return stats.bootstrap_mean(self.gain)

    def value(self, key: str, form: str = ".3f") -> str:
        """The mean over runs of a value that all of them have, which is one number or one a prompt; else empty."""
        found = [r["values"].get(key, r.get(key)) for r in self.runs]
        if any(x is None for x in found):
            return ""
        return f"{mean([mean(x) if isinstance(x, list) else x for x in found]):{form}}"


def entries(results: Path, rows: Mapping[str, str], seeds: Mapping[str, Sequence[int | None]]) -> list[Entry]:
    """What was run, the most exact first; ``None`` is the seed of what is not trained.

    Raises:
        SystemExit: a row was measured on other weights, prompts or sampling than the base.
    """
    base = json.loads((results / "base.json").read_text())
    found = []
    for name, what in rows.items():
        files = [results / (f"{name}.json" if s is None else f"{name}-{s}.json") for s in seeds[name]]
        runs = [json.loads(f.read_text()) for f in files if f.exists()]
        for run in runs:
            if any(run["hashes"][k] != base["hashes"][k] for k in ("assets", "prompts", "evaluation")):
                raise SystemExit(f"{name}: its hashes differ from the base's; delete its results and run it again")
        if runs:
            gain = torch.tensor([r["values"]["exact"] for r in runs]) - torch.tensor(base["values"]["exact"])
            found.append(Entry(name, what, runs, gain, seeds[name] != (None,)))
    return sorted(found, key=lambda e: -e.gain.mean().item())


def table(results: Path, found: Sequence[Entry]) -> str:
    """The rows of one world as Markdown, and what they say about each other."""
    base = json.loads((results / "base.json").read_text())
    tried = results / "trials.jsonl"
    trials = [json.loads(x)["row"] for x in tried.read_text().splitlines()] if tried.exists() else []
    top, low = base["ceiling"]["exact"], mean(base["values"]["exact"])
    head = "row | | seeds | exact | gain in exact, 95 % | each seed | gap closed | facts | second | clean | diversity"
    head += " | drift w | drift l | passes | s | trials"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    kinds = [f"| row | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for e in found:
        is_base = e.name == "base"
        gain = "" if is_base else interval(e.estimate)
        each = ", ".join(f"{g:+.3f}" for g in e.gain.mean(1).tolist()) if e.trained else ""
        closed = "" if is_base else f"{100 * e.estimate.value / (top - low):.1f} %"
        values = [e.value(k) for k in ("score", "second_score", "cleanliness", "diversity")]
        cost = [e.value(k, "+.4f") for k in ("drift/winner", "drift/loser")]
        cost += [e.value(k, ".0f") for k in ("denoiser_passes", "train_seconds")]
        cells = [e.name, e.what, str(len(e.runs)), e.value("exact"), gain, each, closed, *values, *cost]
        lines.append(f"| {' | '.join([*cells, str(trials.count(e.name))])} |")
        kinds.append(f"| {' | '.join([e.name, *(e.value(k) for k in KINDS)])} |")
    out = ["\n".join(lines), "How often each kind of fact holds:", "\n".join(kinds)]
    out += [f"Ceiling (perfect drawings through the base's autoencoder): exact {top:.3f}."]
    named = {e.name: e for e in found}
    if taste := named.get("dpo-taste"):
        moved = torch.tensor([r["values"]["taste_size"] for r in taste.runs]) - torch.tensor(base["values"]["taste_size"])
        by = interval(stats.bootstrap_mean(moved))
        larger = 100 * (moved > 0).float().mean()
        before = mean(base["values"]["taste_size"])
        out.append(
            f"A taste for size moves the drawn area from {before:.3f} by {by}, and makes it larger for"
            f" {larger:.0f} % of prompts."
        )
    if against := versus(named):
        out.append(against)
    return "\n\n".join(out)


def versus(named: Mapping[str, Entry]) -> str:
    """Trained rows against each other, p by Holm's correction over all of them; empty where nothing can be compared."""
    wanted = [(e.name, other) for e in named.values() for other in AGAINST if e.trained and e.name != other]
    wanted = [w for w in wanted if w != AGAINST] + VERSUS  # which is there the other way round
    both = [(a, b) for a, b in wanted if a in named and b in named and named[b].gain.shape[0] in (1, named[a].gain.shape[0])]
    by = [stats.bootstrap_mean(named[a].gain - named[b].gain) for a, b in both]
    sure = stats.holm([2 * NormalDist().cdf(-abs(e.value) / e.se) for e in by])
    lines = ["| row | over | in exact, 95 % | p by Holm |", "|---|---|---|---|"]
    for (a, b), e, p in zip(both, by, sure, strict=True):
        lines.append(f"| {a} | {b} | {interval(e)} | {'< 0.001' if p < 0.001 else f'{p:.3f}'} |")
    return "Rows against each other:\n\n" + "\n".join(lines) if both else ""


def figure(worlds: Mapping[str, Sequence[Entry]]) -> str:
    """The gains of each world as bars, an SVG; what is not trained is grey, one training seed is pale."""
    import io

    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "diffalign", "font.size": 9, "font.family": "DejaVu Sans"}):
        shown = {k: [e for e in v if e.name != "base"] for k, v in worlds.items()}
        heights = [len(v) + 2 for v in shown.values()]
        drawn = Figure(figsize=(7.5, 0.22 * sum(heights)), layout="constrained")
        FigureCanvasSVG(drawn)
        every = drawn.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, found) in zip(every, shown.items(), strict=True):
            for y, e in enumerate(reversed(found)):
                by = e.estimate
                colour = "#9aa0a6" if not e.trained else "#1f77b4" if len(e.runs) > 1 else "#9cc7e6"
                axes.barh(y, by.value, height=0.7, color=colour)
                axes.plot([by.low, by.high], [y, y], color="black", lw=1)
            axes.set_yticks(range(len(found)), [e.name for e in reversed(found)])
            axes.set_ylim(-0.7, len(found) - 0.3)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        said = "gain over the base in the share of test images that are exact, with 95 % intervals"
        every[-1].set_xlabel(f"{said}\ngrey: not trained; pale: one training seed")
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def labelled(results: Path, rows: Mapping[str, str], seeds: Sequence[int]) -> str:
    """DPO by who labelled its pairs, from the same results; empty where fewer than two of ``rows`` were run."""
    found = entries(results, rows, dict.fromkeys(rows, tuple(seeds)))
    if len(found) < 2:
        return ""
    lines = ["| row | labels by | seeds | exact | gain over the base, 95 % |", "|---|---|---|---|---|"]
    for e in found:
        lines.append(f"| {e.name} | {e.what} | {len(e.runs)} | {e.value('exact')} | {interval(e.estimate)} |")
    return "\n".join(lines)


def interval(e: stats.Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
