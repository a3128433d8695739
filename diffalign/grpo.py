"""GRPO from Python, in the shape that users of TRL know. Thin: a config, and the same run as ``diffalign train``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import EvaluateSpec
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import OBJECTIVES
from diffalign.online import InMemory
from diffalign.recipes import Run, TrainConfig, train
from diffalign.rollout import RolloutSettings
from diffalign.scorers import Callback, Scorer
from diffalign.scoring import make_scorer
from diffalign.spec import merge, validate
from diffalign.train.state import TrainSettings

Reward = str | Callable[..., Any]
"""A scorer by name, or f(images, prompts) -> numbers, higher is better, of PIL images and their prompts."""


class GRPOConfig(TrainSettings):
    """Settings of :class:`GRPOTrainer`, by TRL's names; the fields of the ``train`` section of a config file are here too."""

    output_dir: str
    lora: LoRA | None = LoRA()
    """Train an adapter; None trains all weights of the denoiser."""
    num_generations: int = Field(default=8, ge=2)
    """Images of each prompt, which are compared with one another."""
    generation_batch_size: int = Field(default=64, ge=2)
    """Images of a rollout, over all processes."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Optimizer steps in which the images of a rollout are used once."""
    num_iterations: int = Field(default=1, ge=1)
    """How often they are used."""
    loss_type: str = "ppo"
    """The ``type`` of an objective: ``ppo``, ``grpo_guard``, ``flow_dppo``, ``reinforce``, or any other that learns from
    samples, such as ``nft`` or ``sigmoid``."""
    beta: float = Field(default=0.0, ge=0)
    """Its field of this name, where set: of the losses on steps, the weight of the KL to the reference."""
    epsilon: float | None = Field(default=None, gt=0, lt=1)
    """Its ``clip_range``, how far a ratio may go from 1. It is a mean over dimensions, not a sum: the 1e-4 of ``ppo`` is
    wide."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Above 1, where it differs."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the deviation of the group, of all rewards, or nothing."""
    reward_weights: list[float] | None = None
    """One for each reward function; 1 each if not given."""
    rollout: RolloutSettings = RolloutSettings()
    """Steps, guidance, noise and window of the trajectories. Its ``batch_size`` is that of training if not given."""
    evaluate: EvaluateSpec = EvaluateSpec(enabled=False)
    """What is measured after training, base against trained."""
    resume_from: str | None = None
    """``latest``, ``auto`` or a checkpoint folder."""
    sections: dict[str, Any] = {}
    """Whatever else a config file can say, by its sections and over what the fields above say:
    ``{"online": {"advantages": {"keep": {"best": 4, "worst": 4}}}, "watch": {}}``."""


class GRPOTrainer:
    """Trains a model on its own samples, by rewards: ``GRPOTrainer(model=..., args=..., train_dataset=..., reward_funcs=f)``.

    Args:
        model: a folder in the diffusers layout, a hub id, ``shapes-unet``, or a :class:`ModelSpec`; the adapter is
            ``args.lora``.
        args: the configuration.
        train_dataset: prompts: a file, a hub dataset, ``shapes:train``; or in memory, texts or rows with ``prompt``, such as a
            ``datasets.Dataset``.
        reward_funcs: one or several: names of scorers, or functions f(images, prompts) -> numbers.

    Raises:
        ConfigError: settings that contradict each other, or an output directory that holds a run.
        DataError: a row without a prompt; names the row.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | ModelSpec,
        args: GRPOConfig,
        train_dataset: str | Path | Iterable[str | Mapping[str, Any]],
        reward_funcs: Reward | Sequence[Reward],
    ) -> None:
        if not isinstance(args, GRPOConfig):
            raise ConfigError(f"args: GRPOTrainer needs a GRPOConfig, got {type(args).__name__}")
        if args.generation_batch_size % args.num_generations:
            raise ConfigError(
                f"generation_batch_size {args.generation_batch_size} is no multiple of num_generations {args.num_generations}"
            )
        again = args.sections.get("online") or {}
        if "prompts" in again or "scorers" in (again.get("reward") or {}):
            raise ConfigError("sections: online.prompts and online.reward.scorers are train_dataset and reward_funcs")
        asked = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
        scorers, weights = _rewards(asked, args.reward_weights)
        stored = isinstance(train_dataset, str | Path)
        prompts = None if isinstance(train_dataset, str | Path) else _prompts(train_dataset)
        self.given = InMemory(prompts, scorers)
        rollout = args.rollout
        if "batch_size" not in rollout.model_fields_set:
            if args.generation_batch_size % args.per_device_train_batch_size:
                raise ConfigError(
                    f"generation_batch_size {args.generation_batch_size} is no multiple of per_device_train_batch_size "
                    f"{args.per_device_train_batch_size}: set both, or rollout=RolloutSettings(batch_size=...)"
                )
            rollout = rollout.model_copy(update={"batch_size": args.per_device_train_batch_size})
        spec = model if isinstance(model, ModelSpec) else ModelSpec(path=str(model))
        told = {"clip_range": args.epsilon, "clip_range_high": args.epsilon_high}
        told |= {"beta": args.beta} if "beta" in args.model_fields_set else {}
        kind: Any = OBJECTIVES.options.get(args.loss_type)
        ordered = kind is not None and kind.data == "pairs"  # by the order of the rewards, not by their size
        std = "global" if args.scale_rewards == "batch" else args.scale_rewards
        sections = {
            "model": spec.model_copy(update={"lora": args.lora}).model_dump(),
            "objective": {"type": args.loss_type} | {name: value for name, value in told.items() if value is not None},
            "online": {
                "prompts": str(train_dataset) if stored else "prompts in memory",
                "prompts_per_rollout": args.generation_batch_size // args.num_generations,
                "group_size": args.num_generations,
                "updates": args.steps_per_generation,
                "inner_epochs": args.num_iterations,
                "rollout": rollout.model_dump(),
                "reward": {"scorers": [_said(f) for f in asked], "weights": weights},
                "advantages": {} if ordered and "scale_rewards" not in args.model_fields_set else {"std": std},
            },
            "train": {name: getattr(args, name) for name in TrainSettings.model_fields},
            "evaluate": args.evaluate.model_dump(),
            "output_dir": args.output_dir,
            "resume_from": args.resume_from,
        }
        self.config = validate(TrainConfig, merge(sections, args.sections), "args")

    def train(self) -> Run:
        """Train, export and, if asked, evaluate; returns the run's folder and metrics."""
        return train(self.config, given=self.given)


def _rewards(asked: Sequence[Reward], weights: Sequence[float] | None) -> tuple[list[Scorer], dict[str, float]]:
    """Scorers, and the weight of the value that each gives."""
    if not asked:
        raise ConfigError("reward_funcs: none are given", hint="give a scorer's name, or f(images, prompts) -> numbers")
    weights = [1.0] * len(asked) if weights is None else weights
    if len(weights) != len(asked):
        raise ConfigError(f"reward_weights: {len(weights)} for {len(asked)} reward functions")
    scorers: list[Scorer] = [make_scorer(f) if isinstance(f, str) else Callback(f) for f in asked]
    names = ["score" if f == "shapes" else scorer.name for f, scorer in zip(asked, scorers, strict=True)]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ConfigError(f"reward_funcs: two are called {twice[0]!r}", hint="give functions names of their own")
    return scorers, dict(zip(names, weights, strict=True))


def _said(reward: Reward) -> str:
    """As a configuration names it."""
    if isinstance(reward, str):
        return reward
    return f"{getattr(reward, '__module__', '?')}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def _prompts(rows: Iterable[str | Mapping[str, Any]]) -> list[Prompt]:
    """Each once, in order."""
    out: dict[Prompt, None] = {}
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"train_dataset, row {number}: no prompt", hint="give texts, or rows with prompt")
        negative = None if isinstance(row, str) else row.get("negative_prompt")
        out[Prompt(text, negative or None)] = None
    if not out:
        raise DataError("train_dataset: no prompts")
    return list(out)
