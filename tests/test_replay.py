"""The policy's own states in the losers' place: against a stock solver, over resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture

from diffalign.building import build_model
from diffalign.data.examples import read_labels
from diffalign.errors import ConfigError
from diffalign.models import LoRA, ModelSpec
from diffalign.recipes import TrainConfig, train
from diffalign.spec import validate
from diffalign.timesteps import Uniform
from diffalign.train.coupling import Coupling
from diffalign.train.feeds import Offline
from diffalign.train.replay import LAGGED, replay
from diffalign.train.tracking import read_metrics

BOTH = frozenset({"loser", "reference"})


@pytest.fixture
def model(tiny: Path) -> Any:
    return build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A table of prompt, image and label; one picture is bad."""
    lines = ["prompt,image,label"]
    for i in range(9):
        picture(i).save(tmp_path / f"{i}.png")
        lines.append(f"picture {i},{i}.png,{int(i < 8)}")
    (tmp_path / "experts.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "experts.csv"


def feed_of(model: Any, table: Path, cache: Path, **more: Any) -> Offline:
    found = [x for x in read_labels(str(table)) if x.good]
    coupling = Coupling(noise="replay", replay_steps=5, **more)
    return Offline(model, found, Uniform(), cache, size=(32, 32), batch_size=4, seed=3, coupling=coupling)


@pytest.mark.parametrize("u", [0.1375, 0.5505, 0.9305])
def test_a_trajectory_is_that_of_the_stock_solver(model: Any, u: float) -> None:
    """DPMSolverMultistepScheduler at the authors' timesteps: equal steps with one perturbation."""
    from diffusers import DPMSolverMultistepScheduler

    steps, g = 5, torch.Generator().manual_seed(0)
    eps = torch.randn(2, *model.latent_shape, generator=g)
    cond = model.encode_prompts(["a red circle on a grey background", None])
    left = int((1 - u) * steps - 1e-9)
    times = [int(u * 1000) + 200 * k for k in range(left, -1, -1)]
    stock = DPMSolverMultistepScheduler.from_config(model.scheduler.config, algorithm_type="dpmsolver++", solver_order=2)
    stock.set_timesteps(timesteps=times)
    x = eps
    with torch.no_grad():
        for t in times[:-1]:
            x = stock.step(model.predict(x, torch.tensor([t, t]), cond), t, x, return_dict=False)[0]
        there = model.predict(x, torch.tensor([times[-1]] * 2), cond)
    state, own, passes = replay(model, eps, torch.tensor([u, u]), cond, steps)
    torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, there, rtol=1e-4, atol=1e-4)
    assert passes == 2 * len(times)


def test_rows_of_a_batch_do_not_touch_each_other(model: Any) -> None:
    eps = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    u, cond = torch.tensor([0.9, 0.1, 0.5]), model.encode_prompts(["one", "two", "three"])
    together = replay(model, eps, u, cond, 4)
    for i in range(3):
        alone = replay(model, eps[i : i + 1], u[i : i + 1], cond[[i]], 4)
        torch.testing.assert_close(together[0][i : i + 1], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][i : i + 1], alone[1], rtol=1e-4, atol=1e-5)


def test_the_loser_is_what_the_policy_said_itself(model: Any, experts: Path, tmp_path: Path) -> None:
    """Its error is 0 under the weights that made it, and the reference's is 0 as long as they are the same."""
    feed = feed_of(model, experts, tmp_path / "cache")
    assert len(feed.examples) == 8  # the good ones
    (batch,) = feed.batches(0)
    terms = feed.terms(model, batch, BOTH)
    torch.testing.assert_close(terms.loser, torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(terms.ref_loser, torch.zeros(4), atol=1e-9, rtol=0)
    assert (terms.winner > 0.01).all()
    assert terms.cost > 4 * 2 * 4  # the trajectories are paid for
    with torch.no_grad():
        for p in model.named_weights.trainable().values():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved = feed.terms(model, batch, BOTH)
    torch.testing.assert_close(moved.loser, torch.zeros(4), atol=1e-9, rtol=0)
    assert (moved.ref_loser > 1e-6).all()


def test_a_lagged_policy_makes_the_states(model: Any, experts: Path, tmp_path: Path) -> None:
    feed = feed_of(model, experts, tmp_path / "cache", replay_every=2)
    (batch,) = feed.batches(0)
    with torch.no_grad():
        for p in model.named_weights.trainable().values():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    next(feed.batches(1))
    old = feed.terms(model, batch, BOTH)
    assert (old.loser > 1e-6).all()  # the copy is that of step 0, and the policy has left it
    torch.testing.assert_close(old.ref_loser, torch.zeros(4), atol=1e-9, rtol=0)
    next(feed.batches(2))
    torch.testing.assert_close(feed.terms(model, batch, BOTH).loser, torch.zeros(4), atol=1e-9, rtol=0)


def settings(tiny: Path, experts: Path, out: Path, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(tiny), "lora": {"rank": 4}},
        "data": {"path": str(experts)},
        "objective": {"type": "dro_hinge"},
        "coupling": {"noise": "replay", "replay_steps": 3, "replay_every": 4},
        "train": {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        "evaluate": {"enabled": False},
        "output_dir": str(out),
    } | more


def test_six_steps_are_three_and_three_more(tiny: Path, experts: Path, tmp_path: Path) -> None:
    """The lagged policy, taken at steps 0 and 4, comes back from the checkpoint."""
    from safetensors.torch import load_file

    whole = train(validate(TrainConfig, settings(tiny, experts, tmp_path / "whole", 6)))
    train(validate(TrainConfig, settings(tiny, experts, tmp_path / "parts", 3)))
    assert (tmp_path / "parts" / "checkpoint-3" / f"{LAGGED}.safetensors").exists()
    again = train(validate(TrainConfig, settings(tiny, experts, tmp_path / "parts", 6, resume_from="latest")))
    a, b = (load_file(x.folder / "pytorch_lora_weights.safetensors") for x in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [x for x in read_metrics(tmp_path / "whole") if "error/loser" in x]
    assert lines[0]["error/loser"] == pytest.approx(0, abs=1e-9)
    assert lines[3]["error/loser"] > 1e-7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"coupling": {"noise": "replay", "draws": 2}}, "replay takes one draw"),
        ({"objective": {"type": "kto"}}, "makes losers without scores or labels, but kto reads others"),
        ({"objective": {"type": "odpo"}}, "makes losers without scores or labels, but odpo reads others"),
        ({"data": {"path": "x", "swap_labels": True}}, "reads winners alone, but data.swap_labels is about pairs"),
    ],
)
def test_what_replay_cannot_be_joined_with(tiny: Path, experts: Path, tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig, settings(tiny, experts, tmp_path, 2) | changed)
