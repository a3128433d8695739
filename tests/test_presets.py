"""Every method's preset takes two steps on a tiny model of its family, with data of its kind."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from math import isfinite, log
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file

from diffalign.catalogue import kind_of, shipped_configs
from diffalign.generation import GenerateConfig
from diffalign.own_pairs import PairsConfig, make_pairs
from diffalign.recipes import TrainConfig, train
from diffalign.round_pairs import Judged
from diffalign.selection import SelectConfig
from diffalign.spec import load, validate
from diffalign.train.tracking import read_metrics

PRESETS = [n for n in shipped_configs() if n.startswith("presets/") and "/memory/" not in n]
TRAINED = [n for n in PRESETS if kind_of(n) == "train"]
METHODS = [n for n in TRAINED if load(TrainConfig, shipped_configs()[n]).online is None]
CANONICAL = ["diffusion-dpo", "mapo", "diffusion-kto", "rank-dpo", "linear-dpo"]
CORE = [*CANONICAL, "diffusion-dro", "local-dpo", "smpo", "safeguard-dpo", "curriculum-dpo", "dspo", "rdp", "spin-diffusion"]
OWN = ("presets/reconstructed/pnapo", "presets/reconstructed/ppd")
"""Those that need a dataset folder of a kind of its own: tests below, and in tests/test_people.py."""
AT_REST = dict.fromkeys(("sigmoid", "loser_scale", "smpo", "robust"), log(2)) | {"ipo": 1 / 4}
"""The loss where policy and reference are the same, by hand: -log sigmoid(0), and IPO's (0 - 1/2)^2."""
UNETS = ("presets/reconstructed/hg-dpo", "presets/rethinking-dpo")
"""Adapt the text encoder, which a DiT's families do not; weigh by sigma / alpha, which is infinite at the end of a flow."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few pictures as pairs with scores and captions of the losers' own, as the same pairs serve for labels; as groups."""
    folder = tmp_path_factory.mktemp("method-data")
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
    head = ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "rejected_prompt", "group"]
    segments = '[{"box": [0, 0, 16, 32], "label": 1}, {"box": [16, 0, 32, 32], "label": -1}]'
    with (folder / "pairs.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow([*head, "kind", "region", "segments"])
        for i in range(8):
            said = [f"picture {i}", f"{i}.png", f"{(i + 1) % 8}.png", 0.5 + i / 20, 0.4, f"no picture {i}", "ab"[i % 2]]
            table.writerow([*said, i % 2, "[0, 0, 16, 16]", segments])
    names = '["0.png", "1.png", "2.png", "3.png"]'
    lines = [f'{{"prompt": "group {i}", "images": {names}, "scores": [0.9, 0.6, 0.3, 0.1]}}' for i in range(6)]
    (folder / "groups.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(8)) + "\n")
    return {
        "prompts": str(folder / "prompts.txt"),
        "pairs": str(folder / "pairs.csv"),
        "labels": str(folder / "pairs.csv"),
        "groups": str(folder / "groups.jsonl"),
    }


def moved(out: Path, model: Path) -> bool:
    """Whether what a run left differs from what it began with: LoRA's second factors from 0, weights from the model's."""
    if adapters := [*out.glob("pytorch_lora_weights.safetensors"), *out.glob("adapter_model.safetensors")]:
        return any(x.any() for k, x in load_file(adapters[0]).items() if "lora_B" in k or "lora.up" in k)
    (net,) = (out / part for part in ("unet", "transformer") if (out / part).is_dir())
    before = load_file(model / net.name / "diffusion_pytorch_model.safetensors")
    after = load_file(net / "diffusion_pytorch_model.safetensors")
    return any(not torch.equal(x.float(), before[k].float()) for k, x in after.items())


def two_steps(name: str, model: Path, tables: dict[str, str], out: Path) -> dict[str, Any]:
    path = shipped_configs()[name]
    plan = load(TrainConfig, path)
    small = ["train.max_steps=2", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"]
    small += ["train.warmup_steps=0"]
    more = ["train.logging_steps=1", "model.gradient_checkpointing=false", "model.resolution=null"]
    if plan.direct is None:
        more += [f"data.path={tables[plan.total.data]}", "data.resolution=null"]
    else:  # the shipped CLIP in the place of the published ones
        stand_in = "decomposed" if "decomposed" in plan.direct.reward.scorers[0] else "clip"
        more += [f"direct.reward.scorers=[{stand_in}:shapes-clip]", "direct.prompts=shapes:train", "direct.num_prompts=8"]
        more += ["direct.sampling.rule.type=ode", "model.long_prompts=truncate"] if "sd3" in model.name else []
    if plan.rounds is not None:
        more += ["rounds.count=2", "rounds.num_prompts=6", "rounds.sampling.num_inference_steps=1", "data.holdout=0"]
        more += [f"rounds.prompts={tables['prompts']}"] if plan.rounds.prompts is not None else []
        if isinstance(plan.rounds.source, Judged):
            more += [f"rounds.source.{x}" for x in ("scorers=[compressibility]", "reward=null", "reward={compressibility: 1}")]
    more += ["model.max_sequence_length=16"] if any(t5 in model.name for t5 in ("sd3", "flux", "pixart")) else []
    config = load(TrainConfig, path, [f"model.path={model}", f"output_dir={out}", *small, *more])
    metrics = train(config).metrics
    assert metrics["steps"] == (2 if plan.rounds is None else 4)
    lines = [x for x in read_metrics(out) if "loss" in x]
    assert all(isfinite(x["loss"]) for x in lines)
    (first, *others) = plan.total.parts
    weighed = plan.train.balance_kinds is not None or plan.data.groups is not None
    if not others and not weighed and (kind := getattr(first, "type", "")) in AT_REST:
        assert lines[0]["loss"] == pytest.approx(first.weight * AT_REST[kind], rel=1e-6)
    assert moved(out, model)
    assert plan.direct is None or metrics["reward_calls"] >= 4
    return {"passes": metrics["denoiser_passes"], "first": lines[0]}


@pytest.mark.parametrize(
    "name", [n if n.rpartition("/")[2] in CORE else pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in OWN]
)
def test_a_preset_takes_two_steps_on_a_unet(
    name: str, folder_of: Callable[[str], Path], tables: dict[str, str], tmp_path: Path
) -> None:
    of = load(TrainConfig, shipped_configs()[name]).model.path
    family = "sdxl" if "sdxl" in of else "sd3" if "3.5" in of else "sd"
    two_steps(name, folder_of(family), tables, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHODS if n not in (*OWN, *UNETS)])
def test_a_preset_takes_two_steps_on_a_dit(
    name: str, folder_of: Callable[[str], Path], tables: dict[str, str], tmp_path: Path
) -> None:
    two_steps(name, folder_of("sd3"), tables, tmp_path / "run")


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_pictures_of_the_model_are_trained_at_their_own_noise(
    family: str, folder_of: Callable[[str], Path], tables: dict[str, str], tmp_path: Path
) -> None:
    """PNAPO on images that the very model generated, from the first image to the finished run."""
    model, judge = folder_of(family), {"scorers": ["compressibility"], "reward": {"compressibility": 1}}
    texts = {"max_sequence_length": 16, "long_prompts": "truncate"} if family == "sd3" else {}
    settings = {
        "model": {"path": str(model), **texts}, "num_prompts": 6, "images_per_prompt": 2, "output_dir": str(tmp_path / "made"),
        "sampling": {"num_inference_steps": 1}, "rule": {"type": "best_worst"}, **judge,
    }  # fmt: skip
    own = make_pairs(validate(PairsConfig, settings))
    two_steps("presets/reconstructed/pnapo", model, tables | {"pairs": str(own)}, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux-dev", "pixart-sigma"])
@pytest.mark.parametrize("name", CANONICAL)
def test_five_canonical_methods_train_on_every_family(
    name: str, family: str, folder_of: Callable[[str], Path], tables: dict[str, str], tmp_path: Path
) -> None:
    two_steps(f"presets/{name}", folder_of(family), tables, tmp_path / "run")


def test_presets_say_where_they_come_from() -> None:
    for name in PRESETS:
        head = [line for line in shipped_configs()[name].read_text().splitlines() if line.startswith("#")]
        assert len(head) >= 2, name
        assert re.search(r"arXiv \d{4}\.\d{5}|https?://", "\n".join(head)), name
        assert ("/reconstructed/" in name) == head[0].startswith("# status: reconstruction"), name


def test_presets_of_data_are_valid_for_their_verb() -> None:
    found = {kind: [n for n in PRESETS if kind_of(n) == kind] for kind in ("pairs", "generate")}
    assert len(found["pairs"]) == 4
    assert len(found["generate"]) == 1
    for kind, cls in (("pairs", SelectConfig), ("generate", GenerateConfig)):
        for name in found[kind]:
            load(cls, shipped_configs()[name])
            assert f"For `diffalign {kind}`" in shipped_configs()[name].read_text(), name


def test_the_rows_of_the_leaderboard_are_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from leaderboard import WORLDS

    for world in WORLDS.values():
        for row in world.rows.values():
            config = shipped_configs()[row.config.removesuffix(".yaml")] if row.config else world.config
            load(TrainConfig, config, [*row.overrides, "output_dir=x"])


def test_the_verified_core_is_there() -> None:
    core = "diffusion-dpo mapo diffusion-kto ipo robust-dpo curriculum-dpo smpo diffusion-npo dspo linear-dpo safeguard-dpo"
    for name in [*core.split(), "infonca", "rdp", "rank-dpo", "diffusion-dro"]:
        assert f"presets/{name}" in METHODS
