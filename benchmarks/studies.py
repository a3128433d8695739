"""Studies of online training on the built-in world, a run a variant, minutes each.

    python benchmarks/studies.py run grpo        # what makes GRPO learn: the worked example, one setting changed at a time
    python benchmarks/studies.py run hacking     # a learned reward as GRPO's, as the exact judge sees it
    python benchmarks/studies.py run pushed      # the same at three times the rate
    python benchmarks/studies.py run direct      # the same reward differentiated
    python benchmarks/studies.py run hacking clip-kl --seeds 1
    python benchmarks/studies.py table           # print all and write docs/online-studies.md with its figure

A run is ``results/studies/STUDY-VARIANT-SEED.json``; what is there is not run again, an unfinished one goes on. Prompts are
of the select split: these runs choose settings, and the leaderboard measures what was chosen on test.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leaderboard import RESULTS, ROOT, WORLDS, measured, train_once, write
from rows import Row
from table import interval, mean

STUDIES = RESULTS / "studies"
UNET = WORLDS["unet"]
SECOND = "diffalign.shapes.second:second_score"
CLIP = 'online.reward={scorers: ["clip:shapes-clip"], weights: {clip: 1}}'
BOTH = f'online.reward={{scorers: ["clip:shapes-clip", "{SECOND}"], weights: {{clip: 1, second_score: 1}}}}'


@dataclass(frozen=True)
class Study:
    """Variants of one worked example: by name what is changed, and how."""

    what: str
    config: str
    overrides: tuple[str, ...]
    variants: dict[str, tuple[str, tuple[str, ...]]]
    prompts: int = 256


def rollout(**changed: str) -> str:
    """The rollout of ``configs/shapes-grpo.yaml`` with some settings replaced."""
    settings = {
        "num_inference_steps": "10", "batch_size": "64", "rule": "{type: ddim, eta: 1.0}", "same_noise": "true",
        "window": "{type: fixed, begin: 0, size: 4}",
    }  # fmt: skip
    return f"online.rollout={{{', '.join(f'{k}: {v}' for k, v in (settings | changed).items())}}}"


GRPO = Study(
    "GRPO of the judge's reward, 12 rollouts of 512 images, the worked example with one setting changed",
    "shapes-grpo.yaml",
    ("train.max_steps=48",),
    {
        "as-shipped": ("steps 1 to 4 of 10, 4 updates a rollout, rate 1e-3, clip 3e-3, no guidance, one noise a prompt", ()),
        "all-steps": ("all 10 steps trained", (rollout(window="{type: all}"),)),
        "without-last": ("the first 9 steps trained", (rollout(window="{type: fixed, begin: 0, size: 9}"),)),
        "steps-5-to-8": ("steps 5 to 8 trained", (rollout(window="{type: fixed, begin: 4, size: 4}"),)),
        "random-window": ("4 steps anywhere in the first 9", (rollout(window="{type: random, size: 4, low: 0, high: 9}"),)),
        "own-noises": ("each image its own first noise", (rollout(same_noise="false"),)),
        "guided": ("guidance 1.6 in rollouts and training, as evaluated", (rollout(guidance_scale="1.6"),)),
        "less-noise": ("eta 0.5", (rollout(rule="{type: ddim, eta: 0.5}"),)),
        "rate-quarter": ("rate 2.5e-4", ("train.learning_rate=2.5e-4",)),
        "rate-triple": ("rate 3e-3", ("train.learning_rate=3e-3",)),
        "quarter-images": ("48 rollouts of 128 images, 16 prompts of 8, in batches of 32",
                           ("online.prompts_per_rollout=16", "online.group_size=8", "train.max_steps=192",
                            "train.per_device_train_batch_size=32", rollout(batch_size="32"))),
        "one-update": ("1 update a rollout", ("online.updates=1", "train.max_steps=12", "train.warmup_steps=3")),
        "two-uses": ("every rollout used twice", ("online.inner_epochs=2", "train.max_steps=96")),
        "tight-clip": ("clip 1e-4", ("objective.clip_range=1e-4",)),
        "kl": ("KL to the base, weight 0.1", ("objective.beta=0.1",)),
        "guard": ("GRPO-Guard on the first 9 steps, clip 2e-3",
                  ("objective={type: grpo_guard, clip_range: 2e-3}", rollout(window="{type: fixed, begin: 0, size: 9}"))),
    },
)  # fmt: skip
WATCH = f'watch={{prompts: "shapes:select", num_prompts: 128, images_per_prompt: 2, scorers: [shapes, "{SECOND}"]}}'
STOP = ("train.metric_for_best=watch/second_score", "train.load_best=true")
STOPPED = "the weights that the second judge liked best"
LOOKS = ("diversity", "saturation", "colour_entropy", "edge_density", "brightness", "prediction_norm", "second_score")
SAFEGUARDS = {
    "clip": ("the learned CLIP alone", (CLIP,)),
    "clip-kl": ("with KL to the base, weight 0.1", (CLIP, "objective.beta=0.1")),
    "clip-win-rate": ("its win rate in the group in place of its value", (CLIP, "online.advantages.shaping=win_rate")),
    "clip-ensemble": ("with the second judge, each normalised in its group", (BOTH, "online.advantages.aggregate=gdpo")),
    "clip-early-stop": (f"the learned CLIP alone, {STOPPED}", (CLIP, *STOP)),
}
HACKING = Study(
    "GRPO of the learned CLIP's reward, 40 rollouts of 512 images, as the worked example has it",
    "shapes-grpo.yaml",
    ("train.eval_steps=16", WATCH),
    SAFEGUARDS,
)
PUSHED = Study(
    "The same at three times the rate, 3e-3",
    HACKING.config,
    (*HACKING.overrides, "train.learning_rate=3e-3"),
    SAFEGUARDS,
)
FAST = ("train.learning_rate=1e-3",)
DIRECT = Study(
    "DRaFT of the learned CLIP's reward, 400 steps of 32 images",
    "shapes-draft.yaml",
    ("train.max_steps=400", "train.eval_steps=40", WATCH),
    {
        "clip": ("rate 2e-4", ("train.learning_rate=2e-4",)),
        "clip-fast": ("rate 1e-3, the worked example four times as long", FAST),
        "clip-fast-early-stop": (f"rate 1e-3, {STOPPED}", (*FAST, *STOP)),
    },
)
ALL = {"grpo": GRPO, "hacking": HACKING, "pushed": PUSHED, "direct": DIRECT}


def run(study: str, variant: str, seed: int) -> dict[str, Any]:
    """Train one variant and measure it; what its rollouts and looks saw is kept."""
    from diffalign.train.tracking import read_metrics

    s = ALL[study]
    what, overrides = s.variants[variant]
    words = [*s.overrides, *overrides, f"train.seed={seed}", "evaluate.enabled=false"]
    folder, metrics = train_once(UNET, Row(what, config=s.config), words)
    lines = read_metrics(folder)
    looks = [
        {"step": x["step"], **{k: v for k, v in x.items() if k.startswith("watch/")}} for x in lines if "watch/diversity" in x
    ]
    found = measured(UNET, variant, folder, "shapes:select", s.prompts)
    plain = measured(UNET, variant, folder, "shapes:select", s.prompts, guidance=1.0)
    return {
        "study": study,
        "variant": variant,
        "seed": seed,
        "overrides": words,
        "denoiser_passes": metrics["denoiser_passes"],
        "train_seconds": round(metrics["train_seconds"], 1),
        "images": metrics["reward_calls"],
        "rollouts": [[x["step"], x["rollout/reward"]] for x in lines if "rollout/reward" in x],
        "looks": looks,
        "values": found["values"],
        "diversity": found["diversity"],
        "unguided": {k: mean(v) for k, v in plain["values"].items()},
        "hashes": found["hashes"],
    }


def base_values(prompts: int) -> dict[str, Any]:
    """The base on the same prompts, made once."""
    path = STUDIES / f"base-{prompts}.json"
    if not path.exists():
        found = measured(UNET, "base", None, "shapes:select", prompts)
        plain = measured(UNET, "base", None, "shapes:select", prompts, guidance=1.0)
        write(path, {**found, "unguided": {k: mean(v) for k, v in plain["values"].items()}})
    return json.loads(path.read_text())


def results(study: str) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by variant in the order of the study."""
    out: dict[str, list[dict[str, Any]]] = {}
    for variant in ALL[study].variants:
        if files := sorted(STUDIES.glob(f"{study}-{variant}-[0-9]*.json")):
            out[variant] = [json.loads(f.read_text()) for f in files]
    return out


# --- tables ---------------------------------------------------------------------------------------------------------


def grpo_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]) -> str:
    """What each changed setting did to the reward of rollouts and to what is drawn without noise."""
    import torch

    from diffalign import stats

    head = ("variant", "changed", "seeds", "reward of rollouts, first to last three", "exact", "gain in exact, 95 %",
            "exact without guidance", "clean", "diversity", "images", "passes", "s")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in runs.items():
        gain = torch.tensor([r["values"]["exact"] for r in found]) - torch.tensor(base["values"]["exact"])
        first = mean([mean([x for _, x in r["rollouts"][:3]]) for r in found])
        last = mean([mean([x for _, x in r["rollouts"][-3:]]) for r in found])
        cells = [name, GRPO.variants[name][0], str(len(found)), f"{first:.3f} to {last:.3f}"]
        cells += [f"{mean([mean(r['values']['exact']) for r in found]):.3f}", interval(stats.bootstrap_mean(gain))]
        cells += [f"{mean([r['unguided']['exact'] for r in found]):.3f}"]
        cells += [
            f"{mean([mean(r['values']['cleanliness']) for r in found]):.3f}",
            f"{mean([r['diversity'] for r in found]):.3f}",
        ]
        cells += [f"{mean([r[k] for r in found]):.0f}" for k in ("images", "denoiser_passes", "train_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    low = f"The base: exact {mean(base['values']['exact']):.3f}, without guidance {base['unguided']['exact']:.3f}."
    return "\n".join(lines) + "\n\n" + low


def alarms(looks: Sequence[Mapping[str, Any]], by: float = 0.1) -> dict[str, int]:
    """For each monitor the first step at which it had moved by more than this share of the first look."""
    start, out = looks[0], dict[str, int]()
    for name in LOOKS:
        key = f"watch/{name}"
        moved = [x["step"] for x in looks if key in x and abs(x[key] - start[key]) > by * abs(start[key])]
        if moved:
            out[name] = moved[0]
    return out


def hacking_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Proxy and gold at the first look, where gold was best, where the second judge was best, and at the end."""
    head = ("variant", "seed", "proxy, first to last", "exact at first", "at its best (step)",
            "at the second judge's best (step)", "at the end", "clean, first to last", "diversity, first to last",
            "moved by a tenth (step)")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, r in trainings(runs):
        looks = r["looks"]
        first, last = looks[0], looks[-1]
        gold = max(looks, key=lambda x: x["watch/exact"])
        stopped = max(looks, key=lambda x: x["watch/second_score"])
        ends = [f"{first[f'watch/{k}']:.3f} to {last[f'watch/{k}']:.3f}" for k in ("reward", "cleanliness", "diversity")]
        spoke = ", ".join(f"{k} ({step})" for k, step in alarms(looks).items())
        at = [f"{x['watch/exact']:.3f} ({x['step']})" for x in (gold, stopped)]
        cells = [name, str(r["seed"]), ends[0], f"{first['watch/exact']:.3f}", *at]
        cells += [f"{last['watch/exact']:.3f}", *ends[1:], spoke]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trainings(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Runs with their variants, without those that are another's with other weights kept: their looks are the same."""
    return [(name, r) for name, found in runs.items() for r in found if not set(STOP) <= set(r["overrides"])]


def safeguards_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]) -> str:
    """What is left at the end, over the base and over the first variant with the same seeds, drawn as evaluated."""
    import torch

    from diffalign import stats

    first = next(iter(runs))
    head = ("variant", "seeds", "exact", "over the base, 95 %", f"over {first}, 95 %", "clean", "second", "diversity", "s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    exact = {name: {r["seed"]: torch.tensor(r["values"]["exact"]) for r in found} for name, found in runs.items()}
    for name, found in runs.items():
        gain = torch.stack(list(exact[name].values())) - torch.tensor(base["values"]["exact"])
        both = [x - exact[first][seed] for seed, x in exact[name].items() if seed in exact[first]]
        cells = [name, str(len(found)), f"{mean([mean(r['values']['exact']) for r in found]):.3f}"]
        cells += [interval(stats.bootstrap_mean(gain))]
        cells += ["" if name == first or not both else interval(stats.bootstrap_mean(torch.stack(both)))]
        cells += [f"{mean([mean(r['values'][k]) for r in found]):.3f}" for k in ("cleanliness", "second_score")]
        cells += [f"{mean([r['diversity'] for r in found]):.3f}", f"{mean([r['train_seconds'] for r in found]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(studies: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Gold against proxy as training goes on, an SVG: what was paid for, what the judges see, a row of panels a study."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    titles = {
        "watch/reward": "reward, over its first",
        "watch/exact": "exact, by the judge",
        "watch/second_score": "facts, by the second judge",
    }
    colours = {name: f"C{n}" for n, name in enumerate(SAFEGUARDS)}
    with mpl.rc_context({"svg.hashsalt": "diffalign", "font.size": 9, "font.family": "DejaVu Sans"}):
        drawn = Figure(figsize=(9, 0.6 + 2.5 * len(studies)), layout="constrained")
        FigureCanvasSVG(drawn)
        panels = drawn.subplots(len(studies), len(titles), squeeze=False)
        shown = dict[str, Any]()
        for n, (which, runs) in enumerate(studies.items()):
            row = panels[n]
            row[0].set_ylabel(which, fontsize=10, fontweight="bold")
            for axes, (key, title) in zip(row, titles.items(), strict=True):
                for name, r in trainings(runs):
                    unit = r["looks"][0][key] if key == "watch/reward" else 1.0  # sums of rewards have other scales
                    points = [(x["step"], x[key] / unit) for x in r["looks"] if key in x]
                    shown[name] = axes.plot(*zip(*points, strict=True), color=colours.get(name, "C9"), lw=1.3)[0]
                if n == 0:
                    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
                if n == len(studies) - 1:
                    axes.set_xlabel("step")
                axes.grid(alpha=0.25)
                axes.spines[["top", "right"]].set_visible(False)
        drawn.legend(list(shown.values()), list(shown), frameon=False, loc="outside lower center", ncols=len(shown))
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


GRPO_SAYS = """One seed each, so differences of less than about 0.1 may be the seed's. Which steps are trained decides: \
with the last of ten among them the gain is less than a third; without it nine are worth as much as the first four, with \
GRPO-Guard's weights a little more, and cost more; late ones alone (steps-5-to-8) are worth less. How far a rollout is \
followed comes next: a quarter of the rate, one update in place of four or a clip range of 1e-4 gain less than half, \
three times the rate gains as much, and a second use of each rollout nothing more. As many images in four times as many \
rollouts do as well. Half the noise does too; a noise of each image's own in place of one a prompt does worse, by no more \
than a seed may. Guidance in rollouts and training costs twice the passes and is worth no more than training without it \
and sampling with it. A KL of 0.1 costs four tenths of the gain."""
HACKING_HEAD = """## A learned reward, as the exact judge sees it

How hard it is pushed decides, not how long. The second judge, who is not paid, was happiest at the very look at which the \
exact judge was in every run below that fell apart, so that keeping those weights (`train.metric_for_best: \
watch/second_score`, `train.load_best`) is the safeguard that needs no tuning; having it in the reward helps more, and \
then it is no monitor any more. Diversity, saturation, colours, edges and the norm of the prediction move by a tenth \
within a few looks where all is well too: they tell a price and not the turn. A limit on `drop` does not speak either, for \
it is against the first look, which the second judge fell below in none but the worst, and there at the last.

![Gold against proxy](online-studies.svg)"""
HACKING_SAYS = {
    "hacking": """At this rate the learned CLIP is a good reward: three seeds end at 0.68 to 0.80, and on the prompts of the \
looks no fall is larger than what two seeds, or two sets of prompts, differ by. The second judge beside it, each \
normalised in its group, is worth a little more, which two seeds just show; win rates are worth no more than the values. \
A KL of 0.1 holds the model back, and stopping early gains nothing where nothing is lost (one seed each).""",
    "pushed": """CLIP is paid nearly as much, 0.88 to 0.91, and exact goes from 0.31 to 0.54 and down to 0.22 and 0.16, \
below the base, with both seeds. On prompts that were not looked at, stopping where the second judge was happiest keeps \
0.57 (both seeds), a KL of 0.1 0.50, win rates 0.47, and the second judge in the reward 0.74 (one seed each), which is \
still less than at a third of the rate.""",
    "direct": """Differentiated through the last two steps it goes faster and costs hardly any variety. At five times the \
rate one of two seeds is at its best after 160 steps and then loses a seventh of that while its reward stays where it \
is; stopped there it is the best of all runs with this reward but those with the second judge. The other seed falls by \
no more than looks differ.""",
}
ROWS_OF_FIGURE = {"hacking": "GRPO, rate 1e-3", "pushed": "GRPO, rate 3e-3", "direct": "DRaFT"}
LOOKED = """Looks while training, at 256 images of 128 prompts: what was paid for, what the judge saw, and the step at \
which each monitor had moved by a tenth."""
HEAD = """# Studies of online training

On the UNet of the built-in world, on prompts of the select split, printed by `python benchmarks/studies.py table`. They \
choose settings and explain; what was chosen is measured on test in [leaderboard.md](leaderboard.md)."""


def write_tables() -> str:
    """All studies as Markdown, also written to docs/online-studies.md."""
    from diffalign.data.files import write_text

    parts, drawn = [HEAD], {}
    if found := results("grpo"):
        parts += [f"## {GRPO.what}", grpo_table(found, base_values(GRPO.prompts)), GRPO_SAYS]
    parts += [HACKING_HEAD]
    for name, says in HACKING_SAYS.items():
        study = ALL[name]
        if found := results(name):
            drawn[ROWS_OF_FIGURE[name]] = found
            what = [f"- `{variant}`: {study.variants[variant][0]}" for variant in found]
            tables = [safeguards_table(found, base_values(study.prompts)), LOOKED, hacking_table(found)]
            parts += [f"### {study.what}", "\n".join(what), *tables, says]
    write_text(ROOT / "docs" / "online-studies.svg", figure(drawn))
    text = "\n\n".join(parts)
    write_text(ROOT / "docs" / "online-studies.md", text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    go = verbs.add_parser("run")
    go.add_argument("study", choices=ALL)
    go.add_argument("variants", nargs="*")
    go.add_argument("--seeds", type=int, nargs="*", default=[0])
    go.add_argument("--minutes", type=float, default=0, help="start no further run after this long; 0 never stops")
    verbs.add_parser("table")
    args = parser.parse_args()
    if args.verb == "table":
        print(write_tables())
        return
    known = ALL[args.study].variants
    if unknown := [v for v in args.variants if v not in known]:
        parser.error(f"unknown variant {unknown[0]}; {args.study} has {', '.join(known)}")
    STUDIES.mkdir(parents=True, exist_ok=True)
    base_values(ALL[args.study].prompts)
    began = time.monotonic()
    for variant in args.variants or known:
        for seed in args.seeds:
            path = STUDIES / f"{args.study}-{variant}-{seed}.json"
            if path.exists():
                continue
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                print("time is up; run again to go on", file=sys.stderr)
                return
            print(f"== {path.stem}", file=sys.stderr)
            write(path, run(args.study, variant, seed))


if __name__ == "__main__":
    main()
