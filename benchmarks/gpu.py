"""Speed and memory of LoRA training on one CUDA device, with random weights: pairs a second, peaks, where the time goes.

python benchmarks/gpu.py            every case that fits; the table goes into docs/benchmarks.md too
python benchmarks/gpu.py sd15 sdxl  only these
"""

from __future__ import annotations

import datetime
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.estimate import Estimator, blank_batch, forward_backward, measured_on_cuda
from diffalign.models.architectures import KNOWN, skeleton
from diffalign.recipes import TrainConfig
from diffalign.spec import validate
from diffalign.train.state import make_optimizer

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEADING = "## Figures\n"
STAGES = ("encode", "reference", "policy forward", "backward", "optimizer")


@dataclass(frozen=True)
class Case:
    """A model at its native size."""

    name: str
    path: str
    batch: int
    """Pairs in a step."""

    @property
    def config(self) -> TrainConfig:
        model = {"path": self.path, "lora": {"rank": 16}, "dtype": "bfloat16", "gradient_checkpointing": True}
        train = {"per_device_train_batch_size": self.batch}
        objective = {"type": "sigmoid", "beta": 2000}
        config = {"model": model, "train": train, "objective": objective, "evaluate": {"enabled": False}}
        return validate(TrainConfig, {**config, "output_dir": "unused"})


CASES = [Case(*row) for row in zip(("sd15", "sdxl", "sd35-medium", "flux-dev"), KNOWN, (8, 4, 2, 1), strict=True)]


class Clock:
    """Seconds by stage; the device is waited for at both ends of each."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - began

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def on(self, work: Callable[..., Any], stage: Callable[[], str]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(stage()):
                return work(*args, **kwargs)

        return timed


def timed(case: Case, device: str, steps: int) -> tuple[tuple[int, int], float, dict[str, float]]:
    """Size, seconds of ``steps`` steps after two to warm up, and seconds by stage; each step encodes its own pairs first."""
    config, clock = case.config, Clock(device)
    model: Any = skeleton(*KNOWN[case.path], config.model, device).to(torch.device(device))
    size = model.resolution
    optimizer = make_optimizer(list(model.named_weights.trainable().values()), config.train)
    passes = {True: "policy forward", False: "reference"}
    model.predict = clock.on(model.predict, lambda: passes[torch.is_grad_enabled()])
    model.net.train()
    pixels = torch.rand(1, 3, *size)

    def step() -> float:
        """Seconds of a step without encoding, which a training does once."""
        with clock("encode"):
            for _ in range(2 * case.batch):
                model.encode_images(pixels)
            cond = model.encode_prompts(["a prompt"] * case.batch)
        began = time.perf_counter()
        before = sum(clock.seconds[s] for s in ("reference", "policy forward"))
        with clock("backward"):
            forward_backward(model, config, blank_batch(model, case.batch, size, cond), device)
        clock.seconds["backward"] -= sum(clock.seconds[s] for s in ("reference", "policy forward")) - before
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(2):
        step()
    clock.seconds.clear()
    seconds = sum(step() for _ in range(steps))
    return size, seconds, dict(clock.seconds)


def measure(case: Case, device: str, steps: int = 10) -> dict[str, Any]:
    """One row."""
    size, seconds, stages = timed(case, device, steps)
    gc.collect()  # or the measured peak would hold that model too
    return {
        "name": case.name,
        "size": size,
        "batch": case.batch,
        "pairs_per_second": steps * case.batch / seconds,
        "peak_gib": measured_on_cuda(case.config) / 2**30 if device == "cuda" else float("nan"),
        "estimated_gib": sum(Estimator(case.path)(case.config).phases["train"].values()) / 2**30,
        "shares": {stage: stages[stage] / sum(stages.values()) for stage in STAGES},
    }


def table(rows: list[dict[str, Any]], device: str, date: str) -> str:
    """The figures, as they stand in the page."""
    lines = [
        f"{date}, {device}, torch {torch.__version__}:",
        "",
        "| model | size | pairs a step | pairs/s | peak GiB | estimated GiB | " + " | ".join(STAGES) + " |",
        "|---" * (6 + len(STAGES)) + "|",
    ]
    for r in rows:
        shares = " | ".join(f"{100 * r['shares'][s]:.0f} %" for s in STAGES)
        size = f"{r['size'][0]} x {r['size'][1]}"
        numbers = f"{r['pairs_per_second']:.2f} | {r['peak_gib']:.2f} | {r['estimated_gib']:.2f}"
        lines.append(f"| {r['name']} | {size} | {r['batch']} | {numbers} | {shares} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    if unknown := set(names) - {c.name for c in CASES}:
        print(f"no case {min(unknown)!r}; there are {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and this machine has none", file=sys.stderr)
        return 2
    rows = []
    for case in [c for c in CASES if not names or c.name in names]:
        try:
            rows.append(measure(case, "cuda"))
        except torch.cuda.OutOfMemoryError:
            print(f"{case.name}: does not fit on this card", file=sys.stderr)
        torch.cuda.empty_cache()
    figures = table(rows, torch.cuda.get_device_name(), datetime.date.today().isoformat())
    print(figures)
    if not names:
        PAGE.write_text(PAGE.read_text().partition(HEADING)[0] + f"{HEADING}\n{figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
