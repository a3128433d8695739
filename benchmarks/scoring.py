"""What `diffalign score` costs beside its encoder's forward pass, what a second scorer adds, and whether memory grows.

    python benchmarks/scoring.py
    python benchmarks/scoring.py memory --rows 2000

Prints tables and writes benchmarks/results/scoring.json, where a part that is not measured keeps its last figures. A ViT-S/16
with random weights on 512 px JPEGs is the bottleneck here, as it should be; memory is measured with a stub in its place. What
is compared takes turns, and loading is in none of it. Ratios of CPU seconds hold on a busy machine too, whose load is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign import cells
from diffalign.cells import ScoreConfig, score
from diffalign.scorers.encoders import TransformersCLIP
from diffalign.scorers.preprocess import Preprocess
from diffalign.scoring import make_scorers
from diffalign.shapes import build

RESULTS = Path(__file__).parent / "results" / "scoring.json"
PROMPTS = ["a red circle on a grey background", "a blue cross on a white background"]

STUB = """
import os
from diffalign.scorers import Card, Reward
from diffalign.scorers.encoders import Encoder
from diffalign.scorers.preprocess import Preprocess
import torch

resident = []

class Mean(Encoder):
    def features(self, x):
        with open("/proc/self/statm") as f:
            resident.append(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return x.mean((2, 3))

class Stub(Reward):
    card = Card("stub", "mean", "1", "none", "none")

    def __init__(self):
        self.encoder = Mean(torch.nn.Identity(), Preprocess(32), "cpu")

    def head(self, features, prompts):
        return features.mean(1)
"""


def small_clip(folder: Path) -> Path:
    """ViT-S/16 at 224 px with a text tower of two layers."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tok = build.tokenizer(folder / "words")
    ids = {"eos_token_id": tok.eos_token_id, "bos_token_id": tok.bos_token_id, "pad_token_id": tok.pad_token_id}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tok), "max_position_embeddings": 77, **ids}
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    vision |= {"image_size": 224, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=384)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tok.model_max_length = 77
    tok.save_pretrained(folder)
    return folder


def jpegs(folder: Path, count: int, side: int) -> Path:
    """Smooth pictures, as photographs are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)
        (folder / f"{i:05d}.txt").write_text(PROMPTS[i % len(PROMPTS)])
    return folder


class Clock:
    """Seconds spent inside functions, of whichever thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, label: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - began

        setattr(owner, name, timed)


class Stopwatch:
    """Wall-clock seconds, and CPU seconds of all threads, which other programs on the machine disturb less."""

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def throughput(work: Path, images: int, batch: int, turns: int) -> dict[str, Any]:
    """The bare encoder, one scorer and two take turns on as many pictures, in rotating order; ratios are within turns."""
    clip, folder = small_clip(work / "clip"), jpegs(work / "jpegs", images, 512)
    one, two = [f"clip:{clip}"], [f"clip:{clip}", f"clip100:{clip}"]
    alive = make_scorers(two)  # encoders are shared with whoever holds them, so that runs below do not load them again
    encoder: Any = alive[0].encoder  # type: ignore[attr-defined]
    x = torch.randn(batch, 3, 224, 224)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(images // batch):
                encoder.features(x)

    def run(scorers: list[str], name: str) -> None:
        config = {"path": str(folder), "output_dir": str(work / name), "scorers": scorers, "batch_size": batch}
        score(ScoreConfig(**config, embeddings=False))

    watches: dict[str, list[Stopwatch]] = defaultdict(list)
    for turn in range(turns + 1):  # the first one warms up
        what = {"bare": bare, "one": lambda t=turn: run(one, f"one-{t}"), "two": lambda t=turn: run(two, f"two-{t}")}
        names = list(what)
        for name in names[turn % 3 :] + names[: turn % 3]:
            with Stopwatch() as watch:
                what[name]()
            watches[name].append(watch)
    said: dict[str, Any] = {"images": images, "batch": batch, "turns": turns}
    for name, found in watches.items():
        said[f"{name}_images_per_s"] = images / float(np.median([w.wall for w in found[1:]]))
    for kind in ("wall", "cpu"):
        t = {name: np.array([getattr(w, kind) for w in found[1:]]) for name, found in watches.items()}
        said[kind] = {"over_bare": spread(t["bare"] / t["one"]), "two_scorers_cost": spread(t["two"] / t["one"])}
    clock = Clock()
    clock.wrap(TransformersCLIP, "features", "image tower")
    clock.wrap(TransformersCLIP, "encode", "text tower")
    clock.wrap(Preprocess, "exact", "resize and normalise")
    clock.wrap(cells, "decode", "decode (in threads)")
    clock.wrap(cells, "_image_row", "hash and describe")
    with Stopwatch() as watch:
        run(one, "clocked")
    return {**said, "seconds": {"all": watch.wall, **clock.seconds}}


def spread(values: Any) -> list[float]:
    """Median, lowest and highest."""
    return [float(np.median(values)), float(values.min()), float(values.max())]


def memory(work: Path, rows: int, files: int) -> dict[str, Any]:
    """Bytes of resident memory per row, by least squares over the last three quarters."""
    folder = jpegs(work / "small", files, 64)
    (work / "stub.py").write_text(STUB)
    sys.path.insert(0, str(work))
    import stub

    lines = ["image,prompt", *(f"{i % files:05d}.jpg,prompt {i}" for i in range(rows))]
    (folder / "table.csv").write_text("\n".join(lines))
    config = ScoreConfig(path=str(folder / "table.csv"), output_dir=str(work / "memory"), scorers=["stub:Stub"])
    done = score(config)
    kept = np.array(stub.resident[len(stub.resident) // 4 :], float)
    slope, _ = np.polyfit(np.arange(len(kept)) * config.batch_size, kept, 1)
    return {
        "rows": done.images, "files": files, "bytes_per_row": float(slope), "peak_mb": max(stub.resident) / 1e6,
        "grown_mb": float(slope) * rows / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="memory, throughput; default: both")
    parser.add_argument("--images", type=int, default=128, help="a turn; a multiple of the batch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    said: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for part in args.parts or ["memory", "throughput"]:
        with tempfile.TemporaryDirectory() as folder:
            before = os.getloadavg()[0]
            if part == "memory":
                found = memory(Path(folder), args.rows, args.files)
            else:
                found = throughput(Path(folder), args.images, args.batch, args.turns)
            machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
            said[part] = {**found, **machine, "load": [before, os.getloadavg()[0]]}
    for part in args.parts or ["memory", "throughput"]:
        print("\n".join(LINES[part](said[part])))
        print(
            "load {:.1f} before, {:.1f} after, on {cpus} CPUs, {threads} threads\n".format(*said[part]["load"], **said[part])
        )
    args.results.write_text(json.dumps(said, indent=2) + "\n")


def throughput_lines(t: dict[str, Any]) -> list[str]:
    names = {"bare": "image tower alone", "one": "diffalign score, one scorer", "two": "two scorers on one encoder"}
    out = ["| | images/s |", "|---|---|", *(f"| {text} | {t[f'{n}_images_per_s']:.2f} |" for n, text in names.items())]
    out += ["", f"| {t['turns']} turns of {t['images']} pictures | median | lowest | highest |", "|---|---|---|---|"]
    for kind in ("wall", "cpu"):
        for key, text in (("over_bare", "rate over that of the bare encoder"), ("two_scorers_cost", "two scorers over one")):
            out.append(f"| {text}, {kind} time | " + " | ".join(f"{v:.3f}" for v in t[kind][key]) + " |")
    return [*out, "", "| where | seconds |", "|---|---|", *(f"| {name} | {s:.2f} |" for name, s in t["seconds"].items())]


def memory_lines(m: dict[str, Any]) -> list[str]:
    return [
        f"{m['rows']} rows of {m['files']} files: {m['bytes_per_row']:.0f} bytes a row ({m['grown_mb']:.1f} MB in all),"
        f" peak {m['peak_mb']:.0f} MB"
    ]


LINES = {"memory": memory_lines, "throughput": throughput_lines}


if __name__ == "__main__":
    main()
