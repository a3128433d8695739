"""A million images' metadata: selected into pairs, split and validated, with the memory and the time that it takes.

    python benchmarks/pairs_scale.py

No picture is read or written. Each step is a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
K = 4


def make(folder: Path, images: int, shard: int = 50_000) -> None:
    """Rows as `generate` and `score` leave them, but for the pictures: K images a prompt, two scorers."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from diffalign.data.tables import write_shard

    rng = np.random.default_rng(0)
    for n, start in enumerate(range(0, images, shard)):
        rows, scores = [], []
        for i in range(start, min(start + shard, images)):
            prompt = f"a prompt about the thing number {i // K}, in some more words than it needs"
            digest = hashlib.sha256(str(i).encode()).hexdigest()
            said = hashlib.sha256(prompt.encode()).hexdigest()
            rows.append({
                "image_id": f"{said[:16]}-0-{i % K}", "sha256": digest, "prompt_id": said[:16], "prompt": prompt, "k": i % K,
                "seed": 0, "model": "m", "phash": digest[:16],
            })  # fmt: skip
            for scorer, value in zip(("clip", "aesthetic"), rng.normal(size=2), strict=True):
                scores.append({
                    "image_sha256": digest, "prompt_sha256": said, "scorer": scorer, "version": "1-0123456789ab",
                    "preprocess_version": "1-01234567", "value": float(value),
                })  # fmt: skip
        write_shard(folder, "images", n, rows)
        write_shard(folder, "scores", n, scores)


def measured(name: str, command: list[str]) -> dict[str, float]:
    """Seconds, and the peak of resident memory in GB, of one command."""
    code = (
        "import json, resource, sys, time; began = time.monotonic(); from diffalign.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "finally: print(json.dumps([time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    memory = json.loads(lines[-1])[1]
    print(f"{name}: {time.monotonic() - began:.1f} s, {memory:.2f} GB; {lines[0]}", flush=True)
    return {"seconds": time.monotonic() - began, "gigabytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        began = time.monotonic()
        make(folder, args.images)
        print(f"made {args.images} rows in {time.monotonic() - began:.1f} s", flush=True)
        words = [f"path={folder}", "reward={clip: 1, aesthetic: 0.5}", "units=std", "rule.type=all", "rule.min_margin=0.5"]
        words += ["max_per_image=2", "temperature=1", f"output_dir={folder}"]
        steps = {
            "select": ["pairs", *words],
            "split": ["data", "split", str(folder), str(Path(name) / "parts"), "train=0.9", "test=0.1", "--no-pictures"],
            "validate": ["data", "validate", str(folder)],
        }
        said = {step: measured(step, command) for step, command in steps.items()}
    seconds = sum(s["seconds"] for s in said.values())
    print(f"together {seconds:.0f} s, at most {max(s['gigabytes'] for s in said.values()):.2f} GB")


if __name__ == "__main__":
    main()
