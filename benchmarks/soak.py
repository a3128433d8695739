"""Kill `diffalign generate`, `pairs` and `score` at random points, again and again, alone or under gloo.

    python benchmarks/soak.py generate pairs score --kills 100
    python benchmarks/soak.py generate --kills 100 --processes 2 --minutes 15
    python benchmarks/soak.py table

After every kill, the finished shards of all kills before must stand as they were, and none may be made again. At the end the
tables must be those of a run that nobody disturbed, byte for byte. After `--minutes` it stops between two kills, and the same
command goes on; a row says how many kills were done. Prints a line a command, and writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "soak.json"
TABLES = {"generate": "images", "pairs": "pairs", "score": "scores"}
SCORE_SHARD = 4

SCORER = """
import os, time

def slow(images, prompts):
    out = []
    for i in images:
        red, green, _ = i.getpixel((0, 0))
        out.append(float(256 * red + green))
        with open(os.environ["SCORE_LOG"], "a") as f:
            f.write(f"{out[-1]}\\n")
        time.sleep(0.02)
    return out
"""


def prepare(what: str, folder: Path, shards: int) -> list[str]:
    """The words of the command without its output, over so many shards."""
    if what == "generate":
        words = ["generate", "prompts=shapes:train", f"num_prompts={2 * shards}", "shard_size=2", "sampling.batch_size=2"]
        return [*words, "sampling.num_inference_steps=2"]
    there = folder / "in"
    if what == "score":
        words = ["score", f"path={there}", "scorers=[plug:slow]", "prompt=p", f"shard_size={SCORE_SHARD}"]
        there.mkdir(parents=True, exist_ok=True)
        (folder / "plug.py").write_text(SCORER)
        (folder / "log").touch()
        for i in range(SCORE_SHARD * shards):  # the colour is the number
            if not (path := there / f"{i:05d}.png").exists():
                Image.new("RGB", (16, 16), (i // 256, i % 256, 0)).save(path)
        return [*words, "batch_size=2", "gallery=0"]
    from diffalign.data.tables import write_shard

    words = ["pairs", f"path={there}", "reward.s=1", "rule.type=all", "bins=3", "lists=true", "shard_size=1"]
    if (there / "scores").exists():
        return words
    rows, scores = [], []
    for i in range(4 * shards):
        prompt, digest = f"prompt {i // 4}", hashlib.sha256(str(i).encode()).hexdigest()
        rows.append({"image_id": str(i), "sha256": digest, "prompt_id": prompt, "prompt": prompt})
        said = {"image_sha256": digest, "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "scorer": "s"}
        scores.append({**said, "version": "1", "preprocess_version": "1", "value": float(i * 7919 % 101)})
    write_shard(there, "images", 0, [{**r, "image": {"bytes": r["sha256"].encode(), "path": None}} for r in rows])
    write_shard(there, "scores", 0, scores)
    return words


def launched(words: list[str], folder: Path, processes: int) -> subprocess.Popen[bytes]:
    """The command, alone or under torchrun; its processes are a group of their own, to die together."""
    command = [sys.executable, "-m", "diffalign", *words]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [sys.executable, *torchrun, *command[1:]]
    path = f"{ROOT}{os.pathsep}{folder}"
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    env["SCORE_LOG"] = str(folder / "log")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=env, start_new_session=True, **quiet)


def soak(what: str, folder: Path, kills: int, processes: int, seed: int, minutes: float) -> dict[str, Any]:
    """One row: how many kills were done, and how many of them hit after a new shard."""
    shards = 2 * processes * kills + 2  # every kill finds work
    out, whole, table = folder / "out", folder / "whole", TABLES[what]
    words = prepare(what, folder, shards)
    notes = folder / "state.json"
    state = {"kills": 0, "after_a_new_shard": 0, "seconds": 0.0, "identical": None}
    state |= json.loads(notes.read_text()) if notes.exists() else {}
    began, before = time.monotonic(), state["seconds"]

    def files(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".tmp"}

    def finished(root: Path = out) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (root / table).glob("*.parquet")}

    def note(**more: Any) -> dict[str, Any]:
        state.update(more, seconds=round(before + time.monotonic() - began, 1))
        notes.write_text(json.dumps(state))
        return state

    def again(kept: dict[str, bytes], start: int) -> set[int]:
        """Finished shards whose pictures were scored once more."""
        lines = (folder / "log").read_text().splitlines()[start:] if what == "score" else []
        mine = {int(name.removesuffix(".parquet").rpartition("-")[2]) for name in kept}
        return {int(float(line)) // SCORE_SHARD for line in lines} & mine

    def said() -> int:
        return len((folder / "log").read_text().splitlines()) if what == "score" else 0

    for kill in range(state["kills"], kills):
        if before + time.monotonic() - began > before + 60 * minutes:
            return note()
        rng, kept, start = random.Random(f"{seed}-{kill}"), finished(), said()
        process = launched([*words, f"output_dir={out}"], folder, processes)
        anywhere = time.monotonic() + 10 * rng.random() if rng.random() < 0.2 else None  # start-up included; else in the work
        while process.poll() is None and len(list((out / table).glob("*.parquet"))) <= len(kept):
            if anywhere is not None and time.monotonic() > anywhere:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"{what}, kill {kill + 1}: there was nothing left to kill")
        now = finished()
        if lost := [name for name, data in kept.items() if now.get(name) != data]:
            sys.exit(f"{what}, kill {kill + 1}: lost or changed: {lost[:3]}")
        if twice := again(kept, start):
            sys.exit(f"{what}, kill {kill + 1}: made again: {sorted(twice)[:3]}")
        note(kills=kill + 1, after_a_new_shard=state["after_a_new_shard"] + (len(now) > len(kept)))
        print(f"{what}: kill {kill + 1} of {kills}, {len(now)} of {shards} shards stand", file=sys.stderr, flush=True)
    kept, start = finished(), said()
    if launched([*words, f"output_dir={out}"], folder, processes).wait():
        sys.exit(f"{what}: the run after the last kill failed")
    if twice := again(kept, start):
        sys.exit(f"{what}: made again after the last kill: {sorted(twice)[:3]}")
    if launched([*words, f"output_dir={whole}"], folder, 1).wait():
        sys.exit(f"{what}: the undisturbed run failed")
    if files(out) != files(whole):
        sys.exit(f"{what}: the tables of the killed runs are not those of one run")
    return note(identical=True)


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    end = "tables byte-identical to an undisturbed run" if row["identical"] else "not finished: every shard stands so far"
    hits = f"{row['kills']} of {row['wanted']} kills, {row['after_a_new_shard']} after a new shard"
    return f"{name}: {hits}, {row['seconds'] / 60:.1f} minutes: {end}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=[*TABLES, "table"], nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=18, help="of each command; the same command goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for what in args.what if "table" not in args.what else ():
        name = what if args.processes == 1 else f"{what}, {args.processes} processes"
        folder = (args.folder / f"{what}-{args.processes}-{args.kills}-{args.seed}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        row = soak(what, folder, args.kills, args.processes, args.seed, args.minutes)
        rows[name] = {**row, "wanted": args.kills, "seed": args.seed}
        RESULTS.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n")
        print(line_of(name, rows[name]))
    if "table" in args.what:
        print("\n".join(line_of(name, row) for name, row in rows.items()))


if __name__ == "__main__":
    main()
