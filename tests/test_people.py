"""Pairs told apart by who made them: groups that take turns, groups that count more, profiles, held-out users."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from diffalign.catalogue import shipped_configs
from diffalign.data.examples import Example, of_pair
from diffalign.data.exports import EXPORTS
from diffalign.data.images import encode_png, sha256
from diffalign.data.pairs import Pair, Picture, read_pairs
from diffalign.data.prompts import Prompt
from diffalign.data.scores import prompt_key
from diffalign.data.tables import write_shard
from diffalign.errors import ConfigError, DataError
from diffalign.importing import ImportConfig, import_pairs
from diffalign.objectives import PairTerms, Sigmoid, Total
from diffalign.objectives.robust import LOG_WEIGHTS, GroupRobust
from diffalign.profiles import text_of, write_profiles
from diffalign.recipes import TrainConfig, train
from diffalign.spec import load, validate, with_overrides
from diffalign.train.groups import Groups, Turns, fares, learner
from diffalign.train.tracking import read_metrics
from diffalign.training_data import build_examples, build_pairs, named

ROOT = Path(__file__).parents[1]
SIGMOID = {"type": "sigmoid", "beta": 500}


def terms(errors: list[float], groups: list[int], weight: list[float] | None = None) -> PairTerms:
    """Pairs whose losers and references are at 1, so that the winner's error alone says how a pair fares."""
    e, ones = torch.tensor(errors), torch.ones(len(errors))
    w = None if weight is None else torch.tensor(weight)
    return PairTerms(e, ones, ones, ones, group=torch.tensor(groups), weight=w)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_groups_are_those_of_group_dro_written_again() -> None:
    """Sagawa et al.'s algorithm 1 in numpy, over batches of one group after the other: there the batch mean is L_g."""
    total = Total((Sigmoid(beta=2.0),))
    names, step = ("a", "b", "c"), 0.3
    robust = GroupRobust(total, names, (1 / 3,) * 3, step)
    rng = np.random.default_rng(0)
    q, state = np.full(3, 1 / 3), dict[str, torch.Tensor]()
    for _ in range(20):
        errors = rng.uniform(0.5, 2, 12)
        groups = np.repeat([0, 1, 2], 4)
        losses = np.log1p(np.exp(-(1 - errors)))  # kappa beta = 1
        out = robust(terms(errors.tolist(), groups.tolist()), state)
        expected = (q * np.array([losses[groups == g].mean() for g in range(3)])).sum()
        assert out.loss.mean().item() == pytest.approx(expected, rel=1e-5)
        state = out.state
        q = q * np.exp(step * np.array([losses[groups == g].mean() for g in range(3)]))
        q /= q.sum()
        assert state[LOG_WEIGHTS].softmax(0).numpy() == pytest.approx(q, rel=1e-5)


def test_uneven_groups_are_weighed_without_bias() -> None:
    """Over all rows, drawn as often as they are, the loss is sum_g q_g L_g and the estimates are the groups' means."""
    total = Total((Sigmoid(beta=2.0),))
    errors, groups = [0.7, 1.4, 1.9, 0.6, 1.1], [0, 0, 0, 0, 1]
    robust = GroupRobust(total, ("many", "one"), (0.8, 0.2), 1.0)
    plain = total(terms(errors, groups), {}).loss
    means = torch.stack([plain[:4].mean(), plain[4]])
    out = robust(terms(errors, groups), {})
    assert out.loss.mean().item() == pytest.approx(means.mean().item(), rel=1e-6)
    torch.testing.assert_close(out.state[LOG_WEIGHTS], means)
    parts = [robust(terms([e], [g]), {}).state[LOG_WEIGHTS] for e, g in zip(errors, groups, strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(0), means)  # five processes of one row each
    heavy = robust(terms(errors, groups, [2.0, 0, 0, 0, 1]), {})
    torch.testing.assert_close(heavy.state[LOG_WEIGHTS], torch.stack([2 * plain[0] / 4, plain[4]]))
    with pytest.raises(DataError, match="weighs 2 groups, the pairs have 3"):
        GroupRobust(total, ("a", "b", "c"), (1 / 3,) * 3, 1.0)(terms([1.0], [0]), out.state)


def test_the_inner_state_and_many_groups_go_through() -> None:
    names = tuple(f"u{i}" for i in range(40))
    out = GroupRobust(Total((Sigmoid(beta=2.0),)), names, (1 / 40,) * 40, 0.1)(
        terms([1.0, 1.0], [0, 39]), {"0/x": torch.ones(1)}
    )
    assert "group_weight/largest" in out.metrics
    assert not any(k.startswith("loss/") for k in out.metrics)


def test_import_and_export_keep_whom_a_pair_comes_from(people: Path, tmp_path: Path) -> None:
    text = people.read_text().replace("source", "group", 1)
    people.write_text(text)
    import_pairs(ImportConfig(path=str(people), format="trl", output_dir=str(tmp_path / "in"), source="two"))
    (table,) = EXPORTS["parquet"](tmp_path / "in", tmp_path / "out")[:1]
    for found in (read_pairs(tmp_path / "in"), read_pairs(table)):
        assert [(p.user, p.group, p.source) for p in found[:2]] == [("bob", "one", "two"), ("ann", "one", "two")]


def test_who_fares_worst() -> None:
    values = {"loss": torch.tensor([1.0, 3, 2]), "accuracy": torch.tensor([1.0, 0, torch.nan])}
    assert fares(values, torch.tensor([0, 1, 1]), ["a", "b"]) == {
        "worst_group/loss": 2.5, "loss/a": 1.0, "loss/b": 2.5,
        "worst_group/accuracy": 0.0, "accuracy/a": 1.0, "accuracy/b": 0.0,
    }  # fmt: skip


# --- turns ------------------------------------------------------------------------------------------------------------


def examples(*groups: str) -> list[Example]:
    pictures = (Picture(b"", "w"), Picture(b"", "l"))
    return [Example(pictures, ("p", "p"), group=g) for g in groups]


def test_groups_take_turns_and_none_repeats_before_it_is_through() -> None:
    made = examples(*"a" * 5, *"b" * 2, "c")
    turns = Turns(made, seed=3)
    drawn = [turns.at(p) for p in range(3 * 20)]
    for start in range(0, 60, 3):
        assert {made[i].group for _, i in drawn[start : start + 3]} == {"a", "b", "c"}
    of_a = [i for _, i in drawn if made[i].group == "a"]
    assert all(sorted(of_a[s : s + 5]) == [0, 1, 2, 3, 4] for s in range(0, 20, 5))
    assert of_a[:5] != of_a[5:10]
    assert len(set(drawn)) == len(drawn)  # noise is a function of (epoch, example): it never comes twice
    assert [Turns(made, seed=3).at(p) for p in (41, 7)] == [drawn[41], drawn[7]]
    assert [Turns(made, seed=4).at(p) for p in range(60)] != drawn


def test_shares_are_those_of_the_draw() -> None:
    made, total = examples("a", "a", "a", "b"), Total((Sigmoid(),))
    assert learner(total, made, None) is total
    assert learner(total, made, Groups(by="user", balanced=True)) is total
    found = learner(total, made, Groups(by="user", robust=0.1))
    assert isinstance(found, GroupRobust)
    assert (found.names, found.shares) == (("a", "b"), (0.75, 0.25))
    both = learner(total, made, Groups(by="user", robust=0.1, balanced=True))
    assert isinstance(both, GroupRobust)
    assert both.shares == (0.5, 0.5)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """30 pairs, 20 of ann and 10 of bob, as a table."""
    lines = ["prompt,chosen,rejected,user,source"]
    for i in range(30):
        for side in "wl":
            picture(2 * i + (side == "l")).save(tmp_path / f"{i}{side}.png")
        lines.append(f"picture {i},{i}w.png,{i}l.png,{'bob' if i % 3 == 0 else 'ann'},one")
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "people.csv"


def settings(overrides: list[str], people: Path, *more: str) -> TrainConfig:
    base = {"objective": SIGMOID, "model": {"path": "set below", "lora": {"rank": 4}}}
    small = ["evaluate.enabled=false", "train.learning_rate=1e-3", "train.logging_steps=1", f"data.path={people}"]
    return validate(TrainConfig, with_overrides(base, [*overrides, *small, *more]))


ROBUST = "data.groups={by: user, robust: 0.5}"


def test_group_weights_survive_a_resume_bit_for_bit(overrides: list[str], people: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(settings(overrides, people, ROBUST, "train.max_steps=4", f"output_dir={straight}"))
    train(settings(overrides, people, ROBUST, "train.max_steps=2", f"output_dir={halves}"))
    train(settings(overrides, people, ROBUST, "train.max_steps=4", f"output_dir={halves}", "resume_from=latest"))
    states = [torch.load(f / "checkpoint-4" / "extra.pt", weights_only=True)["objective"] for f in (straight, halves)]
    assert torch.equal(states[0][LOG_WEIGHTS], states[1][LOG_WEIGHTS])
    assert states[0][LOG_WEIGHTS].count_nonzero() == 2
    a, b = (load_file(f / "checkpoint-4" / "weights.safetensors") for f in (straight, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = read_metrics(straight)
    weights = [x["group_weight/ann"] + x["group_weight/bob"] for x in lines if "group_weight/ann" in x]
    assert weights == pytest.approx([1.0] * 4)
    logged = set().union(*lines)
    assert {"loss/ann", "loss/bob", "heldout/worst_group/loss", "heldout/accuracy/ann"} <= logged


def test_balanced_runs_see_both_users_equally_often(
    overrides: list[str], people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.train.feeds import Offline

    seen: Counter[str | None] = Counter()
    batch = Offline.batch

    def noted(self: Offline, rows: Any) -> Any:
        seen.update(self.examples[i].group for epoch, i in rows if epoch >= 0)
        return batch(self, rows)

    monkeypatch.setattr(Offline, "batch", noted)
    train(settings(overrides, people, "data.groups={by: user, balanced: true}", "train.max_steps=3", "train.eval_steps=0"))
    assert seen == {"ann": 6, "bob": 6}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.groups={by: group, robust: 0.1}"], r"30 of 30 pairs have no group, which data\.groups\.by asks for"),
        (["data.groups={by: source, balanced: true}"], "all training pairs have the source 'one'"),
    ],
)
def test_data_without_groups_is_refused(overrides: list[str], people: Path, more: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        train(settings(overrides, people, *more, "data.holdout=0"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.groups={by: user}"], "groups by themselves change nothing"),
        (["data.groups={by: userr, robust: 1}"], "group', 'user' or 'source'"),
        (["data.groups={by: user, balanced: true}", "data.buckets=true"], "so does data.buckets: drop one"),
        (["data.groups={by: user, balanced: true}", "data.curriculum={chunks: 2}"], "so does data.curriculum: drop one"),
        ([ROBUST, "objective={type: kto}"], "data.groups is about pairs, but kto is about labels: drop it"),
        (["train.metric_for_best=heldout/worst_group/loss"], "which needs data.groups"),
    ],
)
def test_what_contradicts_groups_is_refused(overrides: list[str], people: Path, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(overrides, people, *more)


@pytest.mark.slow
def test_two_processes_weigh_groups_as_one(overrides: list[str], people: Path, tmp_path: Path) -> None:
    """Gloo, two real processes of half the batch: the same weights of the groups, and of the network."""
    from safetensors.torch import load_file

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = [ROBUST, "train.max_steps=4", "train.adam_epsilon=0.01", "train.save_steps=1", "train.save_total_limit=9"]
    two = [*common, "train.per_device_train_batch_size=4", f"output_dir={tmp_path / 'two'}"]
    (tmp_path / "config.yaml").write_text(json.dumps(settings(overrides, people, *two).model_dump(mode="json")))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "diffalign"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *torchrun, "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    train(settings(overrides, people, *common, "train.per_device_train_batch_size=8", f"output_dir={tmp_path / 'one'}"))
    for step in (1, 4):
        one, both = (
            torch.load(tmp_path / n / f"checkpoint-{step}" / "extra.pt", weights_only=True)["objective"][LOG_WEIGHTS]
            for n in ("one", "two")
        )
        torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-5)
    a, b = (load_file(tmp_path / n / "pytorch_lora_weights.safetensors") for n in ("one", "two"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-5)


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_words_say_what_all_examples_agree_on() -> None:
    values = {
        "a": {"taste/size": 0.9, "clip@1": 0.5, "noise": 0.1, "even": 1.0, "gone": None},
        "b": {"taste/size": 0.1, "clip@1": 0.7, "noise": 0.2, "even": 1.0, "gone": 2.0},
        "c": {"taste/size": 0.8, "clip@1": 0.1, "noise": 0.3, "even": 2.0, "gone": 1.0},
        "d": {"taste/size": 0.2, "clip@1": 0.2, "noise": 0.1, "even": 1.0, "gone": 2.0},
    }
    liked = [{"liked": "a", "disliked": "b"}, {"liked": "c", "disliked": "d"}]
    assert text_of(liked, values) == "low clip, high size."
    assert text_of([{"liked": b, "disliked": a} for a, b in (("a", "b"), ("c", "d"))], values) == "high clip, low size."
    assert text_of([*liked, {"liked": "b", "disliked": "a"}], values) == ""
    assert text_of([{"liked": "a", "disliked": "lost"}], values) == ""


@pytest.fixture
def opposed(tmp_path: Path) -> Path:
    """Bright and dark pictures of 12 prompts: ann likes the bright ones, bob the dark ones."""
    images, scores, pairs = [], [], []
    for i in range(12):
        prompt = f"picture {i}"
        for side, level in (("bright", 200), ("dark", 40)):
            data = encode_png(Image.new("RGB", (32, 32), (level + 2 * i, level + 2 * i, level)))
            images.append({
                "image_id": f"{side}{i}", "sha256": sha256(data), "prompt_id": Prompt(prompt).id, "prompt": prompt,
                "image": {"bytes": data, "path": None},
            })  # fmt: skip
            scores.append({
                "image_sha256": sha256(data), "prompt_sha256": prompt_key(prompt), "scorer": "red", "version": "1",
                "preprocess_version": "1", "value": float(level),
            })  # fmt: skip
        for user, order in (("ann", ("bright", "dark")), ("bob", ("dark", "bright"))):
            won, lost = (f"{side}{i}" for side in order)
            said = {"prompt": prompt, "chosen_id": won, "rejected_id": lost, "p_win": 1.0, "user": user}
            pairs.append({"pair_id": f"{user}{i}", **said})
    for table, rows in (("images", images), ("scores", scores), ("pairs", pairs)):
        write_shard(tmp_path / "opposed", table, 0, rows)
    return tmp_path / "opposed"


def test_profiles_are_made_of_a_folders_scores(opposed: Path, tmp_path: Path) -> None:
    assert write_profiles(opposed, tmp_path / "p.jsonl", shots=3) == {
        "users": 2,
        "examples": 6,
        "pairs": 18,
        "users_left_out": 0,
    }
    texts = {x["user"]: x["text"] for x in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())}
    assert texts == {"ann": "high red.", "bob": "low red."}


@pytest.mark.slow
def test_a_model_learns_two_opposite_tastes_by_their_profiles_alone(
    overrides: list[str], opposed: Path, tmp_path: Path
) -> None:
    """The same pictures of the same prompt with opposite labels: without profiles every model is right half of the time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = opposed / "pairs" / "00000.parquet"
    table = pq.read_table(shard)
    pq.write_table(pa.Table.from_pylist([{**r, "prompt": "a"} for r in table.to_pylist()], schema=table.schema), shard)
    said = {"ann": "red red red red", "bob": "blue circle."}
    lines = [json.dumps({"user": u, "text": t, "pairs": [f"{u}{i}" for i in range(12)]}) for u, t in said.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    more = ["model.lora=null", "train.max_steps=60", "train.logging_steps=20", "train.eval_steps=0", "data.holdout=0"]
    more += ["train.per_device_train_batch_size=16"]
    profiles = f"data.profiles={{path: {tmp_path / 'p.jsonl'}, dropout: 0}}"
    right = []
    for name, words in (("with", [profiles]), ("without", [])):
        run = train(settings(overrides, opposed, *more, *words, f"output_dir={tmp_path / name}"))
        right.append([x["accuracy"] for x in read_metrics(run.folder) if "accuracy" in x][-1])
    assert right[0] > 0.9
    assert right[1] < 0.65  # of 320 pairs of rounds: 5 standard errors above one half


def test_examples_are_never_trained_on_and_prompts_keep_their_side(
    overrides: list[str], opposed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.jsonl"
    write_profiles(opposed, out, shots=3)
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    config = settings(overrides, opposed, f"data.profiles={{path: {out}, dropout: 0.4}}", "data.holdout=0.3")
    training, held = build_examples(config)
    assert len(training) + len(held) == 18
    plain = [of_pair(p) for p in read_pairs(opposed)]
    assert {x.prompt for x in (*training, *held)} <= {x.prompt for x in plain}  # told apart by prompts without profiles
    assert not {x.prompt for x in training} & {x.prompt for x in held}
    assert all(x.said[0] == f"{x.profile} {x.prompt}" for x in held)
    assert {x.profile for x in training} == {"", *(line["text"] for line in lines)}
    by_user = settings(overrides, opposed, "data.holdout_by=user", "data.holdout=0.5").data
    sides = build_pairs(by_user, 0)
    assert [len({p.user for p in side}) for side in sides] == [1, 1]


def test_profiles_without_words_or_pairs_are_refused(
    overrides: list[str], people: Path, opposed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.jsonl"
    config = settings(overrides, opposed, f"data.profiles.path={out}")
    for line, said in (
        ({"user": "ann", "text": None, "pairs": ["ann1"]}, "line 1: user ann has no text"),
        ({"user": "ann", "text": "x"}, "line 1: it needs user"),
        ({"user": "ann", "text": "x", "pairs": ["bob1"]}, "it names none of the 24 pairs"),
    ):
        out.write_text(json.dumps(line) + "\n")
        with pytest.raises(DataError, match=said):
            train(config)
    with pytest.raises(DataError, match="no such file"):
        train(settings(overrides, opposed, "data.profiles.path=nowhere.jsonl"))
    nobody = [Pair("p", Picture(b"", "w"), Picture(b"", "l"))] * 24
    with pytest.raises(DataError, match=r"24 of 24 pairs have no user, which data\.holdout_by asks for"):
        named(nobody, "user", "data.holdout_by", "x")
    with pytest.raises(ConfigError, match=r"data\.profiles is about pairs, but kto"):
        settings(overrides, people, f"data.profiles.path={out}", "objective={type: kto}")


def test_the_preset_of_personal_models_takes_a_step(
    overrides: list[str], opposed: Path, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    write_profiles(opposed, tmp_path / "p.jsonl", shots=3)
    small = [f"model.path={folder_of('sd')}", "model.gradient_checkpointing=false", f"data.path={opposed}", "data.holdout=0.5"]
    small += ["train.max_steps=1", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"]
    small += [f"data.profiles.path={tmp_path / 'p.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    config = load(TrainConfig, shipped_configs()["presets/reconstructed/ppd"], small)
    assert train(config).metrics["steps"] == 1
