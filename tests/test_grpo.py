"""GRPO from Python does what the command does, with rewards of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_online import brightness, weights_of

from diffalign import GRPOConfig, GRPOTrainer
from diffalign.data.prompts import read_prompts
from diffalign.errors import ConfigError, DataError
from diffalign.models import LoRA
from diffalign.recipes import TrainConfig, train
from diffalign.rollout import RolloutSettings
from diffalign.rules import ODE
from diffalign.spec import load, validate
from diffalign.train.tracking import read_metrics

TEXTS = [f"picture {i}" for i in range(5)]
SMALL: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "generation_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "lora": LoRA(rank=4),
    "rollout": RolloutSettings(num_inference_steps=3),
}


def redness(images: Any, prompts: Any) -> list[float]:
    assert len(images) == len(prompts)
    return [float(np.asarray(x)[..., 0].mean()) for x in images]


def test_the_trainer_is_the_command(tiny: Path, tmp_path: Path) -> None:
    """Prompts and a function at hand, against the same by names in a file: the same weights, bit for bit."""
    args = GRPOConfig(output_dir=str(tmp_path / "api"), epsilon=0.01, beta=0.02, num_iterations=2, **SMALL)
    GRPOTrainer(model=tiny, args=args, train_dataset=TEXTS, reward_funcs=brightness).train()
    config = load(TrainConfig, tmp_path / "api" / "config.resolved.yaml")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    sections = config.model_dump(mode="json") | {"output_dir": str(tmp_path / "command")}
    sections["online"] |= {"prompts": str(tmp_path / "prompts.txt")}
    assert [p.text for p in read_prompts(tmp_path / "prompts.txt")] == TEXTS
    train(validate(TrainConfig, sections))
    a, b = weights_of(tmp_path / "api"), weights_of(tmp_path / "command")
    assert all(torch.equal(a[k], b[k]) for k in a)
    (objective,) = config.objective
    assert (objective.type, objective.clip_range, objective.beta) == ("ppo", 0.01, 0.02)
    assert config.online is not None
    assert (config.online.prompts_per_rollout, config.online.group_size, config.online.inner_epochs) == (4, 2, 2)
    assert config.online.reward.scorers == ["test_online:brightness"]


def test_several_rewards_by_name_and_by_function(tiny: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    args = GRPOConfig(output_dir=str(tmp_path / "run"), reward_weights=[1, 0.5], scale_rewards="batch", **SMALL)
    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])
    trainer = GRPOTrainer(model=tiny, args=args, train_dataset=rows, reward_funcs=["compressibility", redness])
    run = trainer.train()
    assert trainer.config.online is not None
    assert trainer.config.online.reward.weights == {"compressibility": 1, "redness": 0.5}
    assert trainer.config.online.advantages.std == "global"
    line = next(x for x in read_metrics(run.folder) if "rollout/reward" in x)
    assert line["rollout/reward"] == pytest.approx(line["rollout/compressibility"] + 0.5 * line["rollout/redness"], rel=1e-6)


def config_of(tiny: Path, tmp_path: Path, **more: Any) -> TrainConfig:
    args = GRPOConfig(output_dir=str(tmp_path / "run"), **SMALL | more)
    return GRPOTrainer(model=tiny, args=args, train_dataset=TEXTS, reward_funcs=redness).config


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({}, {"type": "ppo", "clip_range": 1e-4, "clip_range_high": None, "beta": 0.0}),
        ({"epsilon": 0.1, "epsilon_high": 0.2}, {"type": "ppo", "clip_range": 0.1, "clip_range_high": 0.2}),
        ({"loss_type": "grpo_guard"}, {"type": "grpo_guard", "clip_range": 2e-6, "beta": 0.0}),
        ({"loss_type": "grpo_guard", "epsilon": 4e-6, "beta": 0.01}, {"clip_range": 4e-6, "beta": 0.01}),
        ({"loss_type": "sigmoid", "beta": 100.0, "rollout": RolloutSettings(rule=ODE())}, {"type": "sigmoid", "beta": 100.0}),
        ({"loss_type": "reinforce", "beta": 0.01}, {"type": "reinforce", "beta": 0.01}),
        ({"loss_type": "flow_dppo", "sections": {"objective": {"tau": 1e-3}}}, {"type": "flow_dppo", "tau": 1e-3}),
        ({"sections": {"objective": {"type": "grpo_guard"}}, "epsilon": 0.1}, {"type": "grpo_guard", "clip_range": 2e-6}),
    ],
)
def test_the_loss_is_any_that_a_file_can_name(
    more: dict[str, Any], fields: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    (objective,) = config_of(tiny, tmp_path, **more).objective
    assert {name: getattr(objective, name) for name in fields} == fields


def test_sections_reach_what_has_no_name_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """What fields say stays, and what is told beside it is that of a config file."""
    sections = {
        "online": {
            "advantages": {"keep": {"best": 2, "worst": 1}, "clip": 3.0},
            "old": {"rate": 0.1},
            "oversample": {"candidates": 8},
            "rollout": {"window": {"type": "random", "size": 1}, "guidance_scale": 2.0},
            "reward": {"on_error": "drop"},
        },
        "watch": {"scorers": ["compressibility"], "limits": {"diversity": {"drop": 0.5}}},
        "train": {"max_grad_norm": 0.5},
        "reference": {"type": "ema"},
    }
    own = {"num_generations": 4, "scale_rewards": "none", "beta": 0.1, "sections": sections}
    c = config_of(tiny, tmp_path, **own)
    assert c.online is not None
    assert c.watch is not None
    a = c.online.advantages
    assert (a.std, a.clip, a.keep and (a.keep.best, a.keep.worst)) == ("none", 3.0, (2, 1))
    assert c.online.old is not None
    assert c.online.oversample is not None
    assert (c.online.group_size, c.online.prompts_per_rollout, c.online.oversample.candidates) == (4, 2, 8)
    r = c.online.rollout
    assert (r.num_inference_steps, r.batch_size, r.guidance_scale, type(r.window).__name__) == (3, 4, 2.0, "Random")
    assert (c.online.reward.on_error, c.online.reward.weights) == ("drop", {"redness": 1.0})
    assert list(c.watch.limits) == ["diversity"]
    assert (c.train.max_grad_norm, c.train.max_steps) == (0.5, 2)
    assert type(c.reference).__name__ == "EMA"


def test_a_loss_of_the_forward_process_from_python(tiny: Path, tmp_path: Path) -> None:
    """NFT, with an old policy, extremes and a watcher: it runs, and its folder says so."""
    more = {"online": {"old": {}, "advantages": {"keep": {"best": 1, "worst": 0}}}, "watch": {"num_prompts": 1}}
    more["watch"] |= {"scorers": ["compressibility"]}
    rollout = RolloutSettings(num_inference_steps=2, rule=ODE())
    settings = SMALL | {"rollout": rollout, "loss_type": "nft", "sections": more, "max_steps": 1}
    args = GRPOConfig(output_dir=str(tmp_path / "run"), **settings)
    run = GRPOTrainer(model=tiny, args=args, train_dataset=TEXTS, reward_funcs=redness).train()
    resolved = load(TrainConfig, run.folder / "config.resolved.yaml")
    assert resolved.total.names == "nft"
    assert any("watch/reference_distance" in x for x in read_metrics(run.folder))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rewards": ({"reward_funcs": []}, "none are given"),
    "one name twice": ({"reward_funcs": [redness, redness]}, "names of their own"),
    "weights of others": ({"reward_weights": [1.0, 2.0]}, "2 for 1"),
    "parts of groups": ({"generation_batch_size": 9}, "no multiple of num_generations"),
    "no prompts": ({"train_dataset": []}, "no prompts"),
    "a row without a prompt": ({"train_dataset": [{"prompt": "a"}, {"caption": "b"}]}, "row 2"),
    "a clip that the loss has not": ({"loss_type": "reinforce", "epsilon": 0.1}, r"objective.*clip_range"),
    "a loss that is misspelt": ({"loss_type": "grpo-guard"}, "grpo_guard"),
    "a section that there is not": ({"sections": {"onlin": {}}}, "mean 'online'"),
    "a field that a section has not": ({"sections": {"online": {"advantages": {"kep": {}}}}}, "mean 'keep'"),
    "rewards said twice": ({"sections": {"online": {"reward": {"scorers": ["shapes"]}}}}, "reward_funcs"),
    "groups cut by batches": (
        {"num_generations": 8, "per_device_train_batch_size": 6, "generation_batch_size": 48}, "whole groups"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told(case: str, tiny: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    own = {k: change[k] for k in ("reward_funcs", "train_dataset") if k in change}
    settings = SMALL | {k: v for k, v in change.items() if k not in own}
    with pytest.raises((ConfigError, DataError), match=said):
        GRPOTrainer(
            model=tiny,
            args=GRPOConfig(output_dir=str(tmp_path / "run"), **settings),
            **{"train_dataset": TEXTS, "reward_funcs": redness} | own,
        ).train()
    assert not (tmp_path / "run").exists()


def test_the_arguments_of_another_trainer_are_refused(tiny: Path, tmp_path: Path) -> None:
    from diffalign import DPOConfig

    with pytest.raises(ConfigError, match="GRPOConfig"):
        GRPOTrainer(model=tiny, args=DPOConfig(output_dir=str(tmp_path)), train_dataset=TEXTS, reward_funcs=redness)  # type: ignore[arg-type]


def test_a_rollout_of_no_whole_batches_is_refused_in_the_callers_words(tiny: Path, tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path / "run"), num_generations=4, generation_batch_size=8)
    with pytest.raises(ConfigError, match="generation_batch_size 8 is no multiple of per_device_train_batch_size 32"):
        GRPOTrainer(model=str(tiny), args=args, train_dataset=["a"], reward_funcs="compressibility")
    assert not (tmp_path / "run").exists()
