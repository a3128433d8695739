"""Configurations: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.errors import ConfigError
from diffalign.objectives import MaPO, Sigmoid
from diffalign.recipes import TrainConfig
from diffalign.spec import differences, dump, load, load_config, load_yaml, parse_override, validate, with_overrides

MINIMAL = {"objective": {"type": "sigmoid", "beta": 10}, "output_dir": "runs/x"}


def test_every_mistake_is_in_one_report_with_its_key_and_remedy() -> None:
    wrong = {
        "objective": {"type": "sigmoid", "bta": 3, "kappa": -1},
        "train": {"learning_rat": 1e-4, "max_steps": 2.5},
        "timesteps": {"type": "unifrm"},
        "evaluate": {"scorers": ["shape"]},
    }
    with pytest.raises(ConfigError) as e:
        validate(TrainConfig, wrong)
    text = str(e.value)
    for part in (
        "7 mistakes",
        "objective.bta: unknown key, did you mean 'beta'?",
        "objective.kappa: Input should be greater than 0 (got -1)",
        "train.learning_rat: unknown key, did you mean 'learning_rate'?",
        "train.max_steps: Input should be a valid integer",
        "timesteps: unknown type 'unifrm', did you mean 'uniform'?",
        "unknown scorer 'shape'",
        "output_dir: missing",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train.max_steps=0", "train.max_steps"),
        ("train.per_device_train_batch_size=-1", "train.per_device_train_batch_size"),
        ("train.adam_beta2=1", "train.adam_beta2"),
        ("train.ema_decay=1.0", "train.ema_decay"),
        ("train.caption_dropout=2", "train.caption_dropout"),
        ("train.mixed_precision=fp8", "train.mixed_precision"),
        ("train.optimizer=sgd", "train.optimizer"),
        ("objective.beta=-3", "objective.beta"),
        ("objective.beta=.inf", "objective.beta"),
        ("model.lora.rank=0", "model.lora.rank"),
        ("data.holdout=1", "data.holdout"),
        ("timesteps={type: uniform, low: 0.8, high: 0.2}", "timesteps"),
        ("evaluate.num_prompts=0", "evaluate.num_prompts"),
        ("evaluate.sampling.guidance_scale=-0.5", "evaluate.sampling.guidance_scale"),
        ("version=2", "version"),
    ],
)
def test_every_number_is_checked(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        validate(TrainConfig, with_overrides(MINIMAL, [override]))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.holdout=0", "train.load_best=true"], "data.holdout"),
        (["train.early_stopping_patience=2", "train.eval_steps=0"], "train.eval_steps"),
        (["train.metric_for_best=select/score", "evaluate.prompts=mine.txt"], "select/score"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        validate(TrainConfig, with_overrides(MINIMAL, overrides))


def test_dump_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = validate(TrainConfig, MINIMAL)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "c.yaml") == config


def test_a_list_of_objectives_keeps_order_and_weights() -> None:
    config = validate(TrainConfig, MINIMAL | {"objective": [{"type": "dpo", "beta": 7}, {"type": "sft", "weight": 0.1}]})
    assert config.objective[0] == Sigmoid(beta=7)
    assert config.objective[1].weight == 0.1
    with pytest.raises(ConfigError, match=r"objective\.1\.bta"):
        validate(TrainConfig, MINIMAL | {"objective": [{"type": "dpo"}, {"type": "sft", "bta": 1}]})


def test_a_plug_in_is_named_by_its_import_path_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = validate(TrainConfig, MINIMAL | {"objective": {"type": "tests.test_objectives:Broken", "weight": 2}})
    assert type(config.objective[0]).__name__ == "Broken"
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "c.yaml") == config
    for bad, why in (("no.such:Class", "cannot import"), ("pathlib:Path", "not a subclass")):
        with pytest.raises(ConfigError, match=why):
            validate(TrainConfig, MINIMAL | {"objective": {"type": bad}})


def test_another_type_drops_the_keys_of_the_old_one() -> None:
    config = validate(TrainConfig, with_overrides(MINIMAL, ["objective.type=mapo"]))
    assert config.objective == (MaPO(),)
    either_order = [["objective.type=mapo", "objective.beta=0.5"], ["objective.beta=0.5", "objective.type=mapo"]]
    assert all(validate(TrainConfig, with_overrides(MINIMAL, o)).objective == (MaPO(beta=0.5),) for o in either_order)


def test_no_and_on_are_words_unless_a_switch_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "objective: {type: sigmoid, beta: 10}\noutput_dir: on\ntrain: {mixed_precision: no}\nevaluate: {enabled: no}\n"
    )
    config = load_config(TrainConfig, tmp_path / "c.yaml", ["data.buckets=yes"])
    assert (config.output_dir, config.train.mixed_precision, config.evaluate.enabled) == ("on", "no", False)
    assert config.data.buckets is True
    assert (
        load_config(TrainConfig, tmp_path / "c.yaml", ["evaluate.enabled=true", "data.buckets=False"]).evaluate.enabled is True
    )


def test_yaml_floats_and_duplicate_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: 1e-5\nb: 5E3\nc: 1.5e-3\nd: e5\n")
    assert load_yaml(file) == {"a": 1e-5, "b": 5000.0, "c": 1.5e-3, "d": "e5"}
    file.write_text("train:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"'seed' stands twice, line 3"):
        load_yaml(file)


def test_base_files_are_inherited_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {seed: 1, max_steps: 5}\nobjective: {type: sigmoid, beta: 3}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {seed: 2}\nobjective: {type: sft}\n")
    assert load_yaml(tmp_path / "top.yaml") == {"train": {"seed": 2, "max_steps": 5}, "objective": {"type": "sft"}}
    (tmp_path / "base.yaml").write_text("base: top.yaml\n")
    with pytest.raises(ConfigError, match="leads back"):
        load_yaml(tmp_path / "top.yaml")


@pytest.mark.parametrize(
    ("text", "part"), [("- 1\n", "must be a mapping"), ("a: [1\n", "not valid YAML"), ("a: b: c\n", "not valid YAML")]
)
def test_bad_files_are_named(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")


def test_overrides_are_yaml_and_checked() -> None:
    assert parse_override("train.learning_rate=1e-5") == {"train": {"learning_rate": 1e-5}}
    assert parse_override("--data.path=a=b") == {"data": {"path": "a=b"}}
    assert parse_override("evaluate.scorers=[shapes, taste:size]") == {"evaluate": {"scorers": ["shapes", "taste:size"]}}
    for bad in ("train.seed", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="key=value"):
            parse_override(bad)


def test_schema_names_every_objective() -> None:
    text = json.dumps(TrainConfig.model_json_schema())
    assert all(name in text for name in ("sigmoid", "mapo", "sft", "uniform", "logit_normal"))


def test_differences_name_leaves() -> None:
    a = validate(TrainConfig, MINIMAL)
    b = validate(TrainConfig, with_overrides(MINIMAL, ["train.seed=3", "objective.beta=11"]))
    assert differences(a, b) == [("objective.beta", 10.0, 11.0), ("train.seed", 0, 3)]


def test_a_run_directory_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.yaml").write_text(dump(validate(TrainConfig, MINIMAL)))
    assert load_config(TrainConfig, str(tmp_path), ["output_dir=other"]).output_dir == "other"
