"""The tables that the leaderboard prints, of made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HASHES = {"assets": "a", "prompts": "b", "evaluation": "c"}


def test_the_quality_of_labels_is_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from table import labelled

    def write(name: str, exact: list[float]) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"values": {"exact": exact}, "hashes": HASHES}))

    rows = {"dpo-lora": "a judge", "dpo-clip": "a network", "dpo-shuffled": "a coin"}
    write("base", [0.0, 0.5, 0.5, 0.0])
    write("dpo-lora-0", [1.0, 1.0, 1.0, 1.0])
    assert labelled(tmp_path, rows, (0, 1)) == ""  # one row is no comparison
    write("dpo-lora-1", [0.5, 1.0, 1.0, 0.5])
    write("dpo-shuffled-1", [0.0, 0.5, 0.5, 0.0])
    lines = labelled(tmp_path, rows, (0, 1)).splitlines()
    assert len(lines) == 4
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0][:4] == ["dpo-lora", "a judge", "2", "0.875"]
    assert cells[0][4].startswith("+0.625 [")
    assert cells[1] == ["dpo-shuffled", "a coin", "1", "0.250", "+0.000 [+0.000, +0.000]"]


def test_every_row_of_labels_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from leaderboard import DIT_ROWS, LABELLED, ROWS

    assert LABELLED.keys() <= ROWS.keys()
    core = {"dpo", "mapo", "kto", "ipo", "curriculum", "smpo", "dspo", "linear", "safeguard", "rdp", "infonca", "rank-dpo"}
    core |= {"npo", "dro"}
    for rows in (ROWS, DIT_ROWS):
        assert {f"{name}-lora" for name in core} | {"dpo-flipped", "robust-flipped"} <= rows.keys()


def test_rows_are_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from leaderboard import ROOT, WORLDS

    from diffalign.own_pairs import PairsConfig
    from diffalign.recipes import TrainConfig
    from diffalign.selection import SelectConfig
    from diffalign.spec import load, validate

    for world in WORLDS.values():
        for row in world.rows.values():
            file = ROOT / "configs" / row.config if row.config else world.config
            load(TrainConfig, file, [*row.overrides, "output_dir=x"])
            validate(PairsConfig, {**row.pairs, "output_dir": "x"})
            validate(SelectConfig, {"path": "x", "reward": {"score": 1.0}, **row.chosen, "output_dir": "y"})


def test_variants_of_the_studies_are_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from studies import ALL

    from diffalign.catalogue import shipped_configs
    from diffalign.recipes import TrainConfig
    from diffalign.spec import load

    for study in ALL.values():
        for _, overrides in study.variants.values():
            file = shipped_configs()[study.config.removesuffix(".yaml")]
            load(TrainConfig, file, [*study.overrides, *overrides, "output_dir=x"])


def test_looks_of_a_study_tell_where_gold_was_best_and_what_spoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from studies import STOP, alarms, figure, hacking_table, safeguards_table

    gold, second = [0.3, 0.5, 0.4, 0.2], [0.8, 0.85, 0.9, 0.7]
    looks = [
        {
            "step": 10 * i, "watch/reward": 20.0 + i, "watch/exact": gold[i], "watch/second_score": second[i],
            "watch/cleanliness": 0.8, "watch/diversity": 0.2 - 0.011 * i,
        }
        for i in range(4)
    ]  # fmt: skip
    assert alarms(looks) == {"diversity": 20, "second_score": 20}  # 0.178 of 0.2; 0.9 of 0.8
    found = {"seed": 1, "looks": looks, "overrides": ["train.seed=1"]}
    kept = {**found, "overrides": [*found["overrides"], *STOP]}  # the same training, of which other weights were kept
    runs = {"clip": [found], "clip-early-stop": [kept]}
    cells = [c.strip() for c in hacking_table(runs).splitlines()[2].strip("|").split("|")]
    assert len(hacking_table(runs).splitlines()) == 3
    assert cells[1:8] == ["1", "20.000 to 23.000", "0.300", "0.500 (10)", "0.400 (20)", "0.200", "0.800 to 0.800"]
    assert cells[9] == "diversity (20), second_score (20)"
    assert figure({"hacking": runs}).startswith("<?xml")
    low, values = [0.0, 0.5, 0.5, 1.0], {"cleanliness": [0.8] * 4, "second_score": [0.9] * 4}

    def run(seed: int, by: float) -> dict[str, Any]:
        return {"seed": seed, "values": {"exact": [x + by for x in low], **values}, "diversity": 0.1, "train_seconds": 60.0}

    both = {"clip": [run(0, 0.1), run(1, 0.2)], "kl": [run(0, 0.4)]}
    lines = safeguards_table(both, {"values": {"exact": low}}).splitlines()
    assert [c.strip() for c in lines[2].strip("|").split("|")][:3] == ["clip", "2", "0.650"]
    assert "+0.150 [" in lines[2]
    cells = [c.strip() for c in lines[3].strip("|").split("|")]
    assert cells[3:5] == ["+0.400 [+0.400, +0.400]", "+0.300 [+0.300, +0.300]"]  # of the seed that both have
