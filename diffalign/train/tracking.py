"""Where numbers go: metrics.jsonl always, a progress bar, and the trackers that were asked for."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.files import write_text
from diffalign.errors import ConfigError

log = logging.getLogger(__name__)


class Tracker:
    """Averages per-row metrics between log lines; one writer, on the main process."""

    def __init__(self, folder: Path, accelerator: Any, total: int, report_to: Sequence[str], config: dict[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        self.accelerator, self.total = accelerator, total
        self.sums: dict[str, Tensor] = {}
        self.images, self.started = 0, time.monotonic()
        self.bar: Any = None
        if report_to:
            try:
                accelerator.init_trackers("diffalign", config=_flat(config))
            except (ImportError, ValueError) as e:
                raise ConfigError(f"train.report_to: cannot start {list(report_to)}: {e}", hint="install it or drop it") from e

    def begin(self, step: int) -> None:
        """Forget the log lines after ``step`` and show the bar."""
        if not self.accelerator.is_main_process:
            return
        from tqdm import tqdm

        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step] if step else []
        if len(kept) != len(lines):
            write_text(self.path, "".join(line + "\n" for line in kept))
        self.bar = tqdm(total=self.total, initial=step, desc="train", unit="step", dynamic_ncols=True)

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Per-row values (B,); NaN rows do not count."""
        for name, value in metrics.items():
            seen = ~value.isnan()
            pair = torch.stack([value.masked_fill(~seen, 0).float().sum(), seen.float().sum()])
            self.sums[name] = self.sums.get(name, torch.zeros_like(pair)) + pair
        self.images += images

    def flush(self, step: int, extra: Mapping[str, float]) -> None:
        """Write the means since the last flush. Every process calls this: sums are added over processes."""
        names = sorted(self.sums)
        if names:
            sums = self.accelerator.reduce(torch.stack([self.sums[n] for n in names]), reduction="sum").cpu()
            means = {n: (s / k).item() for n, (s, k) in zip(names, sums, strict=True) if k > 0}
        else:
            means = {}
        seconds = max(1e-9, time.monotonic() - self.started)
        rate = self.images * self.accelerator.num_processes / seconds
        self.sums, self.images, self.started = {}, 0, time.monotonic()
        self.write(step, {**means, **extra, "images_per_second": rate, "peak_memory_gib": peak_memory()})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if not values or not self.accelerator.is_main_process:
            return
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)
        if self.bar is not None:
            shown = {k: f"{values[k]:.4g}" for k in ("loss", "accuracy", "images_per_second") if k in values}
            self.bar.set_postfix(shown, refresh=False)

    def event(self, what: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl that says what happened, with its step and message, and a warning."""
        if not self.accelerator.is_main_process:
            return
        log.warning("step %d: %s", what["step"], what["message"])
        with self.path.open("a") as f:
            f.write(json.dumps(dict(what)) + "\n")

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for tracker in self.accelerator.trackers:  # not end_training, which would end the process group too
            tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def peak_memory() -> float:
    """GiB: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return out
