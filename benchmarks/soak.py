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
import signal
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


def prepare(what: str, folder: Path, kills: int, processes: int) -> tuple[list[str], str, int]:
    """(words of the command without its output, table, shards): so many shards that every kill finds work."""
    shards = 2 * processes * kills + 2
    if what == "generate":
        words = ["generate", "prompts=shapes:train", f"num_prompts={2 * shards}", "shard_size=2", "sampling.batch_size=2"]
        return [*words, "sampling.num_inference_steps=2"], "images", shards
    import hashlib

    from diffalign.data.tables import write_shard

    rows, scores = [], []
    for i in range(4 * shards):
        prompt, digest = f"prompt {i // 4}", hashlib.sha256(str(i).encode()).hexdigest()
        rows.append({"image_id": str(i), "sha256": digest, "prompt_id": prompt, "prompt": prompt})
        said = {"image_sha256": digest, "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "scorer": "s"}
        scores.append({**said, "version": "1", "preprocess_version": "1", "value": float(i * 7919 % 101)})
    write_shard(folder / "in", "images", 0, [{**r, "image": {"bytes": r["sha256"].encode(), "path": None}} for r in rows])
    write_shard(folder / "in", "scores", 0, scores)
    words = ["pairs", f"path={folder / 'in'}", "reward.s=1", "rule.type=all", "bins=3", "lists=true", "shard_size=1"]
    return words, "pairs", shards


def soak_shards(what: str, folder: Path, kills: int, processes: int, seed: int) -> int:
    """Returns how many kills hit after a shard of their run was finished."""
    rng = random.Random(seed)
    words, table, shards = prepare(what, folder, kills, processes)
    out, whole = folder / "out", folder / "whole"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    alone = [sys.executable, "-m", "diffalign"]
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "diffalign"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    subprocess.run([*alone, *words, f"output_dir={whole}"], check=True, **quiet)
    command = [*(several if processes > 1 else alone), *words, f"output_dir={out}"]

    def files(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".tmp"}

    def finished() -> int:
        return len(list((out / table).glob("*.parquet")))

    hits, kept = 0, dict[str, bytes]()
    for kill in range(kills):
        start = finished()
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        while process.poll() is None and finished() <= start:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = files(out) if out.exists() else {}
        if lost := [name for name, data in kept.items() if now.get(name) != data]:
            sys.exit(f"kill {kill + 1}: lost or changed: {lost[:3]}")
        hits += finished() > start
        kept = {name: data for name, data in now.items() if name.startswith(table)}
        print(f"kill {kill + 1}: {finished()} of {shards} shards finished", flush=True)
    subprocess.run(command, check=True, **quiet)
    if files(out) != files(whole):
        sys.exit("the tables of the killed runs are not those of one run")
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["score", "generate", "pairs"], nargs="?", default="score")
    parser.add_argument("--processes", type=int, default=1, help="Of generate and pairs.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=None, help="default: enough for every kill to find work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    images = args.images or 12 * SHARD * (args.kills + 1) // 4
    with contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        if args.what != "score":
            hits = soak_shards(args.what, Path(folder).resolve(), args.kills, args.processes, args.seed)
            print(f"{args.kills} kills, {hits} of them after a new shard: the tables are byte-identical to an unbroken run")
            return
        hits = soak(Path(folder).resolve(), args.kills, images, args.seed)
    print(f"{args.kills} kills, {hits} of them while scoring: every finished shard stands, none was scored twice")


if __name__ == "__main__":
    main()
