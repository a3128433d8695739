"""Everything that changes while training, how it is saved, and how it comes back bit for bit."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffalign.data.files import write_json
from diffalign.errors import ConfigError, DiffalignError, ModelError
from diffalign.models import Model
from diffalign.spec import Spec, did_you_mean
from diffalign.train.feeds import Feed
from diffalign.train.references import GIVEN, Base, ReferencePolicy
from diffalign.train.watch import PREFIX, Limits

BEST = ("heldout/loss", "heldout/accuracy", "heldout/worst_group/loss", "heldout/worst_group/accuracy", "select/score")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
HALVINGS = 24
"""Of fp16's scale, from 2^16 down to where gradients vanish."""


class TrainSettings(Spec):
    """The ``train`` section."""

    learning_rate: float = Field(default=1e-4, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_steps: int = Field(default=400, ge=1)
    """Optimizer steps."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Above 0, an exponential average of the weights is kept, evaluated and exported."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of pairs trained without their caption, one decision per pair."""
    seed: int = Field(default=0, ge=0)
    logging_steps: int = Field(default=10, ge=1)
    eval_steps: int = Field(default=100, ge=0)
    """Held-out pair loss and accuracy every this many steps; 0 only at the end."""
    early_stopping_patience: int = Field(default=0, ge=0)
    """Stop after this many evaluations without a better held-out value; 0 never."""
    winner_drift_patience: int = Field(default=0, ge=0)
    """Stop after this many evaluations in a row in which held-out winners are worse than at the start; 0 never."""
    protect_winner: float | None = Field(default=None, ge=0, lt=1)
    """mu of Diffusion-SDPO: the loser's gradient is scaled down where it would raise the winner's error; higher is safer."""
    balance_kinds: float | None = Field(default=None, ge=0, lt=1)
    """Weigh two kinds of pairs (column ``kind``) each by its share of the loss (BideDPO): the decay of the running means
    that it reads, 0 for the step before alone."""
    gradient_angle_steps: int = Field(default=0, ge=0)
    """Log the cosine between the gradients of winner's and loser's error every this many steps, for two more backward passes;
    0 never."""
    metric_for_best: str = "heldout/loss"
    """Decides which checkpoint is the best: heldout/loss, heldout/accuracy, heldout/worst_group/loss or its accuracy (of
    ``data.groups``), select/score (of images from ``evaluate.select_prompts`` prompts), or watch/VALUE, higher is better, of
    what ``watch`` measures."""
    load_best: bool = False
    """Export the best weights instead of the last."""
    save_steps: int = Field(default=0, ge=0)
    """A checkpoint every this many steps; 0 only on a signal and at the end."""
    save_every_minutes: float = Field(default=15.0, ge=0)
    save_total_limit: int = Field(default=2, ge=1)
    """Older checkpoints are removed."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []

    @field_validator("metric_for_best")
    @classmethod
    def _measured(cls, name: str) -> str:
        if name in BEST or name.startswith(PREFIX):
            return name
        if name == "reward" or name.startswith("rollout/"):
            raise ValueError("the training reward cannot say which weights are best: name a held-out value, watch/VALUE")
        raise ValueError(f"unknown value{did_you_mean(name, BEST)}; use {', '.join(BEST)} or watch/VALUE")


def make_optimizer(parameters: list[torch.nn.Parameter], s: TrainSettings) -> torch.optim.Optimizer:
    """AdamW, in 8 bits where bitsandbytes is present and asked for."""
    kwargs: dict[str, Any] = {
        "lr": s.learning_rate,
        "betas": (s.adam_beta1, s.adam_beta2),
        "eps": s.adam_epsilon,
        "weight_decay": s.weight_decay,
    }
    if s.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **kwargs)
    try:
        import bitsandbytes as bnb
    except ImportError as e:
        raise ConfigError("train.optimizer: adamw_8bit needs bitsandbytes", hint="pip install bitsandbytes, or adamw") from e
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(parameters, **kwargs)
    return optimizer


def learning_rate_factor(s: TrainSettings, step: int) -> float:
    """The schedule as a function of the step, so that it has no state."""
    warm = min(1.0, (step + 1) / s.warmup_steps) if s.warmup_steps else 1.0
    done = min(1.0, max(0, step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps))
    match s.lr_scheduler:
        case "constant":
            return warm
        case "linear":
            return warm * (1 - done)
        case "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))


class TrainState:
    """Model, optimizer and counters of one run. Every process holds one; ``accelerator`` knows which it is."""

    def __init__(
        self, model: Model, accelerator: Any, settings: TrainSettings, references: ReferencePolicy | None = None
    ) -> None:
        self.model, self.accelerator, self.settings = model, accelerator, settings
        self.references = references or Base()
        self.parameters = model.named_weights.trainable()
        optimizer = make_optimizer(list(self.parameters.values()), settings)
        model.net, self.optimizer = accelerator.prepare(model.net, optimizer)
        self.feed: Feed | None = None
        """What must come back with the rest, where a feed keeps something from step to step."""
        self.step = 0
        self.cost = 0
        """Forward passes of one image through the denoiser, a backward pass counted twice."""
        self.objective: dict[str, Tensor] = {}
        self.best: dict[str, float] = {}
        self.since_best = 0
        self.drifting = 0
        """Evaluations in a row in which held-out winners were worse than at the start."""
        self.skipped = 0
        """Steps in a row whose gradient was not finite, with fp16."""
        self.limits = Limits()
        self.spent, self.began = 0.0, time.monotonic()
        if settings.ema_decay:
            model.named_weights.take("ema")
        self.references.begin(model.named_weights)

    @property
    def reference(self) -> str:
        """The weights that this step is compared with."""
        return self.references.name(self.model.named_weights, self.step, self.settings.seed)

    @property
    def enough(self) -> bool:
        """Whether a patience has run out, or a limit says stop."""
        s = self.settings
        waited = (s.early_stopping_patience, self.since_best), (s.winner_drift_patience, self.drifting)
        return self.limits.stopped is not None or any(patience and count >= patience for patience, count in waited)

    def update(self) -> dict[str, float]:
        """Clip, check, step the optimizer and the average; returns what was measured.

        Raises:
            DiffalignError: the gradient is not finite. With fp16 such a step is skipped and the scale halved, until there are
                too many in a row for any scale to help.
        """
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * learning_rate_factor(s, self.step)
        norm, scaler = 0.0, self.accelerator.scaler
        if any(p.grad is not None for p in self.parameters.values()):  # a step without examples has none to scale back
            norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), s.max_grad_norm))
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped > (0 if scaler is None else HALVINGS):
                raise DiffalignError(
                    f"step {self.step}: the gradient is {norm}"
                    + (f", as in the {HALVINGS} steps before" if scaler else "")
                    + "; the weights were not touched",
                    hint="lower train.learning_rate or objective.beta, or resume from the last checkpoint",
                )
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if s.ema_decay:
            ema = self.model.named_weights.snapshots["ema"]
            for name, p in self.parameters.items():
                ema[name].lerp_(p.detach(), 1 - s.ema_decay)
        return {"grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def improved(self, metric: str, value: float) -> bool:
        """Record a held-out value; whether it is the best so far. Losses are better when lower."""
        sign = -1.0 if metric.endswith("loss") else 1.0
        better = "value" not in self.best or sign * value > sign * self.best["value"]
        if better:
            self.best, self.since_best = {"value": value, "step": self.step}, 0
            if self.settings.load_best:
                self.model.named_weights.take("best", source="ema" if self.settings.ema_decay else None)
        else:
            self.since_best += 1
        return better

    @property
    def seconds(self) -> float:
        """Training time so far, over all the processes that this run was resumed in."""
        return self.spent + time.monotonic() - self.began

    @property
    def final_weights(self) -> str | None:
        """Name of the snapshot that is evaluated and exported; None for the current weights."""
        if self.settings.load_best and "best" in self.model.named_weights.snapshots:
            return "best"
        return "ema" if self.settings.ema_decay else None

    def save(self, folder: Path, config: str) -> Path:
        """Write ``checkpoint-N`` atomically and drop the oldest. Every process calls this."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = folder / f"checkpoint-{self.step}"
        tmp = folder / f".{final.name}.tmp"
        acc = self.accelerator
        try:
            if acc.is_main_process:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir(parents=True)
                save_file({n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}, tmp / "weights.safetensors")
                for name, stored in self.model.named_weights.snapshots.items():
                    if name not in GIVEN:
                        save_file({n: p.cpu().contiguous() for n, p in stored.items()}, tmp / f"{name}.safetensors")
                torch.save(self.optimizer.state_dict(), tmp / "optimizer.pt")
                torch.save({"objective": self.objective, "scaler": acc.scaler and acc.scaler.state_dict()}, tmp / "extra.pt")
                (tmp / "config.resolved.yaml").write_text(config)
            acc.wait_for_everyone()
            torch.save(_rng_state(), tmp / f"rng-{acc.process_index}.pt")
            if self.feed is not None and (kept := self.feed.state()):
                torch.save(kept, tmp / f"feed-{acc.process_index}.pt")
            acc.wait_for_everyone()
            if acc.is_main_process:
                sizes = {f.name: f.stat().st_size for f in sorted(tmp.iterdir())}
                state = {"step": self.step, "cost": self.cost, "best": self.best, "since_best": self.since_best}
                state |= {"drifting": self.drifting, "watch": self.limits.state()}
                state["seconds"] = round(self.seconds, 1)
                write_json(tmp / "state.json", state | {"processes": acc.num_processes, "files": sizes})
                shutil.rmtree(final, ignore_errors=True)
                tmp.replace(final)
                for old in checkpoints(folder)[: -self.settings.save_total_limit]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError, DiffalignError) as e:  # a full disk, in the words of each writer
            shutil.rmtree(tmp, ignore_errors=True)
            raise DiffalignError(f"cannot write {final}: {e}", hint="free some space; older checkpoints are untouched") from e
        acc.wait_for_everyone()
        return final

    def load(self, checkpoint: Path) -> None:
        """Restore everything from a checkpoint.

        Raises:
            ModelError: a file is missing, cut short or of another model.
        """
        from safetensors.torch import load_file

        weights = self.model.named_weights
        try:
            state = json.loads((checkpoint / "state.json").read_text())
            for name, size in state["files"].items():
                if (found := (checkpoint / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            own = self.accelerator.process_index
            if state["processes"] != self.accelerator.num_processes:
                raise ValueError(f"made by {state['processes']} processes, not {self.accelerator.num_processes}")
            _copy_into(self.parameters, load_file(checkpoint / "weights.safetensors"))
            for name in [n for n in weights.snapshots if n not in GIVEN]:
                del weights.snapshots[name]
            for file in sorted(checkpoint.glob("*.safetensors")):
                if file.name != "weights.safetensors":
                    device = next(iter(self.parameters.values())).device
                    weights.snapshots[file.stem] = {n: p.to(device) for n, p in load_file(file).items()}
            self.optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
            extra = torch.load(checkpoint / "extra.pt", weights_only=True)
            if self.accelerator.scaler is not None and extra["scaler"]:
                self.accelerator.scaler.load_state_dict(extra["scaler"])
            _set_rng_state(torch.load(checkpoint / f"rng-{own}.pt", weights_only=True))
            if self.feed is not None and (kept := checkpoint / f"feed-{own}.pt").exists():
                device = self.accelerator.device
                where = "cpu" if device.type == "cpu" else device  # each of several processes has a cpu:n: nothing loads to it
                self.feed.restore(torch.load(kept, weights_only=True, map_location=where))
        except (OSError, ValueError, KeyError, RuntimeError, EOFError) as e:
            raise ModelError(
                f"{checkpoint}: cannot resume: {type(e).__name__}: {' '.join(str(e).split())[:300]}",
                hint="delete this checkpoint to go on from the one before, or change the config back",
            ) from e
        except Exception as e:  # safetensors and pickle errors share no base class
            raise ModelError(f"{checkpoint}: damaged: {type(e).__name__}: {e}", hint="delete this checkpoint") from e
        self.objective = extra["objective"]
        self.step, self.cost = state["step"], state["cost"]
        self.best, self.since_best, self.drifting = state["best"], state["since_best"], state.get("drifting", 0)
        self.limits.restore(state.get("watch", {}))
        self.spent, self.began = state["seconds"], time.monotonic()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _copy_into(parameters: dict[str, torch.nn.Parameter], stored: dict[str, Tensor]) -> None:
    if stored.keys() != parameters.keys():
        odd = sorted(stored.keys() ^ parameters.keys())[0]
        raise ValueError(f"its weights are those of another model or adapter (first difference: {odd})")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(stored[name])


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": []}
    kind, keys, *rest = np.random.get_state()
    state["numpy"] = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
