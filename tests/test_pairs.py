"""From scored images to pairs: every rule against a brute-force reading of its definition, and the verb over tables."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cli import main
from diffalign.data.grouped import within_rank, within_std
from diffalign.data.images import encode_png
from diffalign.data.pairs import read_pairs
from diffalign.data.tables import read_table, write_shard
from diffalign.errors import ConfigError, DataError
from diffalign.pairs import (
    PAIR_RULES,
    Adjacent,
    Agreement,
    AllPairs,
    Angle,
    BestSigma,
    BestWorst,
    Confident,
    Group,
    Pareto,
    Preference,
    RankThenSift,
    Threshold,
    TopBottom,
    capped,
)
from diffalign.selection import Density, SelectConfig, select
from diffalign.spec import validate
from tests.conftest import picture

LISTS = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=7)


def ends(pairs: list[Preference]) -> list[tuple[int, int]]:
    return [(p.chosen, p.rejected) for p in pairs]


# --- rules ----------------------------------------------------------------------------------------------------------


def every_rule() -> list[Any]:
    needed = {"rank_then_sift": {"rank_by": "a"}, "angle": {"x": "a", "y": "b"}, "agreement": {"scores": ["a", "b"]}}
    return [PAIR_RULES.validate({"type": n, **needed.get(n, {})}) for n in PAIR_RULES.options]


@pytest.mark.parametrize("rule", every_rule(), ids=lambda r: r.type)
@given(rewards=LISTS, seed=st.integers(0, 99))
def test_every_rule_keeps_its_promises(rule: Any, rewards: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {n: rng.integers(-3, 4, len(rewards)).astype(float).tolist() for n in "ab"}
    group = Group(rewards, scores)
    pairs = rule(group)
    assert pairs == rule(group)
    assert all(p.margin == rewards[p.chosen] - rewards[p.rejected] > 0 for p in pairs)
    assert len({frozenset(e) for e in ends(pairs)}) == len(pairs)  # never both ways, never twice
    assert rule(Group([1.0] * len(rewards), dict.fromkeys("ab", [0.0] * len(rewards)))) == []
    assert rule(Group([1.0], {"a": [0.0], "b": [0.0]})) == []
    if rule.type != "rank_then_sift":  # which looks at positions
        turn = rng.permutation(len(rewards)).tolist()
        turned = rule(Group([rewards[i] for i in turn], {n: [s[i] for i in turn] for n, s in scores.items()}))
        if len(set(rewards)) == len(rewards):
            assert {(turn[i], turn[j]) for i, j in ends(turned)} == set(ends(pairs))


@given(rewards=LISTS)
def test_pairs_by_definition(rewards: list[float]) -> None:
    group, n = Group(rewards), len(rewards)
    wider = {(i, j) for i, j in permutations(range(n), 2) if rewards[i] - rewards[j] > 2}
    assert set(ends(AllPairs(min_margin=2)(group))) == wider
    (best,) = BestWorst()(group) or [None]
    assert best is None or best.margin == max(rewards) - min(rewards)
    assert [p.margin for p in Adjacent()(group)] == [d for d in -np.diff(sorted(rewards, reverse=True)) if d > 0]
    ranked = sorted(rewards, reverse=True)
    k = min(2, n // 2)
    assert [p.margin for p in TopBottom(k=2)(group)] == [m for i in range(k) if (m := ranked[i] - ranked[-1 - i]) > 0]
    crossed = Counter(ranked[i] - ranked[-1 - j] for i in range(k) for j in range(k))
    del crossed[0.0]
    assert Counter(p.margin for p in TopBottom(k=2, cross=True)(group)) == crossed


def test_the_loser_nearest_to_two_deviations_below_the_mean() -> None:
    # mean 5, deviation sqrt(10): mean - 2 deviations = -1.32, nearest 0; mean - 1 deviation = 1.84, nearest 2.5
    rewards = [10.0, 0.0, 5.0, 2.5, 7.5]
    mean, std = np.mean(rewards), np.std(rewards)
    assert (mean, std) == (5.0, pytest.approx(math.sqrt(12.5)))
    assert ends(BestSigma()(Group(rewards))) == [(0, 1)]
    assert ends(BestSigma(sigmas=1)(Group(rewards))) == [(0, 3)]


def test_rank_then_sift_compares_numbers_and_leaves_ties_out() -> None:
    # pairs (0,1), (2,3), (4,5); the second is equal; as strings "9" > "10" would win
    dropped: Counter[str] = Counter()
    group = Group([9.0, 1.0, 99.0, -99.0, 10.0, 2.0], {"judge": [1.0, 0.0, 5.0, 5.0, 1.0, 0.0]})
    assert ends(RankThenSift(rank_by="judge")(group, dropped)) == [(4, 1)]
    assert dropped == {"equal in the first comparison": 1}
    lost = Group([1.0, 2.0], {"judge": [1.0, 0.0]})  # the winner of the comparison scores lower: dropped
    assert RankThenSift(rank_by="judge")(lost, dropped) == []
    assert dropped["margin too small"] == 1


@given(seed=st.integers(0, 999))
def test_dominance_and_agreement_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s = rng.integers(0, 3, (3, 5)).astype(float)
    group = Group(s.sum(0).tolist(), {n: s[i].tolist() for i, n in enumerate("abc")})
    want = {(i, j) for i, j in permutations(range(5), 2) if (s[:, i] >= s[:, j]).all() and (s[:, i] > s[:, j]).any()}
    assert set(ends(Pareto()(group))) == want
    dropped: Counter[str] = Counter()
    assert len(Pareto()(group, dropped)) + sum(dropped.values()) == 10
    two = {(i, j) for i, j in permutations(range(5), 2) if (s[:, i] > s[:, j]).sum() >= 2 and s[:, i].sum() > s[:, j].sum()}
    assert set(ends(Agreement(at_least=2)(group))) == two
    with pytest.raises(ConfigError, match="not more than half"):
        Agreement(at_least=1)(group)


def test_the_angle_says_which_gains_count() -> None:
    x, y = [0.0, 1.0, 2.0], [0.0, 1.0, 0.5]
    group = Group([0.0, 1.0, 1.5], {"x": x, "y": y})
    assert set(ends(Angle(x="x", y="y")(group))) == {(1, 0), (2, 0)}  # 2 over 1 gains x and loses y
    steered = Angle(x="x", y="y", low=-60, high=90)(group)
    assert set(ends(steered)) == {(1, 0), (2, 0), (2, 1)}
    with pytest.raises(ConfigError, match="read both ways"):
        validate(Angle, {"x": "a", "y": "b", "low": -90, "high": 90})


def test_threshold_and_confidence_are_the_published_formulas() -> None:
    rewards = [0.0, 1.0, 3.0]
    want = {(i, j) for i, j in permutations(range(3), 2) if 1 / (1 + math.exp(-(rewards[i] - rewards[j]) / 0.5)) > 0.9}
    assert set(ends(Threshold(temperature=0.5, threshold=0.9)(Group(rewards)))) == want == {(2, 0), (2, 1)}
    cosines = [0.20, 0.24, 0.25, 0.29]
    top, low = (np.exp(s * 100 * np.array(cosines)) for s in (1, -1))
    assert (top / top.sum()).max() > 0.5 < (low / low.sum()).max()
    assert ends(Confident()(Group(cosines))) == [(3, 0)]
    dropped: Counter[str] = Counter()
    assert Confident()(Group([0.25, 0.25, 0.25, 0.1]), dropped) == []
    assert Confident()(Group([0.1, 0.3, 0.3]), dropped) == []
    assert dropped == {"the best does not stand out": 1, "too few images for confidence": 1}


def test_caps_keep_the_widest() -> None:
    pairs = AllPairs()(Group([0.0, 1.0, 3.0, 7.0]))
    dropped: Counter[str] = Counter()
    assert ends(capped(pairs, 1, None, dropped)) == [(3, 0), (2, 1)]
    assert dropped == {"enough pairs of the image": 4}
    assert [p.margin for p in capped(pairs, None, 2, Counter())] == [6.0, 7.0]


def test_density_weights_by_hand() -> None:
    # bins of 1: three of four rewards in one, one in the other
    w = Density(bin_width=1.0).weights(np.array([0.1, 0.2, 0.3, 5.5]))
    assert w.tolist() == [1.0, 1.0, 1.0, 3.0]
    assert Density(bin_width=1.0, numerator=0.72).weights(np.array([0.1, 5.5])).tolist() == [1.44, 1.44]


# --- units ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999))
def test_units_equal_a_loop_over_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(-1, 5, 30)
    values = rng.integers(0, 4, 30).astype(float)
    values[rng.random(30) < 0.1] = np.nan
    squares, freedom = 0.0, 0
    for p in range(5):
        v = values[(prompt == p) & np.isfinite(values)]
        squares, freedom = squares + ((v - v.mean()) ** 2).sum() if len(v) else squares, freedom + max(len(v) - 1, 0)
    assert within_std(values, prompt) == pytest.approx(math.sqrt(squares / freedom))
    ranks = within_rank(values, prompt)
    for i in range(30):
        others = [v for j, v in enumerate(values) if j != i and prompt[j] == prompt[i] and np.isfinite(v)]
        if prompt[i] < 0 or not np.isfinite(values[i]) or not others:
            assert np.isnan(ranks[i])
        else:
            assert ranks[i] == pytest.approx(np.mean([(values[i] > o) + (values[i] == o) / 2 for o in others]))


# --- the verb -------------------------------------------------------------------------------------------------------


def sha(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def dataset(folder: Path, prompts: int = 6, k: int = 4, first: int = 0, shards: int = 2, model: str = "m") -> Path:
    """Images whose score ``good`` is the seed of their pixels modulo 10, ``other`` its opposite for odd prompts."""
    rng = np.random.default_rng(first)
    rows, scores = [], []
    for p in range(prompts):
        for i in range(k):
            data = encode_png(picture(first + 100 * p + i, 8))
            value = float(rng.integers(0, 10))
            rows.append({
                "image_id": f"p{p}-{i}", "sha256": sha(data), "prompt_id": f"id{p}", "prompt": f"prompt {p}", "model": model,
                "image": {"bytes": data, "path": None}, "k": i,
            })  # fmt: skip
            for name, v in (("good", value), ("other", -value if p % 2 else value)):
                scores.append({
                    "image_sha256": sha(data), "prompt_sha256": sha(f"prompt {p}"), "scorer": name, "version": "1",
                    "preprocess_version": "1", "value": v,
                })  # fmt: skip
    for n in range(shards):
        write_shard(folder, "images", n, rows[n::shards])
    write_shard(folder, "scores", 0, scores)
    return folder


def config(path: Path | list[Path], out: Path, **more: Any) -> SelectConfig:
    paths = [str(p) for p in ([path] if isinstance(path, Path) else path)]
    return validate(SelectConfig, {"path": paths, "output_dir": str(out), "reward": {"good": 1.0}, **more})


def written(folder: Path, table: str = "pairs") -> list[dict[str, Any]]:
    return read_table(folder, table).to_pylist()


def by_hand(folder: Path) -> dict[str, dict[str, float]]:
    values = {(r["image_sha256"], r["scorer"]): r["value"] for r in read_table(folder, "scores").to_pylist()}
    out: dict[str, dict[str, float]] = {}
    for r in read_table(folder, "images").to_pylist():
        out.setdefault(r["prompt"], {})[r["image_id"]] = values[r["sha256"], "good"]
    return out


def test_pairs_of_tables_equal_a_loop_over_dictionaries(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    done = select(config(folder, folder, rule={"type": "all", "min_margin": 2.0}))
    want = {
        (p, a, b, values[a] - values[b])
        for p, values in by_hand(folder).items()
        for a, b in permutations(values, 2)
        if values[a] - values[b] > 2
    }
    rows = written(folder)
    assert {(r["prompt"], r["chosen_id"], r["rejected_id"], json.loads(r["margins"])["reward"]) for r in rows} == want
    assert (done.pairs, done.prompts, done.images, done.finished) == (len(want), 6, 24, True)
    assert done.dropped["margin too small"] == 6 * 6 - len(want)
    assert len(read_pairs(folder)) == len(want)
    assert not {r["p_win"] for r in rows} - {1.0}


def test_ties_are_explicit_and_soft_labels_follow_the_gap(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    more = {"rule": {"type": "all", "min_margin": 1.0}, "ties": "keep", "temperature": 3.0}
    done = select(config(folder, tmp_path / "out", **more))
    rows = written(tmp_path / "out")
    assert len(rows) == done.pairs == 36
    for r in rows:
        gap = json.loads(r["margins"])["reward"]
        assert r["p_win"] == pytest.approx(0.5 if gap <= 1 else 1 / (1 + math.exp(-gap / 3)))
    assert done.ties == sum(r["p_win"] == 0.5 for r in rows) > 0
    assert len(read_pairs(tmp_path / "out")) == 36 - done.ties  # training leaves ties out


def test_the_same_inputs_give_the_same_bytes_for_any_processes(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    more: dict[str, Any] = {"shard_size": 1, "rule": {"type": "all"}, "bins": 3, "density": {"bin_width": 1.0}, "lists": True}
    select(config(folder, tmp_path / "one", **more))
    for rank in (2, 0, 1):
        done = select(config(folder, tmp_path / "three", **more), rank, 3)
        assert done.made == 2
    assert done.finished
    assert select(config(folder, tmp_path / "three", **more)).made == 0
    files = [sorted(f.rglob("*.*")) for f in (tmp_path / "one", tmp_path / "three")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert len(files[0]) == 3 * 6 + 1
    with pytest.raises(DataError, match=r"another plan \(differs in reward\)"):
        select(config(folder, tmp_path / "one", **{**more, "reward": {"other": 1.0}}))


def test_bins_weights_and_lists(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", prompts=8)
    select(config(folder, folder, rule={"type": "all"}, bins=3, density={"bin_width": 1.0, "exponent": 2.0}, lists=True))
    rows = written(folder)
    margins = {b: [json.loads(r["margins"])["reward"] for r in rows if r["bin"] == b] for b in range(3)}
    assert min(margins[0]) >= max(margins[1]) >= min(margins[1]) >= max(margins[2])
    value = {i: v for p in by_hand(folder).values() for i, v in p.items()}
    count = Counter(value.values())
    most = max(count.values())
    for r in rows:
        a, b = (count[value[r[side]]] for side in ("chosen_id", "rejected_id"))
        assert r["weight"] == pytest.approx((most / math.sqrt(a * b)) ** 2)
    for g in written(folder, "groups"):
        assert g["rewards"] == sorted(g["rewards"], reverse=True) == [value[i] for i in g["image_ids"]]
        assert len(g["image_ids"]) == 4


def test_limits_floors_and_caps_say_why(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    values = [v for p in by_hand(folder).values() for v in p.values()]
    out = tmp_path / "out"
    done = select(config(folder, out, rule={"type": "all"}, limits={"good": [2, None]}, floors={"good": 8}, max_per_prompt=1))
    assert done.images_dropped == {"outside the limits": sum(v < 2 for v in values)}
    images = {r["image_id"] for r in written(out, "images")}
    value = {i: v for p in by_hand(folder).values() for i, v in p.items()}
    rows = written(out)
    assert rows
    assert all(value[r["chosen_id"]] >= 8 and value[r["rejected_id"]] >= 2 for r in rows)
    assert len({r["prompt"] for r in rows}) == len(rows)
    assert images == {r[s] for r in rows for s in ("chosen_id", "rejected_id")}  # only what stands in a pair is copied
    assert done.dropped["winner below the floor of good"] > 0


def test_models_compete_and_their_ids_stay_apart(tmp_path: Path) -> None:
    a, b = dataset(tmp_path / "a", model="a"), dataset(tmp_path / "b", first=7777, model="b")
    out = tmp_path / "out"
    done = select(config([a, b], out, rule={"type": "all"}, units="std"))
    assert done.prompts == 6
    assert done.images == 48
    rows, images = written(out), {r["image_id"]: r for r in written(out, "images")}
    assert {images[r["chosen_id"]]["model"] + images[r["rejected_id"]]["model"] for r in rows} == {"aa", "ab", "ba", "bb"}
    assert all(images[r[s]]["prompt"] == r["prompt"] for r in rows for s in ("chosen_id", "rejected_id"))
    assert len(read_pairs(out)) == len(rows)


def test_unusable_images_are_counted(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", prompts=2)
    rows = read_table(folder, "images").to_pylist()
    rows[0]["phash"] = "blank"
    rows[2]["error"] = "the file is empty"
    rows[4] = {**rows[4], "prompt": None}
    rows.append({**rows[6], "image_id": "again"})
    for shard in (folder / "images").iterdir():
        shard.unlink()
    write_shard(folder, "images", 0, rows)
    failed = [{**written(folder, "scores")[-1], "value": None, "error": "it broke"}]  # the latest attempt counts
    write_shard(folder, "scores", 1, failed)
    done = select(config(folder, tmp_path / "out", reward={"good": 1.0, "other": 1.0}))
    assert done.images_dropped == {
        "blank": 1, "cannot be read": 1, "without a prompt": 1, "a copy within the prompt": 1, "a score is missing": 1,
    }  # fmt: skip


def test_versions_must_be_named_and_scores_must_exist(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    with pytest.raises(DataError, match=r"no score 'clip' \(measured: good, other\)"):
        select(config(folder, folder, reward={"clip": 1.0}))
    again = [{**r, "version": "2"} for r in written(folder, "scores")]
    write_shard(folder, "scores", 1, again)
    with pytest.raises(DataError, match=r"several versions: say one of good@1,1, good@2,1"):
        select(config(folder, folder))
    assert select(config(folder, folder, reward={"good@2,1": 1.0})).pairs == 6
    with pytest.raises(DataError, match="no table images/"):
        select(config(tmp_path, tmp_path))


def test_pictures_elsewhere_are_copied_only_from_the_named_root(tmp_path: Path) -> None:
    from diffalign.cells import ScoreConfig, score

    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(i, 16 + 8 * i).save(tmp_path / "in" / f"{i}.png")
    scored = tmp_path / "scored"
    score(ScoreConfig(path=str(tmp_path / "in"), scorers=["compressibility"], prompt="p", output_dir=str(scored)))
    settings = {"reward": {"compressibility": 1.0}, "rule": {"type": "adjacent"}}
    with pytest.raises(DataError, match=r"leads out of .*image_root="):
        select(config(scored, tmp_path / "out", **settings))
    done = select(config(scored, tmp_path / "out2", image_root=str(tmp_path / "in"), **settings))
    assert done.pairs == len(read_pairs(tmp_path / "out2")) == 2


def test_no_picture_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dataset(tmp_path / "d")
    seen: list[str] = []
    read = pq.ParquetFile.read

    def noted(self: Any, columns: list[str] | None = None) -> Any:
        seen.extend(columns or ["all"])
        return read(self, columns)

    monkeypatch.setattr(pq.ParquetFile, "read", noted)
    select(config(folder, folder))
    assert seen
    assert not {"image", "all"} & {c.partition(".")[0] for c in seen}


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    words = ["pairs", f"path={folder}", "reward={good: 1}", "rule.type=all", "rule.min_margin=3", f"output_dir={folder}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "margin too small" in result.output
    assert "pairs of 6 prompts and 24 images" in result.output
    result = CliRunner().invoke(main, [*words, "--json"])
    assert json.loads(result.output)["made"] == 0
    assert CliRunner().invoke(main, [*words, "--shard", "2/2"]).exit_code == 2
    wrong = CliRunner().invoke(main, ["pairs", f"path={folder}", "reward={good: 1}", "rule.type=angl", "output_dir=x"])
    assert wrong.exit_code == 2
    assert "did you mean 'angle'" in wrong.output
