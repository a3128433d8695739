"""Watching for a reward that is exploited: what is measured, when a limit speaks, and that it all comes back."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny
from PIL import Image
from test_direct import small as direct_small
from test_online import online, small, weights_of
from test_report import CHROMIUM

from diffalign.appearance import appearance
from diffalign.building import build_model
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.evaluation import prompts_of
from diffalign.models import LoRA, ModelSpec
from diffalign.recipes import TrainConfig, train
from diffalign.report import _gold, write_report
from diffalign.sampling import Sampler, generate
from diffalign.scorers import SCORERS, Callback, card_of
from diffalign.scoring import ShapesScorer
from diffalign.spec import dump, parse_yaml, validate
from diffalign.train.tracking import read_metrics
from diffalign.train.watch import FRACTIONS, PROBED, Limit, Limits, Watcher, strip_of
from diffalign.watching import SEVERAL, values_of

PROMPTS = [Prompt(f"picture {i}") for i in range(3)]
GREENNESS = "test_watch:greenness"


def greenness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A held-out score that any picture has."""
    return [float(np.asarray(x)[..., 1].mean() / 255) for x in images]


class Fading:
    """A held-out score that is good at the first two looks, and bad from the third on."""

    looks = 0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        self.looks += 1
        return [float(self.looks < 3)] * len(images)


def watched(tiny: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A small online run that is watched."""
    watch = {"num_prompts": 2, "scorers": [GREENNESS]} | more.pop("watch", {})
    settings = {"eval_steps": 1} | more.pop("train", {})
    evaluate = {"enabled": False, "sampling": {"num_inference_steps": 2}}
    return small(tiny, out, **more, watch=watch, train=settings, evaluate=evaluate)


def looks(folder: Path) -> list[dict[str, Any]]:
    return [x for x in read_metrics(folder) if "watch/diversity" in x]


def events(folder: Path) -> list[dict[str, Any]]:
    return [x for x in read_metrics(folder) if "event" in x]


# --- statistics of pictures ------------------------------------------------------------------------------------------


def flat(*colour: float, size: int = 16) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def test_a_flat_grey_picture_is_nothing_but_bright() -> None:
    found = {k: v.item() for k, v in appearance(flat(0.5, 0.5, 0.5)).items()}
    assert found["brightness"] == pytest.approx(0.5, abs=1e-6)
    assert all(found[k] == 0 for k in ("saturation", "colour_entropy", "edge_density", "dark_share"))


@pytest.mark.parametrize(
    ("colour", "saturation", "brightness", "dark"),
    [
        ((1.0, 0.0, 0.0), 1.0, 0.299, 0),
        ((0.0, 1.0, 0.0), 1.0, 0.587, 0),
        ((0.0, 0.0, 1.0), 1.0, 0.114, 1),
        ((0.8, 0.6, 0.4), 0.5, 0.637, 0),
        ((0.0, 0.0, 0.0), 0.0, 0.0, 1),
        ((1.0, 1.0, 1.0), 0.0, 1.0, 0),
    ],
)
def test_flat_colours(colour: tuple[float, ...], saturation: float, brightness: float, dark: float) -> None:
    found = appearance(flat(*colour))
    assert found["saturation"].item() == pytest.approx(saturation, abs=1e-6)
    assert found["brightness"].item() == pytest.approx(brightness, abs=1e-6)
    assert found["dark_share"].item() == dark


def test_equal_parts_of_colours_have_the_entropy_of_a_die() -> None:
    image = flat(0.0, 0.0, 0.0)
    image[..., :4], image[..., 4:8] = flat(1.0, 0.0, 0.0)[..., :4], flat(0.0, 1.0, 0.0)[..., :4]
    image[..., 8:12] = flat(0.0, 0.0, 1.0)[..., :4]
    assert appearance(image)["colour_entropy"].item() == pytest.approx(2.0)
    levels = (torch.arange(8) + 0.5) / 8
    every = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 16, 32)
    assert appearance(every)["colour_entropy"].item() == pytest.approx(9.0)  # each of the 512 once


def test_an_edge_is_one_column_of_those_with_a_neighbour() -> None:
    image = flat(0.0, 0.0, 0.0)
    image[..., 7:] = 1.0
    assert appearance(image)["edge_density"].item() == pytest.approx(1 / 15)
    assert appearance(image.mT)["edge_density"].item() == pytest.approx(1 / 15)
    assert appearance(image * 0.09)["edge_density"].item() == 0  # too faint
    board = torch.zeros(1, 3, 16, 16)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1
    assert appearance(board)["edge_density"].item() == 1


def test_pictures_are_measured_one_by_one_and_as_another_library_does() -> None:
    """Saturation and luma by Pillow's own HSV and L, in 8 bits; a row does not depend on its batch."""
    images = torch.randint(0, 256, (4, 3, 12, 20), generator=torch.Generator().manual_seed(0))
    together = appearance(images / 255)
    for i, one in enumerate(images):
        picture = Image.fromarray(one.permute(1, 2, 0).numpy().astype(np.uint8))
        assert np.asarray(picture.convert("HSV"))[..., 1].mean() / 255 == pytest.approx(
            together["saturation"][i].item(), abs=0.004
        )
        assert np.asarray(picture.convert("L")).mean() / 255 == pytest.approx(together["brightness"][i].item(), abs=0.003)
        alone = appearance(one[None] / 255)
        assert all(torch.equal(alone[k][0], together[k][i]) for k in alone)


# --- the norm of the prediction --------------------------------------------------------------------------------------


def make(tiny: Path, folder: Path, lora: LoRA | None = None, **more: Any) -> Watcher:
    model = build_model(ModelSpec(path=str(tiny), lora=lora))
    return Watcher(model, PROMPTS, [Callback(greenness)], Sampler(num_inference_steps=2), folder, **more)


@pytest.mark.parametrize("lora", [LoRA(rank=2), None])
def test_the_norm_of_the_untouched_model_is_exactly_its_own(lora: LoRA | None, tiny: Path, tmp_path: Path) -> None:
    assert make(tiny, tmp_path, lora)(0)["watch/prediction_norm"] == 1.0


@pytest.mark.parametrize("family", ["sd3", "sdxl", "pixart-alpha"])
def test_models_of_other_kinds_are_watched_alike(family: str, load: Callable[..., Any], tmp_path: Path) -> None:
    """Flows, sizes told to the network, learned variance; in batches of two, which changes rounding and no more."""
    whole, parts = (
        Watcher(load(family), PROMPTS, [Callback(greenness)], Sampler(num_inference_steps=2, batch_size=n), tmp_path)(0)
        for n in (64, 2)
    )
    assert whole["watch/prediction_norm"] == parts["watch/prediction_norm"] == 1.0
    assert whole == pytest.approx(parts, abs=0.01)


def test_the_norm_is_that_of_the_prediction(tiny: Path, tmp_path: Path) -> None:
    """The last layer made three times as large predicts three times as much, at every time and prompt."""
    watcher = make(tiny, tmp_path)
    with torch.no_grad():
        for p in watcher.model.net.conv_out.parameters():
            p.mul_(3)
    seen = watcher(1)
    assert seen["watch/prediction_norm"] == pytest.approx(3.0, rel=1e-5)
    _, base = watcher._fixed  # type: ignore[misc]
    rows = min(PROBED, len(PROMPTS))
    assert base.shape == (len(FRACTIONS), rows, *watcher.model.latent_shape)
    assert seen["watch/reference_distance"] == pytest.approx((2 * base.double()).square().mean().item(), rel=1e-5)


def test_the_probe_stands_at_its_own_levels_of_noise(tiny: Path, tmp_path: Path) -> None:
    """x_t = alpha x0 + sigma eps of the base's own pictures: at each fraction, another noise that is the prompt's own."""
    watcher = make(tiny, tmp_path)
    watcher(0)
    noisy, _ = watcher._fixed  # type: ignore[misc]
    model = watcher.model
    pixels = generate(model, PROMPTS, watcher.sampling, seed=watcher.seed)[:, 0]
    x0 = model.encode_images(pixels.float() / 255)
    noises = []
    for x, u in zip(noisy, FRACTIONS, strict=True):
        c = model.coeffs(model.timestep(torch.tensor([u])))
        noises.append((x - c.alpha * x0) / c.sigma)
    stacked = torch.stack(noises).flatten(2)
    assert stacked.mean().item() == pytest.approx(0, abs=4 / math.sqrt(stacked.numel()))
    assert stacked.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * stacked.numel()))
    flat = stacked.flatten(0, 1)
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 6 / math.sqrt(flat.shape[1])
    again = make(tiny, tmp_path)
    again(0)
    assert all(torch.equal(a, b) for a, b in zip(again._fixed[0], noisy, strict=True))  # type: ignore[index]


def test_the_distance_is_twice_the_kl_of_a_step_of_unit_noise(tiny: Path, tmp_path: Path) -> None:
    """Per dimension: N(f, 1) against N(f_ref, 1), by torch's own divergence, whichever way the prediction went."""
    watcher = make(tiny, tmp_path, LoRA(rank=2))
    assert watcher(0)["watch/reference_distance"] == 0
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in watcher.model.named_weights.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    seen = watcher(1)
    noisy, base = watcher._fixed  # type: ignore[misc]
    with torch.no_grad():
        here = watcher._predictions(noisy)
    unit = torch.ones(()).double()
    kl = torch.distributions.kl_divergence(*(torch.distributions.Normal(f.double(), unit) for f in (here, base)))
    assert kl.mean() > 0
    assert seen["watch/reference_distance"] == pytest.approx(2 * kl.mean().item(), rel=1e-9)


def test_looking_changes_neither_weights_nor_the_stream_of_chance(tiny: Path, tmp_path: Path) -> None:
    watcher = make(tiny, tmp_path, LoRA(rank=2))
    torch.manual_seed(3)
    before = torch.get_rng_state(), {n: p.detach().clone() for n, p in watcher.model.named_weights.trainable().items()}
    first, second = watcher(0), watcher(1)
    assert first == second
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(before[1][n], p) for n, p in watcher.model.named_weights.trainable().items())


# --- limits ----------------------------------------------------------------------------------------------------------


def follow(limit: dict[str, Any], values: Sequence[float]) -> list[int]:
    """Steps at which a limit speaks."""
    limits = Limits({"x": Limit(**limit)})
    return [e["step"] for step, v in enumerate(values) for e in limits.check(step, {"watch/x": v})]


@pytest.mark.parametrize(
    ("limit", "values", "steps"),
    [
        ({"below": 0.5}, [0.6, 0.5, 0.49, 0.6, 0.4], [2]),
        ({"above": 0.5}, [0.4, 0.5, 0.51, 0.9], [2]),
        ({"drop": 0.25}, [2.0, 1.5, 1.4, 1.0], [2]),
        ({"drop": 0.25}, [-2.0, -2.5, -2.6], [2]),  # of what it was, whatever the sign
        ({"drop": 0.25}, [1.0, 2.0, 1.0, 0.8], []),  # since the start, not since the best
        ({"below": 0.5}, [0.4, 0.4], [0]),
        ({"below": 0.5}, [1.0, math.nan, 0.4], [2]),
    ],
)
def test_a_limit_speaks_once_at_the_step_that_crosses_it(limit: dict[str, Any], values: list[float], steps: list[int]) -> None:
    assert follow(limit, values) == steps


def test_a_value_that_comes_later_has_limits_too() -> None:
    limits = Limits({"x": Limit(above=0.5), "y": Limit(drop=0.5)})
    assert limits.check(0, {"watch/z": 1.0}) == []
    assert [e["limit"] for e in limits.check(1, {"watch/x": 0.6, "watch/y": 2.0})] == ["x"]
    assert [e["limit"] for e in limits.check(2, {"watch/x": 0.6, "watch/y": 0.9})] == ["y"]  # of what it was first


def test_limits_come_back_and_changed_ones_start_anew() -> None:
    rules = {"x": Limit(below=0.5, action="stop"), "y": Limit(drop=0.1)}
    limits = Limits(rules)
    limits.check(0, {"watch/x": 1.0, "watch/y": 1.0})
    limits.check(1, {"watch/x": 0.1, "watch/y": 0.1})
    stored = json.loads(json.dumps(limits.state()))
    again = Limits(rules)
    again.restore(stored)
    assert again.state() == limits.state()
    assert again.stopped == limits.stopped == "step 1: watch/x is 0.1, below 0.5"
    assert again.check(2, {"watch/x": 0.0, "watch/y": 0.0}) == []
    for change in ({"x": Limit(below=0.05, action="stop")}, {"x": Limit(below=0.5)}, {}):
        other = Limits(change)
        other.restore(stored)
        assert other.stopped is None
        assert other.start == limits.start


@pytest.mark.parametrize("limit", [{}, {"below": 1, "above": 2}, {"drop": 0}, {"below": 1, "action": "shout"}])
def test_a_limit_is_one_bound(limit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limit|drop|action"):
        Limit(**limit)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_watched_from_the_start_and_trains_as_if_it_were_not(tiny: Path, tmp_path: Path) -> None:
    run = train(validate(TrainConfig, watched(tiny, tmp_path / "run")))
    seen = looks(run.folder)
    assert [x["step"] for x in seen] == [0, 1, 2]
    assert seen[0]["watch/reference_distance"] == 0 < seen[-1]["watch/reference_distance"]
    assert {"watch/greenness", "watch/greenness_std", "watch/reward", "watch/saturation", "watch/dark_share"} <= set(seen[0])
    assert seen[0]["watch/prediction_norm"] == 1.0 != seen[-1]["watch/prediction_norm"]
    # the reward is mean brightness without weights of channels; the watched pictures have it too
    assert seen[0]["watch/reward"] == pytest.approx(seen[0]["watch/brightness"], abs=0.1)
    for step in (0, 1, 2):
        with Image.open(strip_of(run.folder, step)) as strip:
            assert strip.size == (64, 32)  # two prompts of 32 pixels
    bare = small(tiny, tmp_path / "bare")
    blind = train(validate(TrainConfig, bare))
    a, b = weights_of(run.folder), weights_of(blind.folder)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert run.metrics["reward_calls"] == blind.metrics["reward_calls"]
    assert run.metrics["stopped"] is None


def test_offline_training_is_watched_too(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    """Without a training reward, with encoders that left memory, and with the average that is exported."""
    sections = watched(tiny, tmp_path / "run", objective={"type": "sigmoid"}, train={"ema_decay": 0.9})
    del sections["online"]
    run = train(validate(TrainConfig, sections | {"data": {"path": str(pairs_csv), "limit": 8}}))
    seen = looks(run.folder)
    assert [x["step"] for x in seen] == [0, 1, 2]
    assert "watch/reward" not in seen[0]
    assert seen[0]["watch/prediction_norm"] == 1.0
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    model.restore(run.folder)
    prompts = prompts_of("shapes:select", 2, seed=1000)
    exported = Watcher(model, prompts, [Callback(greenness)], Sampler(num_inference_steps=2), tmp_path, seed=1000)(2)
    assert exported["watch/greenness"] == pytest.approx(seen[-1]["watch/greenness"], abs=1e-3)
    assert exported["watch/prediction_norm"] == pytest.approx(seen[-1]["watch/prediction_norm"], abs=1e-5)


def test_direct_training_is_watched_too(tiny: Path, tmp_path: Path) -> None:
    """The reward that is differentiated is the one that judges, and neither weights nor calls differ for it."""
    sections = direct_small(tiny, tmp_path / "run", train={"eval_steps": 1})
    watch = {"num_prompts": 2, "scorers": [GREENNESS]}
    run = train(validate(TrainConfig, sections | {"watch": watch}))
    seen = looks(run.folder)
    assert [x["step"] for x in seen] == list(range(run.metrics["steps"] + 1))
    assert seen[0]["watch/prediction_norm"] == 1.0 != seen[-1]["watch/prediction_norm"]
    assert abs(seen[0]["watch/reward"] - seen[0]["watch/brightness"]) < 0.1
    blind = train(validate(TrainConfig, sections | {"output_dir": str(tmp_path / "blind")}))
    a, b = weights_of(run.folder), weights_of(blind.folder)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert run.metrics["reward_calls"] == blind.metrics["reward_calls"]
    assert "reward of samples" in write_report(run.folder).read_text()
    with pytest.raises(ConfigError, match=r"direct\.reward\.scorers"):
        validate(TrainConfig, sections | {"watch": watch, "train": {"metric_for_best": "watch/reward"}})


def test_stopping_saves_and_says_why(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner

    from diffalign.cli import main

    limits = {"prediction_norm": {"above": 0.5, "action": "warn"}, "edge_density": {"above": -1, "action": "stop"}}
    config = validate(TrainConfig, watched(tiny, tmp_path / "run", watch={"limits": limits}, train={"max_steps": 9}))
    (tmp_path / "c.yaml").write_text(dump(config))
    done = CliRunner().invoke(main, ["train", str(tmp_path / "c.yaml")])
    assert done.exit_code == 0, done.output
    assert "stopped by a limit: step 0: watch/edge_density" in done.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 0
    assert metrics["stopped"].startswith("step 0: watch/edge_density is ")
    assert [(e["event"], e["limit"]) for e in events(tmp_path / "run")] == [
        ("warn", "prediction_norm"),
        ("stop", "edge_density"),
    ]
    assert [(e["event"], e["limit"]) for e in metrics["events"]] == [("warn", "prediction_norm"), ("stop", "edge_density")]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with the built-in autoencoder, whose pictures can become all white: a random one has no such place."""
    folder = build_tiny(tmp_path_factory.mktemp("seeing"))
    shutil.rmtree(folder / "vae")
    shutil.copytree(Path(__file__).parents[1] / "assets" / "shapes-unet" / "vae", folder / "vae")
    return folder


def hacked(seeing: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Brightness is paid for and nothing else, far too eagerly."""
    limits = {"diversity": {"drop": 0.3, "action": "stop"}, "prediction_norm": {"above": 1.05}}
    rollout = {"rule": {"type": "ddim", "eta": 1.0}, "num_inference_steps": 3, "batch_size": 16}
    return {
        "model": {"path": str(seeing), "lora": None},
        "objective": {"type": "reinforce"},
        "online": online(prompts_per_rollout=2, group_size=16, rollout=rollout).model_dump(),
        "watch": {"num_prompts": 2, "images_per_prompt": 4, "limits": limits},
        "train": {"max_steps": 16, "learning_rate": 0.01, "eval_steps": 1, "per_device_train_batch_size": 16} | more,
        "evaluate": {"enabled": False, "sampling": {"num_inference_steps": 3}},
        "output_dir": str(out),
    }


@pytest.mark.slow
def test_a_reward_that_is_exploited_is_stopped_by_diversity_and_resumes_exactly(seeing: Path, tmp_path: Path) -> None:
    """The proxy rises while all pictures become one: the end comes before the last step, the same with a cut on the way."""
    whole = train(validate(TrainConfig, hacked(seeing, tmp_path / "whole")))
    seen = looks(whole.folder)
    start, last = seen[0], seen[-1]
    assert last["watch/reward"] > start["watch/reward"] + 0.1
    assert last["watch/diversity"] < 0.7 * start["watch/diversity"]
    assert all(x["watch/diversity"] >= 0.7 * start["watch/diversity"] for x in seen[:-1])
    end = whole.metrics["steps"]
    assert 1 < end < 16
    assert whole.metrics["stopped"].startswith(f"step {end}: watch/diversity fell")
    assert (whole.folder / f"checkpoint-{end}" / "state.json").exists()
    assert [(e["event"], e["limit"]) for e in events(whole.folder)][-1] == ("stop", "diversity")

    train(validate(TrainConfig, hacked(seeing, tmp_path / "cut", max_steps=1)))
    rest = train(validate(TrainConfig, hacked(seeing, tmp_path / "cut") | {"resume_from": "latest"}))
    assert looks(rest.folder) == seen
    assert events(rest.folder) == events(whole.folder) == rest.metrics["events"]
    again = train(validate(TrainConfig, hacked(seeing, tmp_path / "cut") | {"resume_from": "latest"}))
    assert again.metrics["steps"] == end
    assert again.metrics["stopped"] == whole.metrics["stopped"]
    assert looks(again.folder) == seen


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_by_what_one_of_them_saw(tiny: Path, tmp_path: Path) -> None:
    """Real processes over gloo. Only the first looks: without its word the other would train on alone, and hang."""
    watch = {"scorers": ["test_watch:Fading"], "limits": {"Fading": {"drop": 0.5, "action": "stop"}}}
    config = validate(TrainConfig, watched(tiny, tmp_path / "run", watch=watch, train={"max_steps": 6}))
    (tmp_path / "c.yaml").write_text(dump(config))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    port = str(29500 + os.getpid() % 200)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [*launch, "-m", "diffalign", "train", str(tmp_path / "c.yaml")], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["stopped"] == "step 2: watch/Fading fell from 1 to 0, by more than 50 % of what it was"
    assert [x["watch/Fading"] for x in looks(tmp_path / "run")] == [1.0, 1.0, 0.0]
    assert (tmp_path / "run" / "checkpoint-2" / "rng-1.pt").exists()


def test_the_best_weights_are_those_of_the_best_watched_value(tiny: Path, tmp_path: Path) -> None:
    """Every step has a checkpoint; what is exported is the one whose held-out score was highest, not the last."""
    settings = {"max_steps": 4, "learning_rate": 0.02, "load_best": True, "metric_for_best": "watch/greenness"}
    more = {"save_steps": 1, "save_total_limit": 9}
    run = train(validate(TrainConfig, watched(tiny, tmp_path / "run", train=settings | more)))
    seen = {x["step"]: x["watch/greenness"] for x in looks(run.folder) if x["step"]}
    best = max(seen, key=seen.__getitem__)
    assert run.metrics["best"] == {"value": seen[best], "step": best}
    from safetensors.torch import load_file

    exported = weights_of(run.folder)
    of_step = {n: load_file(run.folder / f"checkpoint-{n}" / "weights.safetensors") for n in seen}

    def same(step: int) -> bool:
        stored = sorted(float(x.double().square().sum()) for x in of_step[step].values())
        return stored == sorted(float(x.double().square().sum()) for x in exported.values())

    assert [step for step in seen if same(step)] == [best]


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tiny: Path, tmp_path: Path) -> Path:
    limits = {"prediction_norm": {"above": 1e-9}, "greenness": {"below": -1.0, "action": "stop"}}
    return write_report(train(validate(TrainConfig, watched(tiny, tmp_path / "run", watch={"limits": limits}))).folder)


def test_the_report_shows_the_reward_beside_what_it_stands_for(page: Path) -> None:
    html = page.read_text()
    assert "watch/prediction_norm is 1, above 1e-09" in html
    for label in (
        "Gold against proxy",
        "greenness, held-out",
        "reward of rollouts",
        "Norm of the prediction",
        "Distance from the base",
        "Clip",
    ):
        assert label in html
    assert html.count('alt="step ') == 3
    assert "own samples of shapes:train" in html
    assert "Stopped by a limit" not in html


def test_reward_and_held_out_value_are_drawn_in_deviations_of_the_start() -> None:
    lines = [
        {"step": 0, "rollout/reward": 10.0},
        {"step": 0, "watch/reward": 1.0, "watch/reward_std": 0.5, "watch/gold": 4.0, "watch/gold_std": 2.0},
        {"step": 3, "watch/reward": 2.0, "watch/reward_std": 0.1, "watch/gold": 3.0, "watch/gold_std": 0.1},
        {"step": 3, "rollout/reward": 10.5},
    ]
    assert _gold(lines, "heldout/loss") == {
        "reward": [(0, 0.0), (3, 2.0)],
        "gold, held-out": [(0, 0.0), (3, -0.5)],
        "reward of rollouts": [(0, 0.0), (3, 1.0)],
    }


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 390])
def test_what_was_watched_in_a_browser(page: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
        tab.goto(page.as_uri())
        strips = tab.locator(".strips img")
        assert strips.count() == 3
        assert all(strips.nth(i).evaluate("e => e.complete && e.naturalWidth === 64") for i in range(3))
        assert tab.locator(".watched svg").count() == 6
        assert tab.get_by_role("heading", name="Watching for reward hacking").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()


def test_the_example_of_the_documents_is_a_configuration(tiny: Path, tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (Path(__file__).parents[1] / "docs" / "watch.md").read_text(), re.S)
    assert block is not None
    said = parse_yaml(block[1], "watch.md")
    sections = small(tiny, tmp_path / "run", **said)  # where brightness is the reward, so that the judge is another
    assert validate(TrainConfig, sections).watch.limits["diversity"] == Limit(drop=0.5, action="stop")  # type: ignore[union-attr]
    sections["online"]["reward"] = {}  # the judge's own score
    with pytest.raises(ConfigError, match=r"watch/score, which training pushes up"):
        validate(TrainConfig, sections)


# --- what cannot be watched ------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a value that is misspelt": ({"watch": {"scorers": ["shapes"], "limits": {"diversty": {"drop": 0.5}}}}, "'diversity'"),
    "a value of another scorer": ({"watch": {"scorers": ["shapes"], "limits": {"pickscore": {"below": 1}}}}, "pickscore"),
    "a value with its prefix": ({"watch": {"scorers": ["shapes"], "limits": {"watch/exact": {"below": 1}}}}, "mean 'exact'"),
    "diversity of one": ({"watch": {"images_per_prompt": 1, "scorers": ["shapes"], "limits": {"diversity": {"drop": 0.5}}}},
                         "images_per_prompt"),
    "the best by the reward": ({"train": {"metric_for_best": "watch/reward"}}, "online.reward.scorers"),
    "the best by the rollouts": ({"train": {"metric_for_best": "rollout/reward"}}, "held-out value"),
    "the best by a scorer of the reward": (
        {"watch": {"scorers": ["test_online:brightness"]}, "train": {"metric_for_best": "watch/brightness"}}, "pushes up"
    ),
    "the best by nothing": ({"train": {"metric_for_best": "watch/score"}, "watch": None}, "add the section watch"),
    "a best that is misspelt": ({"train": {"metric_for_best": "heldout/los"}}, "'heldout/loss'"),
    "an unknown scorer": ({"watch": {"scorers": ["beauty"]}}, "unknown scorer 'beauty'"),
    # only known when the scorer was asked
    "a value that a callable does not give": ({"watch": {"limits": {"greeness": {"below": 1}}}}, "mean 'greenness'"),
    "a best that a callable does not give": ({"train": {"metric_for_best": "watch/greeness"}}, "mean 'greenness'"),
    "a scorer with the name of a statistic": ({"watch": {"scorers": ["test_online:brightness"]}}, "another name"),
    "prompts that the judge cannot read": ({"watch": {"scorers": ["shapes"], "prompts": "odd"}}, "watch.scorers: shapes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_watched_is_refused_before_training(case: str, tiny: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    (tmp_path / "odd.txt").write_text("a cat\n")
    sections = watched(tiny, tmp_path / "run", train=change.get("train", {}))
    if "watch" in change:
        sections["watch"] = None if change["watch"] is None else sections["watch"] | change["watch"]
    if sections["watch"] and sections["watch"].get("prompts") == "odd":
        sections["watch"]["prompts"] = str(tmp_path / "odd.txt")
    with pytest.raises(ConfigError, match=said):
        train(validate(TrainConfig, sections))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("reward", "scorers", "refused"),
    [
        ({"scorers": ["shapes"], "weights": {"score": 1.0}}, ["shapes"], True),
        ({"scorers": ["shapes"], "weights": {"cleanliness": 1.0}}, ["shapes"], False),
        ({"scorers": ["minimum:shapes|taste:margin"], "weights": {"minimum": 1.0}}, ["shapes"], True),
        ({"scorers": ["gate:compressibility|taste:margin|0"], "weights": {"gate": 1.0}}, ["shapes"], False),
        ({"scorers": ["taste:margin"], "weights": {"taste_margin": 1.0}}, ["taste:margin"], True),
        ({"scorers": ["taste:margin"], "weights": {"taste_margin": 1.0}}, ["taste:margin", "shapes"], False),
    ],
)
def test_the_best_of_the_select_split_is_no_part_of_the_reward(
    reward: dict[str, Any], scorers: list[str], refused: bool, tiny: Path, tmp_path: Path
) -> None:
    """Other prompts do not make the judge that pays a held-out one."""
    sections = small(tiny, tmp_path / "run", online=online(reward=reward).model_dump())
    sections["train"] |= {"metric_for_best": "select/score", "eval_steps": 1}
    sections["evaluate"] = {"scorers": scorers, "sampling": {"num_inference_steps": 2}}
    if refused:
        with pytest.raises(ConfigError, match=r"select/score, which training pushes up"):
            validate(TrainConfig, sections)
    else:
        validate(TrainConfig, sections)


@pytest.mark.parametrize("weights", [{}, {"clip": 2.0}])
def test_the_best_by_a_reward_that_is_differentiated_is_refused(weights: dict[str, float], tiny: Path, tmp_path: Path) -> None:
    """There every scorer counts, with a weight or without."""
    sections = direct_small(tiny, tmp_path / "run", train={"eval_steps": 1, "metric_for_best": "watch/clip"})
    sections["direct"] |= {"reward": {"scorers": ["clip:shapes-clip"], "weights": weights}}
    with pytest.raises(ConfigError, match=r"watch/clip, which training pushes up"):
        validate(TrainConfig, sections | {"watch": {"scorers": ["clip:shapes-clip"]}})


def test_scorers_give_the_values_that_are_told_before_they_are_asked() -> None:
    for name in SCORERS:
        if name not in SEVERAL and (card := card_of(name)) is not None:
            assert values_of(name) == {card.name}
    from diffalign.scorers import ScoreInput

    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    found = ShapesScorer()(ScoreInput([grey], ["a red circle on a grey background"]))
    assert set(found.values) == values_of("shapes")
    assert values_of("test_watch:greenness") is None
