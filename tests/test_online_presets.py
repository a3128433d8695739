"""Every online method's preset takes two steps on a tiny model of a kind that its sampler knows, with a tiny reward."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.catalogue import kind_of, shipped_configs
from diffalign.path import Coeffs
from diffalign.recipes import TrainConfig, train
from diffalign.rules import ODE, trainable
from diffalign.spec import dump, load, validate
from diffalign.train.tracking import read_metrics

ONLINE = {
    name: config
    for name, path in shipped_configs().items()
    if name.startswith("presets/") and kind_of(name) == "train" and (config := load(TrainConfig, path)).online is not None
}
FAST = ["ddpo", "flow-grpo-fast", "diffusion-nft", "spo"]
REWARD = {"scorers": ["test_online:brightness"], "weights": {"brightness": 1.0}}


def models_of(config: TrainConfig) -> list[str]:
    """The tiny models whose path the preset's rule is defined on."""
    assert config.online is not None
    on = config.online.rollout.rule.on
    return [family for family, path in (("sd", "noise"), ("sd3", "flow")) if path in on]


def small(config: TrainConfig, model: Path, out: Path) -> dict[str, Any]:
    """The preset with few images, few steps and no half precision; its method is as it stands."""
    sections = config.model_dump(mode="json")
    online, rollout = sections["online"], sections["online"]["rollout"]
    sections["model"] = {"path": str(model), "lora": {"rank": 4}}
    if model.name.startswith("sd3"):
        sections["model"]["max_sequence_length"] = 16
    last = max(6, rollout["window"].get("begin", 0) + rollout["window"].get("size", 0) + 2)
    rollout |= {"num_inference_steps": min(rollout["num_inference_steps"], last), "batch_size": 4}
    if "size" in rollout["window"]:
        rollout["window"]["size"] = min(rollout["window"]["size"], 2)
    online |= {"prompts": "shapes:train", "num_prompts": 8, "prompts_per_rollout": 4, "updates": 1, "reward": REWARD}
    online |= {"group_size": min(online["group_size"], 2), "repeats": min(online["repeats"], 2)}
    online["oversample"] = online["oversample"] and {**online["oversample"], "candidates": 3, "steps": 2}
    online["rule"] |= {"min_margin": 0}
    sections["train"] |= {"max_steps": 2, "per_device_train_batch_size": 4, "mixed_precision": "no", "logging_steps": 1}
    return sections | {"output_dir": str(out), "evaluate": {"enabled": False}}


CASES = [(name, family) for name, config in ONLINE.items() for family in models_of(config)]


@pytest.mark.parametrize(
    ("name", "family"), [c if c[0].rpartition("/")[2] in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_an_online_preset_takes_two_steps(name: str, family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = validate(TrainConfig, small(ONLINE[name], folder_of(family), tmp_path / "run"))
    metrics = train(config).metrics
    lines = read_metrics(tmp_path / "run")
    assert metrics["steps"] == 2
    assert metrics["reward_calls"] > 0
    losses = [x["loss"] for x in lines if "loss" in x]
    assert len(losses) == 2
    assert all(math.isfinite(x) for x in losses)


def grid_of(config: TrainConfig) -> Coeffs:
    """The steps of the preset's own model, by the scheduler that it is published with: nothing is loaded."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    assert config.online is not None
    steps = config.online.rollout.num_inference_steps
    if "stable-diffusion-v1" in config.model.path:
        ddim = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        ddim.set_timesteps(steps)
        abar = torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod[None]])
        return Coeffs(abar.sqrt(), (1 - abar).sqrt())
    flow: Any
    if "FLUX" in config.model.path:
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        flow.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.15)
    else:
        assert "stable-diffusion-3.5" in config.model.path
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        flow.set_timesteps(steps)
    return Coeffs(1 - flow.sigmas, flow.sigmas)


@pytest.mark.parametrize("name", ONLINE)
def test_the_numbers_of_a_preset_fit_together(name: str) -> None:
    """As it stands, on one card: whole blocks in every update, whole groups in every block, every window on trainable steps,
    and no rollout that the end of the training cuts.
    """
    config = ONLINE[name]
    online, train_ = config.online, config.train
    assert online is not None
    size, rollout = online.rollout.batch_size, online.rollout
    assert online.prompts_per_rollout * online.group_size == online.blocks * size
    assert train_.max_steps % online.steps_per_rollout == 0
    stepped = config.total.data == "steps" or online.credit != "image"
    assert online.blocks % online.updates == 0 or not stepped
    assert size % train_.per_device_train_batch_size == 0 or not stepped
    assert size % online.group_size == 0 or online.group_size % size == 0
    steps = trainable(rollout.rule, grid_of(config))
    rollout.window.check(steps)
    length = rollout.window.length(steps)
    assert (length > 0) == (not isinstance(rollout.rule, ODE))
    for epoch in range(train_.max_steps // online.steps_per_rollout):
        start = rollout.window.start(epoch, steps, train_.seed, "a prompt")
        assert 0 <= start <= start + length <= steps
    clips = [clip for o in config.total.parts if (clip := getattr(o, "clip_range", None))]
    assert all(0 < clip <= 1 for clip in clips)


def test_online_presets_say_where_they_come_from() -> None:
    for name in ONLINE:
        head = [line for line in shipped_configs()[name].read_text().splitlines() if line.startswith("#")]
        assert len(head) >= 2, name
        assert re.search(r"arXiv \d{4}\.\d{5}", "\n".join(head)), name
        assert ("/reconstructed/" in name) == head[0].startswith("# status: reconstruction"), name


def test_an_online_preset_is_written_and_read_again_unchanged() -> None:
    import yaml

    for name, config in ONLINE.items():
        assert validate(TrainConfig, yaml.safe_load(dump(config))) == config, name


def test_the_online_methods_are_there() -> None:
    core = "ddpo flow-grpo flow-grpo-fast dance-grpo mixgrpo mixgrpo-flash pref-grpo grpo-guard diffusion-nft awm online-dpo"
    core += " rwr d3po spo sol-rl flow-dppo dgpo"
    assert {f"presets/{name}" for name in core.split()} <= ONLINE.keys()
