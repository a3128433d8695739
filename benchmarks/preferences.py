"""What K, the margin and the noise of the scorer do to pairs that the learned CLIP labels, and to the model trained on them.

    python benchmarks/preferences.py run          # resumable; one row after the other
    python benchmarks/preferences.py table

The same images, prompts, training budget and evaluation for all rows; the judge labels nothing, it only measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = [(8, 0.0, 0.0), (2, 0.0, 0.0), (4, 0.0, 0.0), (8, 1.0, 0.0), (8, 2.0, 0.0), (8, 0.0, 1.0), (8, 0.0, 2.0), (8, 2.0, 2.0)]
"""(K, least margin, noise), margin and noise in deviations of the learned score within prompts."""
FULL = {"prompts": 1500, "steps": 400, "evaluated": 512, "sampling": 10, "batch": 100}
SHORT = {"prompts": 12, "steps": 2, "evaluated": 4, "sampling": 2, "batch": 32}


def images(work: Path, size: dict[str, int]) -> Path:
    """Eight images a prompt, with the learned score, noisy copies of it, and the judge's."""
    from diffalign.cells import ScoreConfig, score
    from diffalign.data.grouped import read_images, within_std
    from diffalign.data.tables import write_shard
    from diffalign.generation import GenerateConfig, generate_dataset
    from diffalign.spec import validate

    folder = work / "images"
    sampling = {"num_inference_steps": size["sampling"], "batch_size": size["batch"]}
    made = {"prompts": "shapes:train", "num_prompts": size["prompts"], "images_per_prompt": 8, "sampling": sampling}
    generate_dataset(validate(GenerateConfig, {**made, "output_dir": str(folder)}))
    score(
        ScoreConfig(
            path=str(folder), scorers=["clip:shapes-clip", "shapes"], output_dir=str(folder), gallery=0, embeddings=False
        )
    )
    found = read_images([folder])
    clip, rows = found.value("clip"), list[dict[str, Any]]()
    std = within_std(clip, found.prompt)
    for noise in sorted({n for _, _, n in ROWS if n}):
        for i, digest in enumerate(found.table["sha256"].to_pylist()):
            seed = int(hashlib.sha256(f"{digest}|{noise}".encode()).hexdigest()[:8], 16)
            value = clip[i] + noise * std * np.random.default_rng(seed).normal()
            said = hashlib.sha256(found.prompts[found.prompt[i]].encode()).hexdigest()
            rows.append({
                "image_sha256": digest, "prompt_sha256": said, "scorer": f"clip-noise-{noise:g}", "version": "1",
                "preprocess_version": "1", "value": float(value),
            })  # fmt: skip
    write_shard(folder, "scores", 0, rows)
    return folder


def pairs(folder: Path, work: Path, k: int, margin: float, noise: float) -> tuple[Path, float]:
    """The dataset of a row, and how often the judge's score agrees with its labels (ties one half)."""
    import pyarrow.compute as pc

    from diffalign.curation import rewrite
    from diffalign.data.grouped import read_images
    from diffalign.data.tables import read_table
    from diffalign.selection import SelectConfig, select
    from diffalign.spec import validate

    some = work / f"images-{k}"

    def first(table: str, _: int, rows: Any) -> Any:
        return rows.filter(pc.less(rows["k"], k)) if table == "images" else rows

    rewrite([folder], some, {"k": k}, first, tables=("images", "scores"))
    out = work / f"pairs-{k}-{margin:g}-{noise:g}"
    name = f"clip-noise-{noise:g}" if noise else "clip"
    more: dict[str, Any] = {"reward": {name: 1.0}, "units": "std", "rule": {"type": "best_worst", "min_margin": margin}}
    select(validate(SelectConfig, {"path": str(some), "output_dir": str(out), **more}))
    found = read_images([some])
    judged = dict(zip(found.table["image_id"].to_pylist(), found.value("shapes/score").tolist(), strict=True))
    table = read_table(out, "pairs", ["chosen_id", "rejected_id"])
    gaps = [
        judged[a] - judged[b] for a, b in zip(table["chosen_id"].to_pylist(), table["rejected_id"].to_pylist(), strict=True)
    ]
    return out, float(np.mean([(g > 0) + (g == 0) / 2 for g in gaps]))


def run(work: Path, results: Path, size: dict[str, int], only: int | None) -> None:
    """Labels of all rows first, then one training after the other."""
    from diffalign.data.files import write_json
    from diffalign.data.tables import read_table
    from diffalign.recipes import TrainConfig, train
    from diffalign.spec import load

    rows = {results / f"preferences-{k}-{m:g}-{n:g}.json": (k, m, n) for k, m, n in ROWS[:only]}
    folder = images(work, size) if any(not p.exists() or "exact" not in json.loads(p.read_text()) for p in rows) else work
    for path, (k, margin, noise) in rows.items():
        if not path.exists():
            data, agrees = pairs(folder, work, k, margin, noise)
            count = len(read_table(data, "pairs", ["pair_id"]))
            write_json(path, {"k": k, "margin": margin, "noise": noise, "pairs": count, "agrees": agrees, **size})
            print(path.name, flush=True)
    for path, (k, margin, noise) in rows.items():
        row = json.loads(path.read_text())
        if "exact" in row:
            continue
        data, _ = pairs(folder, work, k, margin, noise)
        words = [f"data.path={data}", f"train.max_steps={size['steps']}", f"evaluate.num_prompts={size['evaluated']}"]
        words += [f"evaluate.sampling.num_inference_steps={size['sampling']}", f"evaluate.sampling.batch_size={size['batch']}"]
        words += [f"train.per_device_train_batch_size={min(32, size['prompts'] // 2)}", "resume_from=auto"]
        words += [f"output_dir={work / f'run-{k}-{margin:g}-{noise:g}'}"]
        m = train(load(TrainConfig, ROOT / "configs" / "shapes-dpo.yaml", words)).metrics
        gains = {"base": m["base"]["exact"], "exact": m["difference"]["exact"], "facts": m["difference"]["score"]}
        write_json(path, row | gains)
        print(f"{path.name}: trained", flush=True)


def table(results: Path) -> str:
    """The rows that are there, in the order of ROWS."""
    names = ("K", "least margin", "noise", "pairs", "judge agrees", "gain in exact, 95 %", "gain in facts, 95 %")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for k, margin, noise in ROWS:
        path = results / f"preferences-{k}-{margin:g}-{noise:g}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        known = [r[n] for n in ("exact", "facts")] if "exact" in r else []
        gains = [f"{g['value']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]" for g in known] or ["not run yet"] * 2
        lines.append(f"| {k} | {margin:g} | {noise:g} | {r['pairs']} | {r['agrees']:.3f} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "preferences")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, help="Only the first rows.")
    parser.add_argument("--short", action="store_true", help="A few prompts and steps: shows that it runs, and nothing else.")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.what == "run":
        run(args.work, args.results, SHORT if args.short else FULL, args.rows)
    print(table(args.results))


if __name__ == "__main__":
    main()
