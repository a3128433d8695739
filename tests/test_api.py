"""The Python interface does what the command line does."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffalign
from diffalign import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    MaPOConfig,
    MaPOTrainer,
    ORPOConfig,
    ORPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from diffalign.errors import ConfigError, DataError
from diffalign.models import LoRA, ModelSpec
from diffalign.recipes import TrainConfig, train
from diffalign.spec import load, validate

SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lora": LoRA(rank=4)}


def rows(table: Path) -> list[dict[str, object]]:
    with table.open() as f:
        return [
            {"prompt": r["prompt"], **{k: Image.open(table.parent / r[k]) for k in ("chosen", "rejected")}}
            for r in csv.DictReader(f)
        ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_a_trainer_is_the_command(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path / "api"), beta=700, **SETTINGS)
    done = DPOTrainer(model=tiny, args=args, train_dataset=pairs_csv).train()
    resolved = load(TrainConfig, done.folder / "config.resolved.yaml")
    again = validate(TrainConfig, resolved.model_dump(mode="json") | {"output_dir": str(tmp_path / "cli")})
    train(again)
    a, b = weights(tmp_path / "api"), weights(tmp_path / "cli")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert resolved.objective[0].beta == 700


TRAINERS = [(DPOTrainer, DPOConfig), (MaPOTrainer, MaPOConfig), (KTOTrainer, KTOConfig), (SFTTrainer, SFTConfig)]


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_rows_in_memory_train(trainer: type, config: type, tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    given = rows(pairs_csv)
    results = []
    for name, data in (("list", given), ("dataset", Dataset.from_list(given))):
        args = config(output_dir=str(tmp_path / name), **SETTINGS)
        results.append(weights(trainer(model=ModelSpec(path=str(tiny)), args=args, train_dataset=data).train().folder))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_labelled_rows_train_and_are_the_table(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    """The same images as rows with labels, as pairs that are taken apart, and as the table on disk."""
    given = rows(pairs_csv)
    apart = [{"prompt": r["prompt"], "image": r[k], "label": k == "chosen"} for r in given for k in ("chosen", "rejected")]
    results = []
    for name, data in (("labels", apart), ("pairs", given), ("table", pairs_csv)):
        args = KTOConfig(output_dir=str(tmp_path / name), positive_share=0.8, **SETTINGS)
        results.append(weights(KTOTrainer(model=tiny, args=args, train_dataset=data).train().folder))
    assert all(torch.equal(results[0][k], x[k]) for x in results for k in x)
    with pytest.raises(DataError, match="train_dataset, row 1: no image; found prompt, label"):
        KTOTrainer(model=tiny, args=args, train_dataset=[{"prompt": "a", "label": 1}])


@pytest.mark.parametrize(
    ("trainer", "args", "wanted"),
    [
        (CPOTrainer, CPOConfig(output_dir="x", beta=300, cpo_alpha=0.5), ["cpo 300 0.5"]),
        (CPOTrainer, CPOConfig(output_dir="x", loss_type="simpo", cpo_alpha=0), ["simpo 500 0.5"]),
        (CPOTrainer, CPOConfig(output_dir="x", loss_type="simpo", cpo_alpha=2), ["simpo 500 0.5", "sft 2"]),
        (ORPOTrainer, ORPOConfig(output_dir="x", beta=0.2), ["orpo 10 0.2"]),
        (KTOTrainer, KTOConfig(output_dir="x", undesirable_weight=2), ["kto 5000 1"]),
    ],
)
def test_trainers_without_a_reference_and_of_labels(trainer: type, args: object, wanted: list[str], tmp_path: Path) -> None:
    config = trainer(model="shapes-unet", args=args, train_dataset="shapes-pairs").config
    second = {"cpo": "cpo_alpha", "simpo": "simpo_gamma", "orpo": "orpo_lambda", "kto": "kappa"}
    said = [
        f"sft {o.weight:g}" if o.type == "sft" else f"{o.type} {o.beta:g} {getattr(o, second[o.type]):g}"
        for o in config.objective
    ]
    assert said == wanted


def test_generate_with_a_trained_adapter(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path / "run"), **SETTINGS | {"learning_rate": 0.3})
    done = DPOTrainer(model=tiny, args=args, train_dataset=pairs_csv).train()
    prompts = ["a red circle on a grey background", "a blue square, navy background"]
    base = diffalign.generate(tiny, prompts, num_images_per_prompt=2, num_inference_steps=2)
    again = diffalign.generate(tiny, prompts[1:], num_images_per_prompt=1, num_inference_steps=2)
    trained = diffalign.generate(tiny, prompts, adapter=done.folder, num_inference_steps=2)
    assert [len(images) for images in base] == [2, 2]
    assert base[1][0].tobytes() == again[0][0].tobytes()
    assert base[0][0].tobytes() != trained[0][0].tobytes()


def test_evaluate_measures_a_run_again(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path / "run"), **SETTINGS)
    done = SFTTrainer(model=tiny, args=args, train_dataset=pairs_csv).train()
    found = diffalign.evaluate(done.folder, num_prompts=4, images_per_prompt=1, scorers=["shapes"])
    assert found["prompts"] == 4
    assert 0 <= found["base"]["score"] <= 1


def test_a_config_of_another_trainer_is_refused(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DPOTrainer needs a DPOConfig, got SFTConfig"):
        DPOTrainer(model=tiny, args=SFTConfig(output_dir=str(tmp_path)), train_dataset=pairs_csv)


def test_settings_that_contradict_each_other_are_named(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), early_stopping_patience=2, eval_steps=0)
    with pytest.raises(ConfigError, match=r"args: 1 mistake\n.*train\.early_stopping_patience needs train\.eval_steps"):
        DPOTrainer(model=tiny, args=args, train_dataset=pairs_csv)


def test_a_row_without_a_loser_is_named(tiny: Path, tmp_path: Path) -> None:
    row = {"prompt": "a red circle on a grey background", "chosen": Image.new("RGB", (32, 32)), "rejected": None}
    with pytest.raises(DataError, match="train_dataset, row 1: rejected is empty"):
        DPOTrainer(model=tiny, args=DPOConfig(output_dir=str(tmp_path)), train_dataset=[row])


def test_importing_the_package_is_instant() -> None:
    code = "import sys, diffalign; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
