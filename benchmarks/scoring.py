"""What `diffalign score` costs beside its encoder's forward pass, what a second scorer adds, and whether memory grows.

    python benchmarks/scoring.py

Prints tables and writes benchmarks/results/scoring.json. A ViT-S/16 with random weights on 512 px JPEGs is the bottleneck
here, as it should be; memory is measured with a stub in its place. Rates are the marginal ones of the second half of the
pictures, so that loading is in none of them. Run it on a quiet machine: the load at the start is written down.
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


def seconds(folder: Path, out: Path, scorers: list[str], batch: int, limit: int) -> float:
    config = {"path": str(folder), "output_dir": str(out), "scorers": scorers, "batch_size": batch, "limit": limit}
    began = time.perf_counter()
    score(ScoreConfig(**config, embeddings=False))
    return time.perf_counter() - began


def bare_rate(clip: Path, batch: int, passes: int) -> float:
    """Images/s of the image tower alone."""
    encoder = TransformersCLIP(clip)
    x = torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        encoder.features(x)
        began = time.perf_counter()
        for _ in range(passes):
            encoder.features(x)
    return batch * passes / (time.perf_counter() - began)


def throughput(work: Path, images: int, batch: int) -> dict[str, Any]:
    """Alternates the runs that are compared, and takes the median of three."""
    clip, folder = small_clip(work / "clip"), jpegs(work / "jpegs", images, 512)
    one, two = [f"clip:{clip}"], [f"clip:{clip}", f"clip100:{clip}"]
    rates: dict[str, list[float]] = defaultdict(list)
    for turn in range(3):
        rates["bare"].append(bare_rate(clip, batch, max(2, images // 2 // batch)))
        for name, scorers in (("one", one), ("two", two)):
            half, whole = (seconds(folder, work / f"{name}-{turn}-{n}", scorers, batch, n) for n in (images // 2, images))
            rates[name].append(images / 2 / (whole - half))
    median = {name: float(np.median(v)) for name, v in rates.items()}
    clock = Clock()
    clock.wrap(TransformersCLIP, "features", "image tower")
    clock.wrap(TransformersCLIP, "encode", "text tower")
    clock.wrap(Preprocess, "exact", "resize and normalise")
    clock.wrap(cells, "decode", "decode (in threads)")
    clock.wrap(cells, "_image_row", "hash and describe")
    total = seconds(folder, work / "clocked", one, batch, images)
    return {
        "images": images, "batch": batch, "bare_images_per_s": median["bare"], "scored_images_per_s": median["one"],
        "over_bare": median["one"] / median["bare"], "two_scorers_cost": median["one"] / median["two"],
        "seconds": {"all, with loading": total, **clock.seconds},
    }  # fmt: skip


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
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=500)
    args = parser.parse_args()
    said: dict[str, Any] = {"load": os.getloadavg()[0], "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        said["memory"] = memory(Path(folder), args.rows, args.files)
        said["throughput"] = throughput(Path(folder), args.images, args.batch)
    t, m = said["throughput"], said["memory"]
    print("| | images/s |\n|---|---|")
    print(f"| image tower alone | {t['bare_images_per_s']:.1f} |\n| diffalign score | {t['scored_images_per_s']:.1f} |")
    print(f"\nover bare {t['over_bare']:.3f}; two scorers on one encoder cost {t['two_scorers_cost']:.3f} of one")
    print("\n| where | seconds |\n|---|---|")
    print("\n".join(f"| {name} | {s:.2f} |" for name, s in t["seconds"].items()))
    print(f"\n{m['rows']} rows of {m['files']} files: {m['bytes_per_row']:.0f} bytes a row, peak {m['peak_mb']:.0f} MB")
    print(f"load at the start {said['load']:.2f} on {said['cpus']} CPUs, {said['threads']} threads")
    RESULTS.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
