"""Kill `diffalign score` at random points, again and again: no finished shard may be lost, changed or scored twice.

    python benchmarks/soak.py --kills 100 --folder soak

Prints the kills that hit a running scorer, and stops with status 1 at the first shard that is not as it was. If it was stopped
itself, the same command goes on in its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARD = 4

SCORER = """
import os, time

def slow(images, prompts):
    out = []
    for i in images:
        red, green, _ = i.getpixel((0, 0))
        out.append(float(256 * red + green))
        with open(os.environ["SCORE_LOG"], "a") as f:
            f.write(f"{out[-1]}\\n")
        time.sleep(0.01)
    return out
"""


def soak(folder: Path, kills: int, images: int, seed: int) -> int:
    """Returns how many kills hit after the first picture of their run was scored."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for i in range(images):  # the colour is the number
        if not (path := folder / "in" / f"{i:05d}.png").exists():
            Image.new("RGB", (16, 16), (i // 256, i % 256, 0)).save(path)
    (folder / "plug.py").write_text(SCORER)
    log, out, past = folder / "log", folder / "out", folder / "kills"
    log.touch()
    past.touch()
    env = {**os.environ, "SCORE_LOG": str(log), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "diffalign", "score", f"path={folder / 'in'}", "scorers=[plug:slow]", "prompt=p"]
    command += [f"output_dir={out}", f"shard_size={SHARD}", "batch_size=2", "gallery=0"]

    def scored() -> list[str]:
        return log.read_text().splitlines()

    def finished() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (out / "scores").glob("score-*.parquet")}

    def check(kept: dict[Path, bytes], start: int) -> None:
        again = {int(float(v)) // SHARD for v in scored()[start:]} & {int(p.stem.rpartition("-")[2]) for p in kept}
        changed = [p.name for p, data in kept.items() if not p.exists() or p.read_bytes() != data]
        if again or changed:
            sys.exit(f"scored again: {sorted(again)}; changed: {changed}")

    for kill in range(len(past.read_text()), kills):
        rng = random.Random(f"{seed}-{kill}")
        kept, start = finished(), len(scored())
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = start + rng.randint(0, 3 * SHARD)
        while process.poll() is None and len(scored()) <= wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        check(kept, start)
        with past.open("a") as f:
            f.write("x" if len(scored()) > start else "-")
        print(f"kill {kill + 1}: {len(finished())} shards finished", flush=True)
    kept, start = finished(), len(scored())
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    check(kept, start)
    sys.path.insert(0, str(ROOT))
    from diffalign.data.scores import read_scored

    values = {r.image_id: r.values.get("slow") for r in read_scored(out)}
    if values != {f"{i:05d}.png": float(i) for i in range(images)}:
        sys.exit("the values of the killed runs are not those of one run")
    return past.read_text().count("x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=None, help="default: enough for every kill to find work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    args = parser.parse_args()
    images = args.images or 12 * SHARD * (args.kills + 1) // 4
    with contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        hits = soak(Path(folder).resolve(), args.kills, images, args.seed)
    print(f"{args.kills} kills, {hits} of them while scoring: every finished shard stands, none was scored twice")


if __name__ == "__main__":
    main()
