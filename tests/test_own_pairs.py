"""Pairs and groups of a model's own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.data.examples import read_groups
from diffalign.data.pairs import read_pairs
from diffalign.data.tables import read_table
from diffalign.own_pairs import PairsConfig, make_pairs
from diffalign.spec import validate


def made(tiny: Path, out: Path, **more: Any) -> Path:
    settings = {
        "model": {"path": str(tiny)}, "num_prompts": 5, "images_per_prompt": 5, "shard_size": 3, "output_dir": str(out),
        "sampling": {"num_inference_steps": 2}, **more,
    }  # fmt: skip
    return make_pairs(validate(PairsConfig, settings))


def test_groups_are_kept_beside_the_pairs(tiny: Path, tmp_path: Path) -> None:
    folder = made(tiny, tmp_path, group_size=3)
    groups = read_groups(str(folder), 3)
    assert len(groups) == 5
    by_prompt = {g.prompt: g for g in groups}
    for group in groups:
        assert sorted(group.scores or (), reverse=True) == list(group.scores or ())
    for pair in read_pairs(folder):  # best against worst: the ends of the group
        group = by_prompt[pair.prompt]
        assert (group.pictures[0].key, group.pictures[-1].key) == (pair.chosen.key, pair.rejected.key)
        assert pair.scores
        assert group.scores
        assert pair.scores[0] == pytest.approx(group.scores[0] - group.scores[-1], abs=1e-6)


def test_without_them_nothing_is_as_it_was_not(tiny: Path, tmp_path: Path) -> None:
    """The same pairs with and without groups, and a folder of before goes on."""
    with_groups, without = made(tiny, tmp_path / "a", group_size=3), made(tiny, tmp_path / "b")
    assert read_table(with_groups, "pairs").equals(read_table(without, "pairs"))
    assert not (without / "groups").exists()
    assert '"group_size"' not in (without / "manifest.json").read_text()
    made(tiny, tmp_path / "b")


def test_an_ensemble_of_two_scales_goes_by_rank(tiny: Path, tmp_path: Path) -> None:
    """A value a thousand times larger does not drown the other."""
    scale = {"scorers": ["shapes", "taste:size"], "reward": {"cleanliness": 1.0, "taste_size": 1.0}, "units": "rank"}
    one = made(tiny, tmp_path / "one", **scale, group_size=5)
    for group in read_groups(str(one), 5):
        assert all(8 * s == pytest.approx(round(8 * s)) and 0 <= s <= 2 for s in group.scores or ())  # ties share a rank
