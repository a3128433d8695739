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
from diffalign import DPOConfig, DPOTrainer, MaPOConfig, MaPOTrainer, SFTConfig, SFTTrainer
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


@pytest.mark.parametrize(("trainer", "config"), [(DPOTrainer, DPOConfig), (MaPOTrainer, MaPOConfig), (SFTTrainer, SFTConfig)])
def test_rows_in_memory_train(trainer: type, config: type, tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    given = rows(pairs_csv)
    results = []
    for name, data in (("list", given), ("dataset", Dataset.from_list(given))):
        args = config(output_dir=str(tmp_path / name), **SETTINGS)
        results.append(weights(trainer(model=ModelSpec(path=str(tiny)), args=args, train_dataset=data).train().folder))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


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
