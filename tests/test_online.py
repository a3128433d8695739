"""Online training: what is sampled and by whom, what training sees of it, and that it comes back bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffalign.building import build_model
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError, DiffalignError
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import PairTerms
from diffalign.recipes import TrainConfig, train
from diffalign.scorers import Callback
from diffalign.spec import dump, validate
from diffalign.timesteps import Uniform
from diffalign.train.collecting import Collector
from diffalign.train.online import AVERAGE, OLD, Behaviour, Online
from diffalign.train.online_feed import OnlineFeed
from diffalign.train.rewards import Rewards, RewardSpec
from diffalign.train.tracking import read_metrics

PROMPTS = [Prompt(f"picture {i}") for i in range(5)]
BRIGHT = "test_online:brightness"
DROPPED = {"scorers": ["test_online:broken", BRIGHT], "weights": {"broken": 1.0, "brightness": 1.0}, "on_error": "drop"}


def brightness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """A reward that any picture has."""
    import numpy as np

    return [float(np.asarray(x).mean() / 255) for x in images]


def broken(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [float("nan") if "3" in p else 1.0 for p in prompts]


class Flaky:
    """Fails on its first pictures, and is well afterwards."""

    name = "flaky"
    calls = 0

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        Flaky.calls += 1
        return [float("nan")] * len(images) if Flaky.calls == 1 else [1.0] * len(images)


def online(**more: Any) -> Online:
    rollout = {"num_inference_steps": 3, "batch_size": 4} | more.pop("rollout", {})
    base = {"prompts_per_rollout": 4, "group_size": 2, "rollout": {"rule": {"type": "ddim", "eta": 1.0}} | rollout}
    reward = {"scorers": [BRIGHT], "weights": {"brightness": 1.0}}
    return validate(Online, {"reward": reward} | base | more)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))


@pytest.fixture
def feed(model: Any, tmp_path: Path) -> Callable[..., OnlineFeed]:
    from diffalign.scoring import make_scorers

    def make(data: str = "steps", spec: Online | None = None, **more: Any) -> OnlineFeed:
        spec = spec or online()
        rewards = Rewards(spec.reward, make_scorers(spec.reward.scorers), tmp_path)
        how = {name: more.pop(name) for name in ("rank", "world", "gather") if name in more}
        replays, follows = data == "steps", spec.old is not None
        collector = Collector(model, PROMPTS, spec, rewards, replays=replays, follows=follows, seed=1, **how)
        return OnlineFeed(collector, Uniform(), data=data, **{"batch_size": 4} | more)  # type: ignore[arg-type]

    return make


def small(tiny: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A run of two steps of GRPO by default."""
    sections: dict[str, Any] = {
        "model": {"path": str(tiny), "lora": {"rank": 4}},
        "objective": {"type": "ppo"},
        "online": online().model_dump(),
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3},
        "evaluate": {"enabled": False},
        "output_dir": str(out),
    }
    for key, value in more.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) and key != "objective" else value
    return sections


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


# --- what is sampled -------------------------------------------------------------------------------------------------


def test_prompts_come_in_shuffled_epochs_of_the_pool(feed: Callable[..., OnlineFeed]) -> None:
    f = feed()
    seen = [f.collector._prompt(i).text for i in range(15)]
    for turn in range(3):
        assert sorted(seen[5 * turn : 5 * turn + 5]) == sorted(p.text for p in PROMPTS)
    assert seen[:5] != seen[5:10] or seen[5:10] != seen[10:]


def test_groups_stand_together_and_no_noise_is_used_twice(feed: Callable[..., OnlineFeed]) -> None:
    f = feed()
    items = [item for epoch in range(10) for block in f.collector._plan(epoch) for item in block]
    assert all(a.prompt == b.prompt for a, b in zip(items[::2], items[1::2], strict=True))
    assert len({(i.prompt.text, i.k) for i in items}) == len(items)


def test_two_processes_see_the_trajectories_of_one(feed: Callable[..., OnlineFeed]) -> None:
    """Bit for bit: blocks are the same whoever makes them."""
    alone = feed()
    list(alone.batches(0))
    for rank in (0, 1):
        shared = feed(rank=rank, world=2)
        shared.collector.gather = lambda values: torch.cat([values, values])  # the other's rewards do not matter here
        list(shared.batches(0))
        assert len(shared.blocks) == 1
        for name in ("x0", "x", "x_next", "mean", "std"):
            assert torch.equal(getattr(shared.blocks[0].paths, name), getattr(alone.blocks[rank].paths, name))


def test_ratio_is_one_before_the_first_update(feed: Callable[..., OnlineFeed], model: Any) -> None:
    f = feed()
    batches = list(f.batches(0))
    assert len(batches) == 2 * batches[0].block.paths.std.shape[1]
    for batch in batches:
        terms = f.terms(model, batch, frozenset({"reference"}))
        assert (terms.log_ratio == 0).all()
        assert (terms.kl_old == 0).all()
        assert (terms.kl_ref == 0).all()  # a fresh adapter is the reference


def test_passes_are_counted(feed: Callable[..., OnlineFeed], model: Any) -> None:
    """8 images in 3 steps; then a forward and a backward pass for each of them at each trained step."""
    f = feed()
    terms = [f.terms(model, b, frozenset()) for b in f.batches(0)]
    trained = f.blocks[0].paths.std.shape[1]
    assert sum(t.cost for t in terms) == 8 * 3 + 8 * trained * 3
    assert f.totals()["reward_calls"] == 8


def test_advantages_are_those_of_the_groups(feed: Callable[..., OnlineFeed]) -> None:
    f = feed()
    list(f.batches(0))
    for block in f.blocks:
        a, r = block.advantages.view(-1, 2), block.rewards.view(-1, 2)
        assert torch.allclose(a.sum(1), torch.zeros(len(a)), atol=1e-5)
        assert ((a[:, 0] > a[:, 1]) == (r[:, 0] > r[:, 1])).all()


def test_oversampled_groups_are_the_extremes_of_their_previews(feed: Callable[..., OnlineFeed], model: Any) -> None:
    """Against previews that are made again here, by the one-step sampler without noise from the same seeds."""
    from diffalign.data.images import to_uint8
    from diffalign.rollout import rollout
    from diffalign.sampling import Item

    f = feed("images", online(oversample={"candidates": 6, "steps": 2}, rollout={"rule": {"type": "ode"}}))
    terms = [f.terms(model, b, frozenset()) for b in f.batches(1)]  # the second rollout
    turns = [(4 + g) // len(PROMPTS) for g in range(4)]
    preview = f.spec.rollout.model_copy(update={"num_inference_steps": 2})
    for n, block in enumerate(f.blocks):
        for g, (a, b) in enumerate(zip(block.items[::2], block.items[1::2], strict=True)):
            first = turns[2 * n + g] * 6
            items = [Item(a.prompt, first + k) for k in range(6)]
            pixels = to_uint8(model.decode(rollout(model, items, preview, 1, 1).x0)).double().flatten(1).mean(1)
            assert a.prompt == b.prompt
            assert {a.k - first, b.k - first} == {int(pixels.argmax()), int(pixels.argmin())}
    assert f.totals()["reward_calls"] == 4 * 6 + 8
    assert sum(t.cost for t in terms) == 4 * 6 * 2 + 8 * 3 + 8 * 3


# --- pairs and images of the policy's own ----------------------------------------------------------------------------


def test_online_pairs_are_the_best_and_worst_of_each_group(feed: Callable[..., OnlineFeed], model: Any) -> None:
    f = feed("pairs", online(group_size=4, rollout={"rule": {"type": "ode"}}))
    (batch,) = f.batches(0)
    for x0 in batch.x0:
        block = next(b for b in f.blocks if any(torch.equal(x0[0], y) for y in b.paths.x0))
        place = [next(i for i, y in enumerate(block.paths.x0) if torch.equal(y, x0[j])) for j in (0, 1)]
        group = block.rewards.view(-1, 4)[place[0] // 4]
        assert place[0] // 4 == place[1] // 4
        assert group.max() == block.rewards[place[0]]
        assert group.min() == block.rewards[place[1]]
    terms = f.terms(model, batch, frozenset({"loser", "reference"}))
    assert isinstance(terms, PairTerms)
    assert terms.loser is not None
    assert terms.weight is not None
    assert terms.weight.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "trains"), [("always_one", False), ("brightness", True)])
def test_ties_leave_no_pairs_and_the_steps_still_run(name: str, trains: bool, tiny: Path, tmp_path: Path) -> None:
    """To the end, with the weights that were there before; where images differ the same run moves them."""
    reward = {"scorers": [f"test_online:{name}"], "weights": {name: 1.0}}
    spec = online(rollout={"rule": {"type": "ode"}}, reward=reward)
    run = train(validate(TrainConfig, small(tiny, tmp_path / "run", objective={"type": "sigmoid"}, online=spec.model_dump())))
    assert run.metrics["steps"] == 2
    assert run.metrics["reward_calls"] == 16
    assert any(w.abs().sum() > 0 for n, w in weights_of(run.folder).items() if "lora_B" in n) == trains


def test_the_mean_is_over_examples_whatever_the_last_batch_holds(feed: Callable[..., OnlineFeed]) -> None:
    """Five pairs in batches of two, on two processes of which the other has three: each of the eight counts alike."""
    alone = feed("pairs", online(prompts_per_rollout=5, rollout={"rule": {"type": "ode"}, "batch_size": 10}), batch_size=2)
    batches = list(alone.batches(0))
    assert [len(b) for b in batches] == [2, 2, 1]
    for b in batches:  # what the loop makes of it: the mean of a batch, over the number of batches
        assert (b.weight / len(b) / len(batches)).tolist() == pytest.approx([1 / 5] * len(b))
    shared = feed("pairs", alone.spec, batch_size=2)
    shared._begin(0)
    shared.collector.world, shared.collector.gather = 2, lambda x: torch.cat([x, torch.full_like(x, 3.0)])
    batches = list(shared.batches(0))
    for b in batches:  # and the mean over processes
        assert (b.weight / len(b) / len(batches) / 2).tolist() == pytest.approx([1 / 8] * len(b))


def test_extremes_fill_the_batches_that_the_preflight_saw(feed: Callable[..., OnlineFeed], model: Any) -> None:
    """Three of each group of eight: kept rows stand together, weigh alike over both processes, and the rest weighs nothing."""
    spec = online(prompts_per_rollout=2, group_size=8, rollout={"batch_size": 8}, advantages={"keep": {"best": 2, "worst": 1}})
    f = feed(spec=spec)
    f._begin(0)
    f.blocks[1] = replace(f.blocks[1], advantages=torch.zeros(8))  # a group without differences
    kept = [(id(b), i) for b in f.blocks for i in range(8) if b.advantages[i] != 0]
    assert len(kept) == 3
    f.collector.world, f.collector.gather = (
        2,
        lambda x: torch.cat([x, torch.full_like(x, 2.0)]),
    )  # the other process: two parts, two rows
    batches = list(f.batches(0))
    slots = f.blocks[0].paths.std.shape[1]
    assert len(batches) == 2 * slots
    seen = []
    for b in batches:
        assert len(b) == 4
        assert b.weight is not None
        share = b.weight / 4 / len(batches) / 2
        assert share[share > 0].tolist() == pytest.approx([1 / (5 * slots)] * int((share > 0).sum()))
        seen += [(id(b.block), row) for row, s in zip(b.rows, share, strict=True) if s > 0]
        terms = f.terms(model, b, frozenset())
        assert (terms.log_ratio == 0).all()
        assert terms.weight is not None
    assert sorted(seen) == sorted(kept * slots)


def test_prompts_are_encoded_once_a_rollout_and_when_they_are_read(
    feed: Callable[..., OnlineFeed], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = feed("images", online(repeats=3, rollout={"rule": {"type": "ode"}}))
    f._begin(0)
    said: list[str] = []
    encode = model.encode_prompts
    alike = {t: encode(texts_of(b))[[n]] for b in f.blocks for n, t in enumerate(texts_of(b))}
    monkeypatch.setattr(model, "encode_prompts", lambda texts: (said.extend(texts), encode(texts))[1])
    batches = list(f.batches(0))
    assert len(batches) == 6
    assert said == []
    read = [f.terms(model, b, frozenset()) for b in batches]
    assert sorted(said) == sorted({i.prompt.text for b in f.blocks for i in b.items})
    assert all(torch.equal(f._said[t].embeds, alike[t].embeds) for t in said)  # bit for bit as when it was sampled
    monkeypatch.undo()
    for b, terms in zip(batches, read, strict=True):  # against prompts that the model reads itself
        from diffalign.train.terms import terms_of

        torch.testing.assert_close(terms.error, terms_of(model, b, f.timesteps, frozenset(), f.coupling).error)


def texts_of(block: Any) -> list[str]:
    return list(dict.fromkeys(item.prompt.text for item in block.items))


def test_nothing_is_stored_that_is_not_read_again(feed: Callable[..., OnlineFeed]) -> None:
    """No steps where images are learned from, which are the same; and no blocks once their last update is done."""
    images, steps = feed("images", online(updates=2)), feed(spec=online(updates=2))
    for f in (images, steps):
        list(f.batches(0))
    for a, b in zip(images.blocks, steps.blocks, strict=True):
        assert torch.equal(a.paths.x0, b.paths.x0)
        assert a.paths.x.shape[1] == a.paths.mean.shape[1] == 0 < b.paths.x.shape[1]
    assert len(steps.state()["blocks"]) == 2
    list(steps.batches(1))
    assert steps.state()["blocks"] == []


def failed(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [float("nan")] * len(images)


@pytest.mark.parametrize("what", [OLD, AVERAGE])
def test_old_policy_and_average_follow_by_their_schedule(what: str, feed: Callable[..., OnlineFeed], model: Any) -> None:
    """w <- d w + (1 - d) policy, d = min(rate (n - flat), most)."""
    schedule: dict[str, Any] = {what: {"rate": 0.5, "most": 0.75, "flat": 1}}
    f = feed("images", online(**schedule, rollout={"rule": {"type": "ode"}}))
    name = next(iter(model.named_weights.trainable()))
    p = model.named_weights.trainable()[name]
    start = p.detach().clone()
    expected = None
    try:
        for epoch, decay in enumerate([0.0, 0.0, 0.5, 0.75]):
            with torch.no_grad():
                p.copy_(torch.full_like(p, float(epoch)))
            list(f.batches(epoch))
            now = torch.full_like(p, float(epoch))
            expected = now if expected is None else decay * expected + (1 - decay) * now
            assert torch.allclose(model.named_weights.snapshots[what][name], expected)
    finally:
        with torch.no_grad():
            p.copy_(start)
        del model.named_weights.snapshots[what]
    assert Behaviour(rate=0.001, most=0.5).decay(10_000) == 0.5


def test_the_distance_to_the_average_is_that_to_the_base_where_it_began(
    feed: Callable[..., OnlineFeed], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average taken before the first step is the base: exactly 0 there, and the same distance after a move."""
    f = feed("images", online(average={}, rollout={"rule": {"type": "ode"}}))
    batch = next(f.batches(0))
    needs = frozenset({"average", "reference", "distance"})
    try:
        still = f.terms(model, batch, needs)
        with torch.no_grad():
            for p in model.named_weights.trainable().values():
                monkeypatch.setattr(p, "data", p.data + 0.05)
        moved = f.terms(model, batch, needs)
    finally:
        del model.named_weights.snapshots[AVERAGE]
    assert still.distance_average.tolist() == [0.0] * len(batch)
    assert (moved.distance > 1e-6).all()
    torch.testing.assert_close(moved.distance_average, moved.distance, rtol=1e-5, atol=0)
    assert moved.distance_average.requires_grad
    assert moved.cost - f.terms(model, batch, needs - {"average"}).cost == len(batch)


def test_under_autocast_each_set_of_weights_speaks_for_itself(
    feed: Callable[..., OnlineFeed], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast keeps its casts by parameter: a snapshot that was swapped in must not answer for the policy."""
    f = feed("images", online(average={}, rollout={"rule": {"type": "ode"}}))
    batch = next(f.batches(0))
    try:
        with torch.no_grad():
            for p in model.named_weights.trainable().values():
                monkeypatch.setattr(p, "data", p.data + 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            beside = f.terms(model, batch, frozenset({"average"}))
        with torch.autocast("cpu", torch.bfloat16):
            alone = f.terms(model, batch, frozenset())
    finally:
        del model.named_weights.snapshots[AVERAGE]
    assert torch.equal(beside.error, alone.error)
    assert (beside.distance_average > 1e-6).all()


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_failing_reward_stops_with_the_sample_saved(tmp_path: Path) -> None:
    spec = RewardSpec(scorers=["test_online:broken"], weights={"broken": 1.0})
    from diffalign.scoring import make_scorers

    rewards = Rewards(spec, make_scorers(spec.scorers), tmp_path)
    with pytest.raises(DiffalignError, match="picture 3"):
        rewards(torch.rand(5, 3, 8, 8), [p.text for p in PROMPTS])
    assert (tmp_path / "failed" / "sample.png").exists()
    dropped = Rewards(spec.model_copy(update={"on_error": "drop"}), make_scorers(spec.scorers), tmp_path)
    values = dropped(torch.rand(5, 3, 8, 8), [p.text for p in PROMPTS])
    assert values.isnan().tolist() == [[False, False, False, True, False]]


class Unsure:
    """A reward model that says how sure it is: twice as sure of prompts with an even number."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [1.0 + (int(p.split()[-1]) % 2 == 0) for p in prompts]


def test_advantages_are_weighted_by_what_is_known_of_the_reward(feed: Callable[..., OnlineFeed]) -> None:
    """PrefPaint's weights stand before the clipped loss, and are above 0: it is the same to weigh the advantage."""
    plain, reward = feed(), {"scorers": [BRIGHT, "test_online:Unsure"], "weights": {"brightness": 1.0}}
    sure = feed(spec=online(reward=reward | {"confidence": "Unsure"}))
    for f in (plain, sure):
        list(f.batches(0))
    factors = set()
    for a, b in zip(plain.blocks, sure.blocks, strict=True):
        wanted = torch.tensor([1.0 + (int(i.prompt.text.split()[-1]) % 2 == 0) for i in b.items])
        torch.testing.assert_close(b.advantages, a.advantages * wanted)
        assert torch.equal(a.rewards, b.rewards)
        factors |= set(wanted.tolist())
    assert factors == {1.0, 2.0}
    with pytest.raises(ConfigError, match="a value is a reward or a confidence"):
        online(reward=reward | {"confidence": "brightness"})


@pytest.mark.parametrize("sure", [float("nan"), 0.0, -1.0])
def test_a_sample_without_a_confidence_counts_as_one_without_a_reward(sure: float, feed: Callable[..., OnlineFeed]) -> None:
    reward = {"scorers": [BRIGHT, "test_online:Unsure"], "weights": {"brightness": 1.0}, "confidence": "Unsure"}
    f = feed(spec=online(reward=reward | {"on_error": "drop"}, prompts_per_rollout=6))
    f.collector.rewards.scorers[1] = Callback(lambda i, p: [sure if "3" in x else 1.0 for x in p], "Unsure")
    list(f.batches(0))
    lost = torch.tensor([["3" in i.prompt.text for i in b.items] for b in f.blocks])
    advantages, rewards = torch.stack([b.advantages for b in f.blocks]), torch.stack([b.rewards for b in f.blocks])
    assert lost.any()
    assert (advantages[lost] == 0).all()
    assert rewards[lost].isnan().all()
    assert advantages[~lost].isfinite().all()
    assert (advantages[~lost] != 0).any()
    f.collector.rewards.spec = f.collector.rewards.spec.model_copy(update={"on_error": "fail"})
    with pytest.raises(DiffalignError, match="a confidence is above 0" if sure <= 0 else "no value for 'picture 3'"):
        list(f.batches(1))


def test_a_scorer_that_nothing_weighs_is_not_paid_for(feed: Callable[..., OnlineFeed]) -> None:
    f = feed(spec=online(reward={"scorers": [BRIGHT, "test_online:always_one"], "weights": {"brightness": 1.0}}))
    with pytest.raises(ConfigError, match="all that one scorer gives has none: always_one"):
        list(f.batches(0))


def test_a_reward_is_asked_again(tmp_path: Path) -> None:
    from diffalign.scorers import Callback

    Flaky.calls = 0
    spec = RewardSpec(scorers=["x:y"], weights={"flaky": 2.0}, on_error="retry", wait_seconds=0)
    rewards = Rewards(spec, [Callback(Flaky(), "flaky")], tmp_path)
    assert rewards(torch.rand(2, 3, 8, 8), ["a", "b"]).tolist() == [[1.0, 1.0]]
    assert Flaky.calls == 2
    assert rewards.calls == 4


def test_a_group_with_a_failed_reward_counts_for_nothing(feed: Callable[..., OnlineFeed]) -> None:
    f = feed(spec=online(reward=DROPPED, prompts_per_rollout=6))
    list(f.batches(0))
    for block in f.blocks:
        for item, advantage, reward_ in zip(block.items, block.advantages, block.rewards, strict=True):
            assert advantage.isfinite()
            if "3" in item.prompt.text:
                assert advantage == 0
                assert reward_.isnan()


@pytest.mark.parametrize("data", ["pairs", "groups", "images", "labels"])
def test_nothing_of_a_group_with_a_failed_reward_is_learned_from(data: str, feed: Callable[..., OnlineFeed]) -> None:
    """One picture of a prompt fails: its group is no example, for losses of any kind."""
    f = feed(data, online(reward=DROPPED, prompts_per_rollout=5, group_size=4, rollout={"rule": {"type": "ode"}}))
    first = f.collector.rewards._ask
    f.collector.rewards._ask = lambda batch: _only_the_first(*first(batch))  # type: ignore[method-assign]
    list(f.batches(0))
    said = {x.block.items[row].prompt.text for x in f._examples() for row in x.rows}
    assert said == {p.text for p in PROMPTS} - {"picture 3"}


def _only_the_first(values: torch.Tensor, errors: dict[int, str]) -> tuple[torch.Tensor, dict[int, str]]:
    bad = values.isnan().any(0)
    bad[bad.nonzero().flatten()[:1]] = False
    return torch.where(bad, 1.0, values), errors


def test_a_rollout_without_any_reward_stops_the_run(feed: Callable[..., OnlineFeed]) -> None:
    reward = {"scorers": ["test_online:failed"], "weights": {"failed": 1.0}, "on_error": "drop"}
    with pytest.raises(DiffalignError, match="every group of this rollout lacks a value"):
        list(feed(spec=online(reward=reward)).batches(0))


def test_a_failing_reward_stops_the_sampling(
    feed: Callable[..., OnlineFeed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heard between two blocks, not after the last of six."""
    import time

    from diffalign.train import collecting

    made: list[int] = []

    def slowly(*args: Any, **more: Any) -> Any:
        made.append(1)
        while len(made) > 1 and not (tmp_path / "failed" / "sample.png").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        return rollout(*args, **more)

    rollout = collecting.rollout
    monkeypatch.setattr(collecting, "rollout", slowly)
    reward = {"scorers": ["test_online:failed"], "weights": {"failed": 1.0}}
    with pytest.raises(DiffalignError, match="no value"):
        list(feed(spec=online(reward=reward, prompts_per_rollout=12)).batches(0))
    assert len(made) in (1, 2)  # by the end of the first block already, if the scorer was quick


def test_an_unknown_value_is_named(tmp_path: Path) -> None:
    from diffalign.scoring import make_scorers

    with pytest.raises(ConfigError, match="beauty"):  # known before it is asked
        Rewards(RewardSpec(scorers=[BRIGHT], weights={"beauty": 1.0}), make_scorers([BRIGHT]), tmp_path)
    several = Rewards(RewardSpec(weights={"beauty": 1.0}), [lambda batch: _two_values(batch)], tmp_path)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="beauty"):
        several(torch.rand(1, 3, 8, 8), ["a"])


def _two_values(batch: Any) -> Any:
    from diffalign.scorers import ScoreBatch

    return ScoreBatch({"style": torch.ones(len(batch)), "colour": torch.ones(len(batch))})


def test_pictures_may_come_as_bytes(tmp_path: Path) -> None:
    from diffalign.data.images import to_uint8
    from diffalign.scoring import make_scorers

    rewards = Rewards(RewardSpec(scorers=[BRIGHT], weights={"brightness": 1.0}), make_scorers([BRIGHT]), tmp_path)
    pixels = torch.rand(3, 3, 8, 8)
    assert torch.equal(rewards(pixels, ["a"] * 3), rewards(to_uint8(pixels), ["a"] * 3))


def test_the_whole_of_a_prompt_file_is_the_pool(tmp_path: Path) -> None:
    from diffalign.online import own_prompts
    from diffalign.shapes import sample_prompts
    from diffalign.train.direct import Direct

    (tmp_path / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(2500)))
    config = TrainConfig(objective=({"type": "sigmoid"},), output_dir="x", evaluate={"split_salt": "other"})  # type: ignore[arg-type]
    for spec in (online(prompts=str(tmp_path / "prompts.txt")), Direct(prompts=str(tmp_path / "prompts.txt"))):
        assert len(own_prompts(config, spec, [Prompt("picture 7")], "online")) == 2499
    few = own_prompts(config, online(prompts="shapes:train", num_prompts=20), [], "online")
    assert [p.text for p in few] == sample_prompts(20, "train", 0, "other")
    assert [p.text for p in few] != sample_prompts(20, "train", 0)


# --- whole runs ------------------------------------------------------------------------------------------------------

KINDS = {
    "ppo": {},
    "reinforce": {},
    "sigmoid": {"online": {"rollout": {"rule": {"type": "ode"}, "num_inference_steps": 2, "batch_size": 4}}},
    "nft": {
        "online": {
            "rollout": {"rule": {"type": "ode"}, "num_inference_steps": 2, "batch_size": 4},
            "old": {"rate": 0.1},
            "repeats": 2,
        }
    },
    "kto": {
        "online": {"rollout": {"rule": {"type": "ode"}, "num_inference_steps": 2, "batch_size": 4}},
        "coupling": {"noise": "independent"},
    },
    "infonca": {"online": {"rollout": {"rule": {"type": "ode"}, "num_inference_steps": 2, "batch_size": 4}}},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_objective_trains_on_its_own_samples(name: str, tiny: Path, tmp_path: Path) -> None:
    sections = small(tiny, tmp_path / "run", **{k: dict(v) for k, v in KINDS[name].items()}, objective={"type": name})
    sections.setdefault("coupling", {})
    if "online" in KINDS[name]:
        sections["online"] = online(**KINDS[name]["online"]).model_dump()
    run = train(validate(TrainConfig, sections))
    lines = read_metrics(run.folder)
    assert run.metrics["reward_calls"] > 0
    assert any("rollout/reward" in line for line in lines)
    assert all(torch.isfinite(w).all() for w in weights_of(run.folder).values())
    assert any(w.abs().sum() > 0 for n, w in weights_of(run.folder).items() if "lora_B" in n)


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": ({}, {}),
    "nft": ({"old": {"rate": 0.5}, "rollout": {"rule": {"type": "ode"}}}, {"objective": {"type": "nft"}}),
    "awm": (
        {"average": {"rate": 0.5}, "rollout": {"rule": {"type": "ode"}}},
        {"objective": {"type": "awm", "near": 5.0}},
    ),
    "oversample": ({"oversample": {"candidates": 3, "steps": 1}}, {}),
    "running": ({"advantages": {"baseline": "running", "min_count": 3, "buffer_size": 5}}, {}),
    "par": ({"advantages": {"shaping": "par"}}, {}),
    "window": ({"rollout": {"num_inference_steps": 4, "window": {"type": "progressive", "size": 1, "iterations": 1}}}, {}),
    "averages": ({}, {"objective": {"type": "ppo", "beta": 0.1}, "reference": {"type": "ema", "decay": 0.5}}),
}
"""What a run keeps besides its weights: the ``online`` section, and the others."""
COSTS = {"images_per_second", "peak_memory_gib"}


def halves(kind: str, tiny: Path, out: Path, steps: int) -> dict[str, Any]:
    """Four updates a rollout."""
    spec, more = RESUMED[kind]
    settings = {"max_steps": steps, "ema_decay": 0.7 if kind == "averages" else 0.0}
    return small(tiny, out, **more, online=online(updates=2, inner_epochs=2, **spec).model_dump(), train=settings)


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_inside_a_rollout_is_bit_equal(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Cut after the third of six steps: nothing is sampled or scored again, and the next rollout knows all of the last."""
    whole = train(validate(TrainConfig, halves(kind, tiny, tmp_path / "whole", 6)))
    train(validate(TrainConfig, halves(kind, tiny, tmp_path / "cut", 3)))
    rest = train(validate(TrainConfig, halves(kind, tiny, tmp_path / "cut", 6) | {"resume_from": "latest"}))
    assert rest.metrics["reward_calls"] == whole.metrics["reward_calls"]
    a, b = weights_of(whole.folder), weights_of(rest.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert rest.metrics["denoiser_passes"] == whole.metrics["denoiser_passes"]
    lines = [[x["step"] for x in read_metrics(f) if "rollout/reward" in x] for f in (whole.folder, rest.folder)]
    assert lines == [[1, 5]] * 2
    logged = [[{k: v for k, v in x.items() if k not in COSTS} for x in read_metrics(f)] for f in (whole.folder, rest.folder)]
    assert logged[0][-1] == logged[1][-1]


def test_a_checkpoint_between_rollouts_holds_no_images_and_goes_on_alike(tiny: Path, tmp_path: Path) -> None:
    whole = train(validate(TrainConfig, halves("ppo", tiny, tmp_path / "whole", 5)))
    cut = train(validate(TrainConfig, halves("ppo", tiny, tmp_path / "cut", 4)))
    assert torch.load(cut.folder / "checkpoint-4" / "feed-0.pt", weights_only=True)["blocks"] == []
    rest = train(validate(TrainConfig, halves("ppo", tiny, tmp_path / "cut", 5) | {"resume_from": "latest"}))
    a, b = weights_of(whole.folder), weights_of(rest.folder)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert rest.metrics["reward_calls"] == whole.metrics["reward_calls"]


def test_images_of_other_prompts_or_settings_are_not_gone_on_with(feed: Callable[..., OnlineFeed]) -> None:
    """Half a rollout comes back to the prompts that it was sampled for, or not at all."""
    f = feed(spec=online(updates=2))
    list(f.batches(0))
    state = f.state()
    assert state["blocks"]
    same, fewer = feed(spec=online(updates=2)), feed(spec=online(updates=2))
    same.restore(state)
    assert [b.items for b in same.blocks] == [b.items for b in f.blocks]
    fewer.collector.prompts = PROMPTS[1:]
    louder = feed(spec=online(updates=2, rollout={"rule": {"type": "ddim", "eta": 0.5}}))
    for other in (fewer, louder, feed(spec=online())):
        with pytest.raises(ValueError, match=r"made for other prompts, or with another online\.rollout"):
            other.restore(state)
    list(f.batches(1))
    fewer.restore(f.state())  # a rollout that is used up binds nobody


def test_passes_of_a_rollout_without_a_lesson_are_kept(feed: Callable[..., OnlineFeed], model: Any) -> None:
    """All ties: no terms were charged with its passes yet when the state is saved."""
    reward = {"scorers": ["test_online:always_one"], "weights": {"always_one": 1.0}}
    spec = online(reward=reward, rollout={"rule": {"type": "ode"}})
    f = feed("pairs", spec)
    assert list(f.batches(0)) == []
    assert f.collector.unpaid == 8 * 3
    again = feed("pairs", spec)
    again.restore(f.state())
    assert again.collector.unpaid == 8 * 3


def always_one(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [1.0] * len(images)


def launched(n: int, config: Path) -> None:
    """The command in ``n`` real processes over gloo."""
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    port = str(29700 + os.getpid() % 200)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", port]
    words = [*launch, "-m", "diffalign", "train", str(config)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_resume(tiny: Path, tmp_path: Path) -> None:
    """Inside a rollout, with running statistics: each process goes on with its own blocks and its own chance. Their first
    gradient after the cut, summed over processes, may differ in its last bit: seen at 1e-9, and at 4e-8 two steps later.
    """
    from diffalign.spec import dump

    for name, steps, more in (("whole", 6, {}), ("cut", 3, {}), ("cut", 6, {"resume_from": "latest"})):
        sections = halves("running", tiny, tmp_path / name, steps)
        sections["online"] |= {"updates": 1}
        (tmp_path / "c.yaml").write_text(dump(validate(TrainConfig, sections | more)))
        launched(2, tmp_path / "c.yaml")
    assert (tmp_path / "cut" / "checkpoint-3" / "rng-1.pt").exists()
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6)
    rewards = [[x["rollout/reward"] for x in read_metrics(tmp_path / n) if "rollout/reward" in x] for n in ("whole", "cut")]
    assert rewards[0] == rewards[1]
    passes = [json.loads((tmp_path / name / "metrics.json").read_text())["denoiser_passes"] for name in ("whole", "cut")]
    assert passes[0] == passes[1]


@pytest.mark.slow
def test_two_processes_train_as_one(tiny: Path, tmp_path: Path) -> None:
    """Real processes over gloo: the same losses, and weights that agree within Adam's rounding."""
    from diffalign.spec import dump

    losses = []
    for n in (1, 2):
        config = validate(TrainConfig, small(tiny, tmp_path / f"run{n}", train={"adam_epsilon": 0.01}))
        (tmp_path / f"{n}.yaml").write_text(dump(config))
        launched(n, tmp_path / f"{n}.yaml")
        lines = read_metrics(tmp_path / f"run{n}")
        losses.append([x["loss"] for x in lines if "loss" in x])
        losses[-1] += [x["rollout/reward"] for x in lines if "rollout/reward" in x]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    a, b = (weights_of(tmp_path / f"run{n}") for n in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


# --- what cannot work ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a policy objective without rollouts": ({"online": None}, "add the section online"),
    "stored data beside": ({"data": {"limit": 3}}, "drop data"),
    "the shipped pairs beside": ({"data": {"path": "shapes-pairs"}}, "drop data"),
    "a group of one": ({"online": {"group_size": 1}}, "group_size 1"),
    "blocks that cut groups": ({"online": {"group_size": 3}}, "whole groups of 3"),
    "images that fill no block": ({"online": {"prompts_per_rollout": 3}}, "no multiple of"),
    "more updates than blocks": ({"online": {"updates": 3}}, "cannot be shared evenly by 3 updates"),
    "parts of blocks": ({"train": {"per_device_train_batch_size": 3}}, "multiple of"),
    "a window beyond the steps": (
        {"online": {"rollout": {"window": {"type": "fixed", "begin": 2, "size": 2}, "num_inference_steps": 3}}},
        "shorten or move",
    ),
    "fewer candidates than are kept": ({"online": {"oversample": {"candidates": 2}, "group_size": 4}}, "below group_size"),
    "previews of one noise": ({"online": {"oversample": {}, "rollout": {"same_noise": True}}}, "same_noise"),
    "previews of parts of groups": ({"online": {"oversample": {}, "group_size": 8}}, "whole groups"),
    "a rule without noise": ({"online": {"rollout": {"rule": {"type": "ode"}}}}, "steps with noise"),
    "ddim as it is by default": ({"online": {"rollout": {"rule": {"type": "ddim"}}}}, "steps with noise"),
    "cps without noise": ({"online": {"rollout": {"rule": {"type": "cps", "noise_level": 0}}}}, "steps with noise"),
    "a flow without noise": ({"online": {"rollout": {"rule": {"type": "flow_sde", "noise_level": 0}}}}, "steps with noise"),
    "scores one by one": (
        {"objective": {"type": "sigmoid"}, "online": {"rule": {"type": "rank_then_sift", "rank_by": "brightness"}}},
        "online.rule: rank_then_sift",
    ),
    "a direction in scores": (
        {"objective": {"type": "sigmoid"}, "online": {"rule": {"type": "angle", "x": "a", "y": "b"}}}, "online.rule: angle"
    ),
    "better by every score": ({"objective": {"type": "sigmoid"}, "online": {"rule": {"type": "pareto"}}}, "rule: pareto"),
    "scores that agree": ({"objective": {"type": "sigmoid"}, "online": {"rule": {"type": "agreement"}}}, "rule: agreement"),
    "too few for confidence": (
        {"objective": {"type": "sigmoid"}, "online": {"rule": {"type": "confident"}}}, "raise online.group_size"
    ),
    "how sure a label is": ({"objective": {"type": "soft"}}, "needs p_win"),
    "a loss of smoothed labels": ({"objective": {"type": "smpo"}}, "needs p_win"),
    "an average that no loss reads": ({"online": {"average": {}}}, "online.average and objective.near of awm belong together"),
    "a loss that lacks its average": ({"objective": {"type": "awm", "near": 1.0}}, "set both or none"),
    "predictions at several times": ({"objective": {"type": "nft"}, "coupling": {"draws": 2}}, "drop coupling.draws"),
    "an unknown scorer": ({"online": {"reward": {"scorers": ["beauty"]}}}, "online.reward.scorers: unknown scorer 'beauty'"),
    "a misspelt weight": ({"online": {"reward": {"weights": {"brigthness": 1.0}}}}, "no scorer gives 'brigthness'"),
    "a win rate of one": (
        {"online": {"group_size": 1, "advantages": {"baseline": "running", "shaping": "win_rate"}}}, "group_size above 1"
    ),
    "advantages that pairs do not read": (
        {"objective": {"type": "sigmoid"}, "online": {"advantages": {"std": "group"}}}, "drop online.advantages"
    ),
    "pairs that steps do not make": ({"online": {"rule": {"type": "all"}}}, "drop online.rule"),
    "noise of its own for steps": ({"coupling": {"noise": "independent"}}, "drop coupling"),
    "an old sample without a ratio": ({"objective": {"type": "reinforce"}, "online": {"inner_epochs": 4}}, "reinforce"),
    "several noises of steps": ({"online": {"repeats": 2}}, "repeats"),
    "accumulation": ({"train": {"gradient_accumulation_steps": 2}}, "online.updates"),
    "a confidence that nothing weighs": (
        {"objective": {"type": "sigmoid"}, "online": {"reward": {"confidence": "brightness_sure"}}}, "drop it"
    ),
    "one noise and no other": (
        {"objective": {"type": "nft"}, "online": {"rollout": {"rule": {"type": "ode"}, "same_noise": True}}}, "drop same_noise"
    ),
    "less than no guidance": ({"online": {"rollout": {"guidance_scale": 0.5}}}, "online.rollout.guidance_scale"),
    "retries that are not made": ({"online": {"reward": {"retries": 5}}}, "retries is read with on_error: retry alone"),
    "weights by time that nft does not read": (
        {"objective": {"type": "nft"}, "timesteps": {"type": "uniform", "weighting": "min_snr"}}, "drop it"
    ),
    "a choice by prompts that are learned from": (
        {
            "online": {"prompts": "shapes:select", "num_prompts": 4}, "evaluate": {"select_prompts": 4},
            "train": {"metric_for_best": "select/score"},
        },
        "online.prompts: all of them are evaluated on",
    ),
    "captions dropped": ({"train": {"caption_dropout": 0.1}}, "drop"),
    "gains of advantages": ({"objective": {"type": "rank_dpo"}}, "online gives advantages: take infonca"),
    "no winners to stop on": ({"train": {"winner_drift_patience": 2}}, "winner_drift_patience needs"),
    "no pairs to stop on": ({"train": {"early_stopping_patience": 2}}, "select/score"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_with_the_remedy(case: str, tiny: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    sections = small(tiny, tmp_path / "run")
    for key, value in change.items():
        if value is None or key == "objective":
            sections[key] = value
            continue
        at = sections.setdefault(key, {})
        for name, x in value.items():
            at[name] = {**at[name], **x} if isinstance(x, dict) and isinstance(at.get(name), dict) and "type" not in x else x
    with pytest.raises(ConfigError, match=said):
        train(validate(TrainConfig, sections))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_null_takes_out_a_weight_of_the_file_below(tiny: Path, tmp_path: Path) -> None:
    reward = {"scorers": ["shapes"], "weights": {"score": None, "exact": 1.0}}
    config = validate(TrainConfig, small(tiny, tmp_path / "run", online={**online().model_dump(), "reward": reward}))
    assert config.online is not None
    assert config.online.reward.weights == {"exact": 1.0}


def test_pairs_that_are_not_read_are_not_written(tiny: Path, tmp_path: Path) -> None:
    config = validate(TrainConfig, small(tiny, tmp_path / "run"))
    written = yaml.safe_load(dump(config))
    assert "data" not in written
    assert validate(TrainConfig, written) == config


@pytest.mark.parametrize("key", ["weights", "confidence"])
def test_a_value_that_no_scorer_gives_is_refused_when_the_file_is_read(key: str, tiny: Path, tmp_path: Path) -> None:
    reward = {"scorers": ["shapes", "taste:size"], "weights": {"taste_size": 1.0}} | {
        key: {"exakt": 1.0} if key == "weights" else "exakt"
    }
    with pytest.raises(ConfigError, match=rf"online\.reward\.{key}: no scorer gives 'exakt', did you mean 'exact'"):
        validate(TrainConfig, small(tiny, tmp_path / "run", online=online(reward=reward).model_dump()))


def test_a_clip_range_under_the_noise_is_refused_before_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign import rollout

    honest = rollout.replay
    monkeypatch.setattr(
        "diffalign.preflight.replay", lambda *a, **k: honest(*a, **k) * (1 + 1e-4)
    )  # a kernel that rounds otherwise
    sections = small(tiny, tmp_path / "run", objective={"type": "ppo", "clip_range": 1e-6})
    with pytest.raises(ConfigError, match="clip_range") as refused:
        train(validate(TrainConfig, sections))
    assert "widen it, or replay as sampled" in str(refused.value.hint)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_schedule_without_a_density_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The one step of a flow goes onto clean data."""
    rollout = {"rule": {"type": "cps"}, "num_inference_steps": 1, "batch_size": 4}
    sections = small(folder_of("sd3"), tmp_path / "run", online=online(rollout=rollout).model_dump())
    with pytest.raises(ConfigError, match="none of the 1 steps has a density"):
        train(validate(TrainConfig, sections))


def test_two_passes_of_guidance_on_a_model_with_distilled_guidance_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prompts with negatives ask for them; the scale alone is the number that such a model is told."""
    (tmp_path / "prompts.csv").write_text("prompt,negative_prompt\n" + "".join(f"picture {i},dark\n" for i in range(8)))
    rollout = {"rule": {"type": "cps"}, "guidance_scale": 3.5, "num_inference_steps": 3, "batch_size": 4}
    spec = online(rollout=rollout, prompts=str(tmp_path / "prompts.csv"))
    sections = small(folder_of("flux-dev"), tmp_path / "run", online=spec.model_dump())
    sections["model"]["max_sequence_length"] = 16
    with pytest.raises(ConfigError, match="two passes") as refused:
        train(validate(TrainConfig, sections))
    assert "drop the negative prompts" in str(refused.value.hint)
    assert not (tmp_path / "run").exists()


def test_a_model_with_distilled_guidance_is_trained_at_the_number_that_it_samples_with(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Losses on images, which noise them again, as well as those on steps."""
    from diffalign.path import denoise_error
    from diffalign.scoring import make_scorers
    from diffalign.train.terms import view

    model = build_model(ModelSpec(path=str(folder_of("flux-dev")), lora=LoRA(rank=4), max_sequence_length=16))
    for scale in (1.0, 3.5):
        spec = online(rollout={"rule": {"type": "ode"}, "guidance_scale": scale})
        rewards = Rewards(spec.reward, make_scorers(spec.reward.scorers), tmp_path)
        f = OnlineFeed(Collector(model, PROMPTS, spec, rewards, replays=False), Uniform(), data="images", batch_size=4)
        batch = next(f.batches(0))
        found = f.terms(model, batch, frozenset({"reference"}))
        v = view(model, batch, f.coupling, frozenset())
        with torch.no_grad():
            by_hand = denoise_error(model.predict(v.x, v.t, v.cond(), scale), v.wanted)
            other = model.predict(v.x, v.t, v.cond(), 4.5 - scale)
        assert not torch.allclose(denoise_error(other, v.wanted), by_hand, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.error.detach(), by_hand)
        torch.testing.assert_close(found.ref, by_hand)  # before the first step the reference is the policy


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"type": "ppo", "clip_range": 0.5, "clip_range_high": 1e-6}, "objective.clip_range_high"),
        ({"type": "grpo_guard", "clip_range": 1e-9}, "objective.clip_range"),
        ({"type": "flow_dppo", "tau": 1e-12}, "objective.tau"),
    ],
)
def test_every_limit_is_held_against_the_noise(
    objective: dict[str, Any], said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign import rollout

    honest = rollout.replay
    monkeypatch.setattr("diffalign.preflight.replay", lambda *a, **k: honest(*a, **k) * (1 + 1e-4))
    with pytest.raises(ConfigError, match=said):
        train(validate(TrainConfig, small(tiny, tmp_path / "run", objective=objective)))


def test_the_worst_of_all_processes_decides(feed: Callable[..., OnlineFeed]) -> None:
    from contextlib import nullcontext

    f = feed(world=2, gather=lambda x: torch.cat([x, torch.tensor([[0.1, 0.2, 0.3]])]))
    found = f.collector.preflight(f.batch_size, nullcontext)
    assert (found.ratio_error, found.guard_error, found.kl_error) == pytest.approx((0.1, 0.2, 0.3))


def test_what_the_preflight_found_is_printed(tiny: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    """DDIM with eta 1 trains its last step almost alone, and is told so; the remedy silences it."""
    rollout = {"num_inference_steps": 10, "batch_size": 4}
    config = small(tiny, tmp_path / "run", online=online(rollout=rollout).model_dump(), train={"max_steps": 1})
    run = train(validate(TrainConfig, config))
    printed = capsys.readouterr().err
    assert "|ratio - 1| up to 0" in printed
    assert "9: 91.9" in printed
    assert "step 9 has 92 % of the squared gradient: leave it out by online.rollout.window" in caplog.text
    assert run.metrics["largest_step_share"] > 0.5
    caplog.clear()
    window = {"type": "fixed", "begin": 0, "size": 9}
    config = small(tiny, tmp_path / "less", online=online(rollout=rollout | {"window": window}).model_dump())
    assert train(validate(TrainConfig, config)).metrics["largest_step_share"] < 0.5
    assert "squared gradient" not in caplog.text


def test_metrics_name_the_reward_and_the_ratio(tiny: Path, tmp_path: Path) -> None:
    run = train(validate(TrainConfig, small(tiny, tmp_path / "run")))
    lines = read_metrics(run.folder)
    assert {"rollout/reward", "rollout/reward_std", "rollout/brightness"} <= set().union(*map(set, lines))
    assert json.loads((run.folder / "metrics.json").read_text())["ratio_noise"] == 0
