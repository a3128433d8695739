"""Rounds: against the same rounds by hand, what is sampled by whom and compared with what, kills, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from diffalign.building import build_model, ready_model
from diffalign.cli import main
from diffalign.data.files import write_text
from diffalign.data.images import decode, to_pil
from diffalign.data.pairs import read_pairs
from diffalign.data.prompts import Prompt
from diffalign.data.tables import read_table
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.estimate import estimate
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import OBJECTIVES, PairTerms
from diffalign.pairs import Group
from diffalign.recipes import TrainConfig, train
from diffalign.round_pairs import Curated, drawn
from diffalign.rounds import compared_with, round_config, sampled_by
from diffalign.sampling import Item, Sampler, sample_items
from diffalign.spec import dump, validate, with_overrides
from diffalign.train.tracking import read_metrics

SCORED = "{type: scored, scorers: [compressibility], reward: {compressibility: 1}, images_per_prompt: 3}"
CURATED = "{type: curated, scorers: [compressibility], reward: {compressibility: 10}, images_per_prompt: 3}"


def config(overrides: list[str], *more: str, source: str = SCORED, objective: Any = "sigmoid") -> TrainConfig:
    loss = {"type": objective} if isinstance(objective, str) else objective
    base = {"model": {"path": "below", "lora": {"rank": 4}}, "objective": loss}
    small = [
        "evaluate.enabled=false", "data.limit=10", "train.logging_steps=1", "train.learning_rate=1e-3",
        f"rounds={{count: 2, source: {source}, sampling: {{num_inference_steps: 2, batch_size: 8}}, shard_size: 4}}",
    ]  # fmt: skip
    return validate(TrainConfig, with_overrides(base, [*overrides, *small, *more]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(whole if whole.exists() else folder / "pytorch_lora_weights.safetensors")


def equal(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- what rounds are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["{rank: 4}", "null"], ids=["lora", "full"])
def test_rounds_are_runs_that_begin_where_the_last_one_ended(overrides: list[str], tmp_path: Path, lora: str) -> None:
    """The second round by hand, from the first one's weights as model or adapter: the same weights, bit for bit."""
    run = train(config(overrides, f"model.lora={lora}"))
    assert [row["round"] for row in run.metrics["rounds"]] == [1, 2]
    assert equal(run.folder, run.folder / "round-2")
    first = run.folder / "round-1"
    before = [f"model.lora.path={first}"] if lora != "null" else ["model.lora=null", f"model.path={first}"]
    hand = ["rounds=null", f"data.path={run.folder}/round-2/data", "data.limit=null", f"output_dir={tmp_path / 'hand'}"]
    by_hand = train(config(overrides, *hand, *before))
    assert equal(by_hand.folder, run.folder)
    losses = [x["loss"] for x in read_metrics(run.folder / "round-2") if "loss" in x]
    assert losses == [x["loss"] for x in read_metrics(by_hand.folder) if "loss" in x]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference has moved along
    assert run.metrics["steps"] == 4
    assert [x["step"] for x in read_metrics(run.folder) if "loss" in x] == [1, 2, 3, 4]


def test_a_reference_that_stays_is_the_base(overrides: list[str], tmp_path: Path) -> None:
    run = train(config(overrides, "rounds.reference=base"))
    assert not math.isclose(read_metrics(run.folder / "round-2")[0]["loss"], math.log(2), abs_tol=1e-6)
    assert [row["compared_with"] for row in run.metrics["rounds"]] == ["base", "base"]
    first, second = (json.loads((run.folder / f"round-{n}" / "metrics.json").read_text()) for n in (1, 2))
    assert first["steps"] == second["steps"] == 2


@pytest.mark.slow
def test_a_round_and_the_whole_run_again(overrides: list[str], tmp_path: Path) -> None:
    """By their resolved configurations, from the command line, in other folders."""
    run = train(config(overrides, "rounds.reference=past", "rounds.count=3"))
    for source, folder in ((run.folder / "round-3", "one"), (run.folder, "all")):
        words = ["train", str(source / "config.resolved.yaml"), f"output_dir={tmp_path / folder}"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        assert equal(tmp_path / folder, run.folder)
    assert result.output.count("pairs of 30 images of reward") == 3
    assert (tmp_path / "all" / "round-2" / "report.html").exists()
    page = (tmp_path / "all" / "report.html").read_text()
    assert "<h2>Rounds</h2>" in page
    assert page.count('/report.html">') == 3
    assert "Reward of what was sampled" in page
    assert "3 rounds on images of its own" in (tmp_path / "all" / "README.md").read_text()


@pytest.mark.slow
def test_every_round_is_measured_against_the_base(overrides: list[str]) -> None:
    run = train(config(overrides, "evaluate.enabled=true"))
    one, two = run.metrics["rounds"]
    parts = [x["name"] for x in json.loads((run.folder / "env.json").read_text())["licences"]]
    assert parts[-2:] == ["shapes", "compressibility"]
    assert one["base_exact"] == two["base_exact"]
    assert run.metrics["aligned"]["score"] == two["score"]
    assert (run.folder / "samples" / "samples.json").exists()
    again = CliRunner().invoke(main, ["evaluate", str(run.folder), "num_prompts=2", "--json"])
    assert again.exit_code == 0, again.output


def test_no_model_of_a_round_stays_in_memory(overrides: list[str]) -> None:
    import gc

    from diffusers import UNet2DConditionModel

    def alive() -> int:
        return sum(isinstance(x, UNet2DConditionModel) for x in gc.get_objects())

    gc.collect()
    before, seen = alive(), []
    train(config(overrides, source="{type: self_play}"), finished=lambda folder: seen.append(alive()))
    assert seen == [before, before]


# --- who samples, and what it is compared with ----------------------------------------------------------------------


def test_losers_are_the_last_rounds_own_samples_beside_the_datas_winners(
    overrides: list[str], pairs_csv: Path, tiny: Path
) -> None:
    run = train(config(overrides, source="{type: self_play}", objective="spin"))
    winners = {p.chosen.key: p.prompt for p in read_pairs(pairs_csv, 10)}
    for number in (1, 2):
        model = ready_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
        if number == 2:
            model.restore(run.folder / "round-1")
        pairs = read_pairs(run.folder / f"round-{number}" / "data")
        assert {p.chosen.key: p.prompt for p in pairs} == winners
        rows = read_table(run.folder / f"round-{number}" / "data", "images").to_pylist()
        made = {row["prompt"]: row for row in rows if row["k"] is not None}
        for start in range(0, len(pairs), 4):  # shard by shard, as they were sampled
            some = pairs[start : start + 4]
            images = sample_items(
                model, [Item(Prompt(p.prompt), 0) for p in some], Sampler(num_inference_steps=2, batch_size=8), number
            )
            for pair, image in zip(some, images, strict=True):
                assert made[pair.prompt]["seed"] == number
                assert np.array_equal(np.asarray(decode(pair.rejected.data, "x")), np.asarray(to_pil(image[None])[0]))


def test_ddo_trains_on_the_same_pictures_as_labels(overrides: list[str]) -> None:
    run = train(config(overrides, source="{type: self_play}", objective="ddo"))
    logged = set().union(*read_metrics(run.folder))
    assert {"error/good", "error/bad", "accuracy"} <= logged


def test_a_past_reference_also_samples(overrides: list[str]) -> None:
    plan = config(overrides, "rounds.reference=past", "rounds.count=40", source="{type: self_play}", objective="seppo")
    drawn_from = Counter(compared_with(plan, 40 - n % 5) for n in range(5))
    assert all(sampled_by(plan, n) == compared_with(plan, n) < n for n in range(1, 41))
    assert len({compared_with(plan, n) for n in range(1, 41)}) > 10
    assert sum(drawn_from.values()) == 5
    for number in range(1, 41):
        of = compared_with(plan, number)
        reference = round_config(plan, number).model_dump()["reference"]
        assert reference == ({"type": "run", "path": f"{plan.output_dir}/round-{of}"} if of else {"type": "base"})
    last = config(overrides, "rounds.reference=base", "rounds.count=40")
    assert {sampled_by(last, n) - n for n in range(1, 41)} == {-1}


def test_the_reference_of_a_run_is_what_it_left(overrides: list[str], tmp_path: Path) -> None:
    """A policy that starts from a run and is compared with it has margin 0; and it resumes bit for bit."""
    first = train(config(overrides, "rounds=null", f"output_dir={tmp_path / 'first'}")).folder
    more = ["rounds=null", f"start_from={first}", f"reference={{type: run, path: {first}}}"]
    straight = train(config(overrides, *more, "train.max_steps=4", f"output_dir={tmp_path / 'a'}")).folder
    assert read_metrics(straight)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    train(config(overrides, *more, f"output_dir={tmp_path / 'b'}"))
    halves = train(config(overrides, *more, "train.max_steps=4", "resume_from=latest", f"output_dir={tmp_path / 'b'}")).folder
    assert equal(straight, halves)
    assert not (straight / "checkpoint-4" / "run.safetensors").exists()
    fewer = ["rounds=null", f"start_from={first}", "model.lora.target_modules=[to_q]", f"output_dir={tmp_path / 'd'}"]
    with pytest.raises(ModelError, match="its adapter has other layers"):
        train(config(overrides, *fewer))
    base = train(config(overrides, "rounds=null", f"start_from={first}", f"output_dir={tmp_path / 'c'}")).folder
    assert read_metrics(base)[0]["loss"] != pytest.approx(math.log(2), abs=1e-6)


# --- curated and own ------------------------------------------------------------------------------------------------


def test_one_of_k_is_kept_with_the_softmax_of_its_reward() -> None:
    source = validate_source(temperature=0.5)
    reward = [0.2, 0.9, -0.3, 0.5]
    g, found = np.random.default_rng(0), Counter()
    trials = 20_000
    for _ in range(trials):
        u = g.random(4)
        (pair,) = source.pick(Group(reward), lambda k, u=u: u[k])  # type: ignore[misc]
        assert pair.rejected != pair.chosen
        found[pair.chosen] += 1
    wanted = np.exp(np.array(reward) / 0.5)
    wanted /= wanted.sum()
    for k, p in enumerate(wanted):
        assert found[k] / trials == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / trials))
    best = validate_source(temperature=0)
    assert {best.pick(Group(reward), lambda k: 0.999)[0].chosen for _ in range(3)} == {1}


def validate_source(**more: Any) -> Curated:
    return Curated(scorers=["shapes"], reward={"score": 1.0}, images_per_prompt=4, **more)


def test_real_pictures_stand_beside_the_kept_ones(overrides: list[str], pairs_csv: Path) -> None:
    real = {p.chosen.key for p in read_pairs(pairs_csv, 10)}
    run = train(config(overrides, "rounds.num_prompts=6", source=CURATED[:-1] + ", real: 0.5}", objective="sft"))
    seen = []
    for number in (1, 2):
        pairs = read_pairs(run.folder / f"round-{number}" / "data")
        mixed = [p for p in pairs if p.chosen.key in real]
        assert (len(pairs), len(mixed)) == (9, 3)
        assert all(p.chosen.key == p.rejected.key for p in mixed)
        seen.append({p.chosen.key for p in mixed})
    assert seen[0] != seen[1]  # drawn anew


def test_samples_without_the_prompt_are_the_unconditional_ones(tiny: Path, overrides: list[str]) -> None:
    model = build_model(ModelSpec(path=str(tiny)))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, *model.latent_shape, generator=g), model.timestep(torch.tensor([0.2, 0.5, 0.9]))
    asked, none = model.encode_prompts(["a red circle"] * 3), model.encode_prompts([None] * 3)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x, t, asked, guidance=0.0), model.predict(x, t, none))
        assert not torch.allclose(model.predict(x, t, asked), model.predict(x, t, none))
    run = train(config(overrides, "rounds.sampling.guidance_scale=0", source="{type: own}", objective="sft"))
    pairs = read_pairs(run.folder / "round-2" / "data")
    assert len(pairs) == 10
    assert all(p.chosen.key == p.rejected.key for p in pairs)


def test_prompts_are_drawn_anew_from_a_file(overrides: list[str], tmp_path: Path) -> None:
    rows = [Prompt(f"prompt {i}") for i in range(50)]
    draws = [tuple(p.text for p in drawn(rows, 10, seed)) for seed in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    assert len(set(draws[0])) == 10
    write_text(tmp_path / "p.txt", "\n".join(p.text for p in rows))
    run = train(
        config(
            overrides, f"rounds.prompts={tmp_path / 'p.txt'}", "rounds.num_prompts=5", source="{type: own}", objective="sft"
        )
    )
    asked = [{p.prompt for p in read_pairs(run.folder / f"round-{n}" / "data")} for n in (1, 2)]
    assert [len(a) for a in asked] == [5, 5]
    assert asked[0] != asked[1]


# --- SePPO ----------------------------------------------------------------------------------------------------------


def test_seppo_flips_the_loser_where_the_policy_fits_the_winner_worse() -> None:
    one = {"beta": 1.0, "kappa": 1.0}
    seppo, dpo = (OBJECTIVES.options[n](**one) for n in ("seppo", "sigmoid"))
    win, lose = torch.tensor([0.4, -0.4]).double(), torch.tensor([0.3, 0.3]).double().requires_grad_()
    zero = torch.zeros(2).double()
    terms = PairTerms(-win, -lose, zero, zero)
    loss = seppo(terms, {}).loss
    assert loss[0].item() == pytest.approx(dpo(terms, {}).loss[0].item())
    assert loss[1].item() == pytest.approx(math.log1p(math.exp(-(-0.4 + 0.3))))
    (slope,) = torch.autograd.grad(loss.sum(), lose)
    assert slope[0] > 0  # a loser: the loss falls with its reward
    assert slope[1] < 0  # another winner


# --- stops and kills ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_rounds_go_on_from_where_the_last_ended(overrides: list[str], tmp_path: Path) -> None:
    straight = train(config(overrides, "rounds.count=3", f"output_dir={tmp_path / 'straight'}")).folder
    shutil.rmtree(train(config(overrides)).folder / "round-1" / "data")  # to save space
    longer = train(config(overrides, "rounds.count=3", "resume_from=latest"))
    assert equal(longer.folder, straight)
    assert len(longer.metrics["rounds"]) == 3
    again = train(config(overrides, "rounds.count=3", "resume_from=auto"))
    assert again.metrics == longer.metrics


SPOTS = [
    ("round-1/metrics.json", signal.SIGKILL), ("round-2/data/images/00000.parquet", signal.SIGKILL),
    ("round-2/checkpoint-2", signal.SIGKILL), ("round-2/checkpoint-4", signal.SIGTERM),
]  # fmt: skip
"""Between rounds, while images are sampled, and twice while it trains."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(overrides: list[str], tmp_path: Path) -> None:
    more = ["train.max_steps=8", "train.save_steps=1", "train.save_total_limit=20"]
    straight = train(config(overrides, *more, f"output_dir={tmp_path / 'straight'}")).folder
    plan = tmp_path / "plan.yaml"
    killed = tmp_path / "killed"
    write_text(plan, dump(config(overrides, *more, f"output_dir={killed}", "resume_from=auto")))
    command = [sys.executable, "-m", "diffalign", "train", str(plan)]
    for spot, how in SPOTS:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
        while not (killed / spot).exists():
            assert process.poll() is None, process.stderr.read().decode()[-2000:]  # type: ignore[union-attr]
            time.sleep(0.002)
        process.send_signal(how)
        assert process.wait(60) == (-9 if how == signal.SIGKILL else 130)
    assert not (killed / "metrics.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert equal(killed, straight)
    for number in (1, 2):
        data = [
            read_table(f / f"round-{number}" / "data", t).to_pylist() for f in (killed, straight) for t in ("images", "pairs")
        ]
        strip = [[{k: v for k, v in row.items() if k != "adapter"} for row in rows] for rows in data]
        assert strip[:2] == strip[2:]


@pytest.mark.slow
def test_two_processes_share_the_work_of_every_round(overrides: list[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    two = tmp_path / "two"
    linear = "train.adam_epsilon=0.01"  # Adam divides rounding by rounding where a gradient is 0
    half = "train.per_device_train_batch_size=2"
    write_text(plan, dump(config(overrides, linear, half, f"output_dir={two}", source="{type: self_play}")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "diffalign", "train", str(plan)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((two / "round-2" / "checkpoint-2" / "state.json").read_text())["processes"] == 2
    alone = train(config(overrides, linear, f"output_dir={tmp_path / 'one'}", source="{type: self_play}")).folder
    first = [read_table(f / "round-1" / "data", "images").to_pylist() for f in (alone, two)]
    assert first[0] == first[1]
    a, b = weights(alone), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "objective", "more", "said"),
    [
        (SCORED, "sigmoid", ["rounds.count=1"], "rounds.count: one round is a plain run: drop rounds"),
        (SCORED, "sigmoid", ["data.shuffle_labels=true"], "data.shuffle_labels exchanges labels that rounds have just made"),
        (SCORED, "sigmoid", ["reference={type: ema}"], "reference moves within a run, and rounds.reference between them"),
        (SCORED, "mapo", ["rounds.reference=base"], "rounds.reference is set, but mapo does without one: drop it"),
        (SCORED, "infonca", [], "rounds make pairs, but infonca is about groups"),
        ("{type: scored, reward: {score: 1}}", "sigmoid", [], "scorers"),
        ("{type: scored, scorers: [], reward: {score: 1}}", "sigmoid", [], "scorers"),
        ("{type: scored, scorers: [nope], reward: {score: 1}}", "sigmoid", [], "unknown scorer 'nope'"),
        (CURATED, "sigmoid", [], "rounds.source curated has no losers, but sigmoid asks for them: use objective.type: sft"),
        ("{type: own}", "ddo", [], "rounds.source own has no losers, but ddo asks for them"),
        (CURATED, "sft", ["data.swap_labels=true"], "data.swap_labels exchanges winner and loser, but rounds.source curated"),
        ("{type: self_play}", "rdp", [], "rdp reads scores, but rounds.source self_play makes none"),
        ("{type: self_play}", "sigmoid", ["data.curriculum={}"], "data.curriculum reads scores"),
        ("{type: self_play}", "sigmoid", ["rounds.prompts=shapes:train"], "self_play samples for the prompts of the data's"),
        ("{type: self_play}", "sigmoid", ["coupling.noise=stored"], "the noise of the data's pictures is not known"),
        (SCORED, "sigmoid", ["data.holdout_by=user"], "data.holdout_by: user reads what the pairs of a round do not say"),
        (SCORED, "sigmoid", ["data.maps=region"], "data.maps reads what the pairs of a round do not say"),
        ("{type: self_play}", "dro_hinge", ["coupling.noise=replay"], "replay makes losers of its own, and so do rounds"),
        (SCORED, "sigmoid", ["coupling.captions=own"], "both images of a round's pair have one caption"),
        (SCORED, "sigmoid", ["resume_from=x/checkpoint-3"], "use latest or auto"),
        (
            SCORED, "sigmoid", ["evaluate.enabled=true", "rounds.prompts=shapes:test"],
            "rounds.prompts and evaluate.prompts are both shapes:test: choose others",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_at_load(
    overrides: list[str], source: str, objective: str, more: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        config(overrides, *more, source=source, objective=objective)


def test_rounds_are_not_online(tmp_path: Path) -> None:
    plan = {"objective": {"type": "sigmoid"}, "rounds": {"count": 2, "source": {"type": "own"}}, "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="rounds sample between runs, and online within one: drop one"):
        validate(TrainConfig, plan | {"online": {}})


def test_wrong_input_leaves_nothing_behind(overrides: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    write_text(prompts, "a red circle on a grey background\na white cross on a blue background\n")
    same = ["evaluate.enabled=true", "evaluate.scorers=[compressibility]", f"evaluate.prompts={prompts}"]
    write_text(tmp_path / "asked.txt", "A red circle, on a grey background!\na blue cross on a white background\n")
    asked = f"rounds.prompts={tmp_path / 'asked.txt'}"
    with pytest.raises(ConfigError, match=r"1 of 2 prompts are evaluated on .*data.evaluation_prompts=drop"):
        train(config(overrides, *same, asked))
    with pytest.raises(ConfigError, match="no scorer gives 'score'"):
        train(config(overrides, source=SCORED.replace("{compressibility:", "{score:")))
    with pytest.raises(DataError, match=r"round 1: none of 30 images stands in a pair .*rule.min_margin"):
        train(config(overrides, "rounds.source.rule={type: best_worst, min_margin: 1e6}", f"output_dir={tmp_path / 'no'}"))
    with pytest.raises(ConfigError, match="holds no rounds"):
        train(config(overrides, "resume_from=latest"))
    assert not any(run.rglob("*.parquet"))
    assert not (run / "config.resolved.yaml").exists()
    train(config(overrides, *same, asked, "data.evaluation_prompts=drop", "data.holdout=0"))
    assert {p.prompt for p in read_pairs(run / "round-1" / "data")} == {"a blue cross on a white background"}
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config(overrides))


def test_an_estimate_counts_the_reference_of_a_round_and_its_sampling(overrides: list[str]) -> None:
    plain, moving, large = (
        estimate(config(overrides, *more))["phases"]
        for more in (["rounds.reference=base"], [], ["rounds.sampling.batch_size=64"])
    )
    assert moving["train"]["copies of them"] == plain["train"].get("copies of them", 0) + moving["train"]["trained weights"]
    assert large["sample"]["activations"] > moving["sample"]["activations"]
    assert "optimizer" not in large["sample"]
