"""Preferences between steps of the model's own trajectories: whose they are, what they are worth, and that they come back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_online import BRIGHT, PROMPTS, online, small, weights_of

from diffalign.building import build_model
from diffalign.data.images import to_uint8
from diffalign.errors import ConfigError
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import PairTerms
from diffalign.recipes import TrainConfig, train
from diffalign.sampling import encode_once
from diffalign.scorers import ScoreInput
from diffalign.spec import dump, validate
from diffalign.timesteps import Uniform
from diffalign.train.collecting import Collector
from diffalign.train.online import Online
from diffalign.train.rewards import Rewards
from diffalign.train.stepwise import ForkCollector, StateFeed, StepwiseFeed
from diffalign.train.tracking import read_metrics

ALL = frozenset({"loser", "reference", "old", "scores"})
Make = Callable[..., StepwiseFeed]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))


@pytest.fixture
def feed(model: Any, tmp_path: Path) -> Make:
    from diffalign.scoring import make_scorers

    def make(credit: str = "steps", spec: Online | None = None, **more: Any) -> StepwiseFeed:
        spec = spec or online(credit=credit)
        rewards = Rewards(spec.reward, make_scorers(spec.reward.scorers), tmp_path)
        kind, makes = (StateFeed, ForkCollector) if credit == "state" else (StepwiseFeed, Collector)
        how = {name: more.pop(name) for name in ("rank", "world", "gather") if name in more}
        collector = makes(model, PROMPTS, spec, rewards, replays=True, seed=1, **how)
        return kind(collector, Uniform(), **{"data": "pairs", "batch_size": 4} | more)

    return make


@pytest.fixture
def moved(model: Any) -> Any:
    """The adapter away from the reference, for one test."""
    trainable = model.named_weights.trainable()
    before = {n: p.detach().clone() for n, p in trainable.items()}
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable.values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    yield model
    with torch.no_grad():
        for n, p in trainable.items():
            p.copy_(before[n])


def read(f: StepwiseFeed, batch: Any, needs: frozenset[Any] = ALL) -> PairTerms:
    terms = f.terms(f.model, batch, needs)
    assert isinstance(terms, PairTerms)
    return terms


# --- errors of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["steps", "trajectory", "state"])
def test_policy_reference_and_sampler_are_one_before_the_first_update(feed: Make, credit: str) -> None:
    """Bit for bit: the errors are those of the noise that was drawn."""
    f = feed(credit)
    for batch in f.batches(0):
        terms = read(f, batch)
        assert torch.equal(terms.winner, terms.ref_winner)
        assert torch.equal(terms.winner, terms.old_winner)
        assert torch.equal(terms.loser, terms.ref_loser)
        assert torch.equal(terms.loser, terms.old_loser)
        paths, expected = batch.block.paths, 0.0
        better = batch.block.chosen if credit == "state" else paths.x_next
        for slot in batch.slots:
            std = paths.std[batch.rows, slot].double().view(-1, 1, 1, 1)
            z = (better[batch.rows, slot].double() - paths.mean[batch.rows, slot].double()) / std
            expected = expected + z.square().flatten(1).mean(1) / 2
        assert terms.winner.tolist() == pytest.approx([expected[w].item() for w, _ in batch.pairs], rel=1e-9)


@pytest.mark.parametrize("credit", ["steps", "state"])
def test_stored_means_are_compared_with_replays_of_as_many_rows(
    feed: Make, model: Any, monkeypatch: pytest.MonkeyPatch, credit: str
) -> None:
    """Where pairs leave rows out, a replay of fewer would round otherwise than what the preflight measured; the terms are
    those of the pairs alike.
    """
    reward = {"scorers": ["test_stepwise:often_flat"], "weights": {"often_flat": 1.0}} if credit == "state" else None
    more: dict[str, Any] = {"reward": reward} if reward else {"group_size": 4}
    f = feed(credit, online(credit=credit, **more))
    sizes, inner = [], model.predict
    monkeypatch.setattr(model, "predict", lambda x, *a, **k: sizes.append(len(x)) or inner(x, *a, **k))
    fewer = [b for b in f.batches(0) if len(b.rows) < len(b.part)]
    assert fewer
    for batch in fewer:
        sizes.clear()
        terms = read(f, batch)
        assert set(sizes) == {len(batch.part)}
        sizes.clear()
        without = read(f, batch, ALL - {"old"})
        assert set(sizes) == {len(batch.rows)}
        torch.testing.assert_close(terms.winner, without.winner, rtol=1e-5, atol=0)
        torch.testing.assert_close(terms.loser, without.loser, rtol=1e-5, atol=0)
        assert torch.equal(terms.score_winner, without.score_winner)
        assert torch.equal(terms.winner, terms.old_winner)


@pytest.mark.parametrize("credit", ["steps", "state"])
def test_differences_of_errors_are_log_ratios_of_gaussians(feed: Make, moved: Any, credit: str) -> None:
    """Against torch's own density: e_ref - e = log p - log p_ref, the mean over dimensions."""
    from torch.distributions import Normal

    from diffalign.rollout import conditions, replay

    f = feed(credit)
    batch = next(iter(f.batches(0)))
    terms, block, (slot,) = read(f, batch), batch.block, batch.slots
    some = block.paths[batch.rows]
    cond, negative = conditions(moved, block.items, f.spec.rollout)
    x_next = block.rejected[batch.rows][:, slot] if credit == "state" else some.x_next[:, slot]

    def density(weights: str | None) -> torch.Tensor:
        from contextlib import nullcontext

        with torch.no_grad(), moved.weights(weights) if weights else nullcontext():
            mean = replay(moved, some, slot, cond[batch.rows], f.spec.rollout, negative)
        std = some.std[:, slot].double().view(-1, 1, 1, 1)
        return Normal(mean.double(), std).log_prob(x_next.double()).flatten(1).mean(1)

    losers = [y for _, y in batch.pairs]
    expected = (density(None) - density("reference"))[losers]
    assert expected.abs().min() > 0
    torch.testing.assert_close((terms.ref_loser - terms.loser).detach(), expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(terms.loser.detach(), terms.old_loser)  # the moved policy is the one that sampled


def test_errors_of_a_trajectory_are_the_sums_over_its_steps(feed: Make, moved: Any) -> None:
    apart, whole = feed("steps"), feed("trajectory")
    summed: dict[int, Any] = {}
    for batch in apart.batches(0):
        terms, key = read(apart, batch), batch.rows[0] + 100 * [id(b) for b in apart.blocks].index(id(batch.block))
        both = torch.stack([terms.winner, terms.ref_winner, terms.loser, terms.old_loser])
        summed[key] = summed.get(key, 0) + both.detach()
    found = [read(whole, batch) for batch in whole.batches(0)]
    order = [b.rows[0] + 100 * [id(x) for x in whole.blocks].index(id(b.block)) for b in whole.batches(0)]
    for key, terms in zip(order, found, strict=True):
        got = torch.stack([terms.winner, terms.ref_winner, terms.loser, terms.old_loser]).detach()
        torch.testing.assert_close(got, summed[key])
        ratios = terms.log_ratios
        assert ratios is not None
        assert ratios.shape == (len(terms.winner), whole.blocks[0].paths.std.shape[1], 2)
        torch.testing.assert_close(ratios[..., 0].sum(1), terms.old_winner - terms.winner)
        torch.testing.assert_close(ratios[..., 1].sum(1), terms.old_loser - terms.loser)


# --- whose preference it is ------------------------------------------------------------------------------------------


def test_every_stored_step_goes_by_the_finished_images(feed: Make) -> None:
    f = feed("steps", online(credit="steps", group_size=4))
    seen = set()
    for batch in f.batches(0):
        terms = read(f, batch)
        for n, (w, y) in enumerate(batch.pairs):
            win, lose = batch.rows[w], batch.rows[y]
            group = batch.block.rewards.view(-1, 4)[win // 4]
            assert win // 4 == lose // 4
            assert batch.block.rewards[win] == group.max()
            assert batch.block.rewards[lose] == group.min()
            assert terms.score_winner[n] > terms.score_loser[n]
        seen |= {(id(batch.block), slot) for slot in batch.slots}
    assert len(seen) == sum(b.paths.std.shape[1] for b in f.blocks)


def test_candidates_of_a_state_are_ranked_by_what_the_model_makes_of_them(feed: Make, model: Any) -> None:
    """The previews of both, made again here by the scheduler's own x0, have the scores that the pair was chosen by."""
    spec = online(credit="state", group_size=4, rollout={"num_inference_steps": 4})
    f = feed("state", spec)
    list(f.batches(0))
    timesteps, grid = model.grid(4)
    for fork in f.blocks:
        cond = encode_once(model, [i.prompt.text for i in fork.items])
        for slot in range(fork.paths.std.shape[1]):
            then = int(fork.paths.steps[0, slot]) + 1
            for n, x in enumerate((fork.chosen[:, slot], fork.rejected[:, slot])):
                x0 = x
                if then < len(timesteps):
                    eps = model.predict(x, timesteps[then].expand(len(x)), cond, 1.0)
                    c = grid[[then]]
                    x0 = (x - c.sigma * eps) / c.alpha
                pixels = to_uint8(model.decode(x0)).double().flatten(1).mean(1) / 255
                torch.testing.assert_close(fork.scores[:, slot, n].double(), pixels, rtol=0, atol=2e-3)
        assert (fork.scores[..., 0] >= fork.scores[..., 1]).all()
        assert torch.equal(fork.decided, fork.scores[..., 0] > fork.scores[..., 1])
        assert (fork.chosen - fork.rejected).flatten(2).abs().amax(-1).min() > 0


def test_scorers_are_told_the_time_of_each_preview(feed: Make, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the state after the step, as the network is told it; 0 where the schedule ends."""
    f, seen = feed("state"), []
    inner = f.collector.rewards._ask

    def ask(batch: ScoreInput) -> Any:
        assert batch.times is not None
        seen.append(batch.times.tolist())
        return inner(batch)

    monkeypatch.setattr(f.collector.rewards, "_ask", ask)
    f.collector(0)
    settings = f.spec.rollout
    grid = [*model.grid(settings.num_inference_steps)[0].tolist(), 0.0]
    steps = f.spec.rollout.window.length(settings.num_inference_steps)
    wanted = [[t] * settings.batch_size for t in grid[1 : steps + 1]]
    assert seen == wanted * (len(seen) // len(wanted))
    assert len({x[0] for x in seen}) == steps


def test_both_sides_of_a_state_share_it_and_a_random_one_goes_on(feed: Make, model: Any) -> None:
    from diffalign.branching import branch

    f = feed("state")
    items, settings = f.collector._plan(0)[0], f.spec.rollout
    chosen = set()
    for epoch in range(4):
        made = branch(model, items, settings, 1, epoch, 3, lambda rows, slots, x0, t: None)
        assert made.candidates.shape[1:3] == (made.paths.std.shape[1], 3)
        for row in range(len(items)):
            for slot in range(made.paths.std.shape[1] - 1):
                came = [torch.equal(made.candidates[row, slot, k], made.paths.x[row, slot + 1]) for k in range(3)]
                assert sum(came) == 1
                chosen.add(came.index(True))
    assert chosen == {0, 1, 2}


def test_pairs_count_alike_whatever_the_ties(feed: Make) -> None:
    """Over all micro-batches the weights are a mean over the decided pairs; ties weigh nothing."""
    flat = {"scorers": ["test_stepwise:often_flat"], "weights": {"often_flat": 1.0}}
    for credit, size in (("steps", 2), ("state", 2), ("trajectory", 2)):
        f = feed(credit, online(credit=credit, reward=flat, group_size=size, prompts_per_rollout=8))
        batches = list(f.batches(0))
        weights = [w / len(b) / len(batches) for b in batches for w in b.weight.tolist()]
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) == 0.0
        assert len({round(w, 6) for w in weights if w}) == 1
        if credit == "state":  # and cost nothing, but for one row where all are ties, which processes wait for
            decided = [batch.block.decided[:, batch.slots[0]].sum().item() for batch in batches]
            assert [len(batch.rows) for batch in batches] == [max(1, n) for n in decided]


def often_flat(images: Any, prompts: Any) -> list[float]:
    return [float(np.asarray(x).astype(int).sum() % 2) for x in images]


# --- seeds, processes, cost, resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["steps", "state"])
def test_two_processes_see_the_pairs_of_one(feed: Make, credit: str) -> None:
    alone = feed(credit)
    list(alone.batches(0))
    for rank in (0, 1):
        shared = feed(credit, rank=rank, world=2)
        shared.collector.gather = lambda values: torch.cat([values, values])
        list(shared.batches(0))
        assert len(shared.blocks) == 1
        for name in ("x", "x_next", "mean"):
            assert torch.equal(getattr(shared.blocks[0].paths, name), getattr(alone.blocks[rank].paths, name))
        if credit == "state":
            assert torch.equal(shared.blocks[0].chosen, alone.blocks[rank].chosen)
            assert torch.equal(shared.blocks[0].rejected, alone.blocks[rank].rejected)


def test_passes_and_rewards_are_counted(feed: Make, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the network itself sees, in images; a backward pass counts twice."""
    for credit in ("steps", "trajectory", "state"):
        f, seen = feed(credit), 0
        inner = type(model)._forward

        def forward(self: Any, x: Any, t: Any, cond: Any, inner: Any = inner) -> Any:
            nonlocal seen
            seen += len(x) * (3 if torch.is_grad_enabled() else 1)
            return inner(self, x, t, cond)

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_forward", forward)
            cost = sum(read(f, b, frozenset({"loser", "reference"})).cost for b in f.batches(0))
        assert cost == seen, credit
        steps = f.blocks[0].paths.std.shape[1]
        assert f.totals()["reward_calls"] == (8 * steps if credit == "state" else 8)


KINDS = {
    "d3po": ({"type": "d3po", "beta": 0.1}, "steps"),
    "prdp": ({"type": "prdp", "clip_range": 0.1}, "trajectory"),
    "spo": ({"type": "spo"}, "state"),
    "sigmoid": ({"type": "sigmoid", "beta": 10, "kappa": 1}, "state"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_inside_a_rollout_is_bit_equal(kind: str, tiny: Path, tmp_path: Path) -> None:
    objective, credit = KINDS[kind]
    more: dict[str, Any] = {"objective": objective, "online": online(updates=2, inner_epochs=2, credit=credit).model_dump()}
    whole = train(validate(TrainConfig, small(tiny, tmp_path / "whole", **more, train={"max_steps": 6})))
    train(validate(TrainConfig, small(tiny, tmp_path / "cut", **more, train={"max_steps": 3})))
    cut = validate(TrainConfig, small(tiny, tmp_path / "cut", **more, train={"max_steps": 6}) | {"resume_from": "latest"})
    rest = train(cut)
    assert rest.metrics["reward_calls"] == whole.metrics["reward_calls"]
    assert rest.metrics["denoiser_passes"] == whole.metrics["denoiser_passes"]
    assert rest.metrics["ratio_noise"] == 0
    a, b = weights_of(whole.folder), weights_of(rest.folder)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(w.abs().sum() > 0 for n, w in a.items() if "lora_B" in n)


@pytest.mark.parametrize("credit", ["steps", "state"])
def test_what_was_preferred_becomes_more_likely(credit: str, tiny: Path, tmp_path: Path) -> None:
    """Over a few uses of one rollout: the loss falls below log 2 and the margin of the likelihoods has the right sign."""
    spec = online(credit=credit, inner_epochs=6, prompts_per_rollout=2)
    more: dict[str, Any] = {"objective": {"type": "sigmoid", "beta": 100, "kappa": 1}, "online": spec.model_dump()}
    run = train(validate(TrainConfig, small(tiny, tmp_path / "run", **more, train={"max_steps": 6, "learning_rate": 3e-3})))
    lines = [x for x in read_metrics(run.folder) if "loss" in x]
    assert lines[0]["margin"] == 0
    assert lines[-1]["margin"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["d3po", "prdp", "spo"])
def test_two_real_processes_train_as_one(kind: str, tiny: Path, tmp_path: Path) -> None:
    objective, credit = KINDS[kind]
    losses = []
    for n in (1, 2):
        more: dict[str, Any] = {"objective": objective, "online": online(credit=credit).model_dump()}
        config = validate(TrainConfig, small(tiny, tmp_path / f"run{n}", **more, train={"adam_epsilon": 0.01}))
        (tmp_path / f"{n}.yaml").write_text(dump(config))
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        port = str(29900 + os.getpid() % 90)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", port]
        words = [*launch, "-m", "diffalign", "train", str(tmp_path / f"{n}.yaml")]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = read_metrics(tmp_path / f"run{n}")
        losses.append([x["rollout/reward"] for x in lines if "rollout/reward" in x])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    a, b = (weights_of(tmp_path / f"run{n}") for n in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


# --- precision, and what cannot work ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", pytest.param("sd3", marks=pytest.mark.slow)])
def test_half_precision_replays_what_was_sampled(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Prompts, and what guidance starts from, are encoded alike in rollout and training, also under autocast and after a
    look in between: while the weights stay, which a rate of next to nothing sees to, the ratio is 1 bit for bit.
    """
    rule = {"type": "ddim", "eta": 1.0} if family == "sd" else {"type": "cps"}
    spec = online(prompts_per_rollout=2, inner_epochs=2, rollout={"rule": rule, "guidance_scale": 3.0})
    sections = small(
        folder_of(family),
        tmp_path / "run",
        online=spec.model_dump(),
        train={"mixed_precision": "bf16", "eval_steps": 1, "learning_rate": 1e-30},
        watch={"num_prompts": 1, "images_per_prompt": 1, "scorers": ["test_watch:greenness"]},
        evaluate={"enabled": False, "sampling": {"num_inference_steps": 1, "guidance_scale": 3.0}},
    )
    if family == "sd3":
        sections["model"]["max_sequence_length"] = 16
    run = train(validate(TrainConfig, sections))
    assert [x["kl/old"] for x in read_metrics(run.folder) if "loss" in x] == [0, 0]
    assert run.metrics["ratio_noise"] == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a loss on steps": ({"objective": {"type": "ppo"}}, "drop online.credit"),
    "a loss on groups": ({"objective": {"type": "infonca"}}, "drop online.credit"),
    "terms that steps have not": ({"objective": {"type": "soft"}}, "credit=image"),
    "steps without noise": ({"rollout": {"rule": {"type": "ode"}}}, "use ddim"),
    "parts of groups": ({"group_size": 4, "train": {"per_device_train_batch_size": 2}}, "multiple of it"),
    "several pairs of a state": ({"credit": "state", "rule": {"type": "all"}}, "best_worst"),
    "advantages of previews": ({"credit": "state", "advantages": {"std": "group"}}, "drop online.advantages"),
    "some of a group": ({"credit": "image", "advantages": {"keep": {"best": 1, "worst": 1}}}, "drop online.advantages.keep"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_with_the_remedy(case: str, tiny: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    change = {"objective": {"type": "spo"}, "train": {}, "credit": "steps"} | change
    sections = small(tiny, tmp_path / "run", objective=change.pop("objective"), train=change.pop("train"))
    sections["online"] = online().model_dump() | {"reward": {"scorers": [BRIGHT], "weights": {"brightness": 1.0}}}
    sections["online"]["rollout"] |= change.pop("rollout", {})
    sections["online"] |= change
    with pytest.raises(ConfigError, match=said):
        train(validate(TrainConfig, sections))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
