"""Measure the exact judge: on clean and damaged renders, its speed, and its agreement with the second judge.

python benchmarks/judge.py [--images FOLDER_OF_A_PAIRS_DATASET]

The judges are compared on pictures of the base, sampled as the main job is evaluated, unless a folder is named.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage

from diffalign.shapes import draw, judge, sample_scenes
from diffalign.shapes.second import second_judge


def rates(images: np.ndarray, scenes: list) -> tuple[float, float, float]:
    verdicts = [v for i in range(0, len(scenes), 250) for v in judge(images[i : i + 250], scenes[i : i + 250])]
    facts = [f for v in verdicts for f in v.facts.values()]
    return (
        float(np.mean(facts)),
        float(np.mean([v.exact for v in verdicts])),
        float(np.mean([v.cleanliness for v in verdicts])),
    )


def judged(part: tuple[np.ndarray, list]) -> int:
    return len(judge(*part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a dataset folder whose generated images both judges look at")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    scenes = sample_scenes(5000, "test", rng)
    images = draw(scenes, rng)
    few, some = images[:1000], scenes[:1000]
    print("| judge's input | facts | exact | clean |\n|---|---|---|---|")
    rows = {"5000 clean renders": (images, scenes)}
    for sd in (0.05, 0.10, 0.15, 0.20, 0.30):
        rows[f"noise of sd {sd:.2f}"] = (np.clip(few + rng.normal(0, 255 * sd, few.shape), 0, 255).astype(np.uint8), some)
    for k in (3, 5):
        rows[f"box blur of {k} px"] = (ndimage.uniform_filter(few, (0, k, k, 0)), some)
    rows["prompts shuffled"] = (few[rng.permutation(1000)], some)
    rows["uniform noise"] = (rng.integers(0, 256, few.shape, np.uint8), some)
    for name, given in rows.items():
        print("| {} | {:.4f} | {:.4f} | {:.3f} |".format(name, *rates(*given)))

    cores = min(2, os.cpu_count() or 1)
    parts = [(images[i : i + 250], scenes[i : i + 250]) for i in range(0, 5000, 250)]
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(judged, parts[:cores]))  # imports are not counted
        began = time.perf_counter()
        count = sum(pool.map(judged, parts))
        print(f"\n{count / (time.perf_counter() - began):.0f} images/s on {cores} cores")

    generated, prompts = from_dataset(args.images, 1000) if args.images else from_base(1000)
    first, second = judge(generated, prompts), second_judge(generated, prompts)
    agree = [(k.rstrip("01"), a.facts[k] == b[k]) for a, b in zip(first, second, strict=True) for k in b]
    print(f"\nagreement of the two judges on {len(prompts)} generated images: {np.mean([x for _, x in agree]):.4f} of facts")
    for kind in dict.fromkeys(k for k, _ in agree):
        print(f"  {kind}: {np.mean([x for k, x in agree if k == kind]):.4f}")


def from_base(count: int) -> tuple[np.ndarray, list[str]]:
    from diffalign.building import build_model
    from diffalign.catalogue import shipped_configs
    from diffalign.evaluation import prompts_of
    from diffalign.models import ModelSpec
    from diffalign.recipes import TrainConfig
    from diffalign.sampling import generate
    from diffalign.spec import load

    settings = load(TrainConfig, shipped_configs()["shapes-dpo"]).evaluate.sampling
    prompts = prompts_of("shapes:test", count, seed=100)
    images = generate(build_model(ModelSpec(path="shapes-unet")), prompts, settings, seed=100)[:, 0]
    return images.permute(0, 2, 3, 1).numpy(), [p.text for p in prompts]


def from_dataset(folder: Path, limit: int) -> tuple[np.ndarray, list[str]]:
    from diffalign.data.images import decode
    from diffalign.data.tables import read_table

    table = read_table(folder, "images", ["image", "prompt"]).slice(0, limit)
    images = [np.asarray(decode(im["bytes"], str(i))) for i, im in enumerate(table["image"].to_pylist())]
    return np.stack(images), table["prompt"].to_pylist()


if __name__ == "__main__":
    main()
