"""The loop and its invariants, in one process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from diffalign.building import build_model, make_accelerator
from diffalign.catalogue import kind_of, shipped_configs
from diffalign.data.examples import of_pair
from diffalign.data.pairs import read_pairs
from diffalign.errors import ConfigError, DataError, DiffalignError, ModelError
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import MaPO, Objective, Sigmoid, Total, pair_metrics
from diffalign.recipes import Run, TrainConfig, train
from diffalign.spec import load_yaml, validate, with_overrides
from diffalign.timesteps import LogitNormal, Uniform
from diffalign.train.feeds import Offline
from diffalign.train.state import TrainSettings, TrainState, learning_rate_factor
from diffalign.train.tracking import read_metrics

BASE = {"objective": {"type": "sigmoid", "beta": 500}, "model": {"path": "set below", "lora": {"rank": 4}}}
BOTH = frozenset({"loser", "reference"})


def run(overrides: list[str], *more: str) -> Run:
    return train(validate(TrainConfig, with_overrides(BASE, [*overrides, *more])))


def feed(model: object, csv: Path, cache: Path, **kwargs: object) -> Offline:
    settings = {"size": (32, 32), "batch_size": 4, "seed": 3} | kwargs
    return Offline(model, [of_pair(p) for p in read_pairs(csv)], Uniform(), cache, **settings)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


# --- feed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["tiny", "tiny_v"])
def test_at_step_0_the_loss_is_ln_2_and_the_margin_exactly_0(
    request: pytest.FixtureRequest, kind: str, lora: LoRA | None, pairs_csv: Path, tmp_path: Path
) -> None:
    model = build_model(ModelSpec(path=str(request.getfixturevalue(kind)), lora=lora))
    source = feed(model, pairs_csv, tmp_path)
    for batch in source.batches(0):
        terms = source.terms(model, batch, BOTH)
        loss = Sigmoid(beta=5000)(terms, {}).loss
        assert loss.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)
        assert pair_metrics(terms)["margin"].tolist() == [0.0] * 4


def test_both_members_see_the_same_noise_time_and_caption(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    """Seen from outside: what the network is called with."""
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    source = feed(model, pairs_csv, tmp_path, caption_dropout=0.5)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    model.net.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((*args[:2], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    (batch,) = source.batches(0)
    source.terms(model, batch, BOTH)
    assert len(seen) == 2  # reference and policy, winners and losers in one pass each
    x, t, cond = seen[0]
    c = model.coeffs(t)
    a, s = c.over(x)
    eps = (x - a * torch.cat([batch.x0[:, 0], batch.x0[:, 1]])) / s
    torch.testing.assert_close(eps[:4], eps[4:], rtol=1e-3, atol=1e-3)
    assert torch.equal(t[:4], t[4:])
    assert torch.equal(cond[:4], cond[4:])
    assert all(torch.equal(p, q) for p, q in zip(seen[0], seen[1], strict=True))


def test_micro_batches_and_processes_tile_the_same_stream(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    cat = lambda batches, what: torch.cat([getattr(b, what) for b in batches])  # noqa: E731
    for step in (0, 7, 13):
        whole = list(feed(model, pairs_csv, tmp_path, batch_size=8).batches(step))
        parts = list(feed(model, pairs_csv, tmp_path, batch_size=2, accumulation=4).batches(step))
        ranks = [list(feed(model, pairs_csv, tmp_path, batch_size=4, rank=r, world=2).batches(step)) for r in (0, 1)]
        for what in ("eps", "u", "x0"):
            assert torch.equal(cat(whole, what), cat(parts, what))
            assert torch.equal(cat(whole, what), cat(ranks[0] + ranks[1], what))


def test_an_epoch_sees_every_pair_once_and_the_next_draws_new_noise(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    source = feed(model, pairs_csv, tmp_path, batch_size=8)
    first = torch.cat([b.x0[:, 0] for s in range(5) for b in source.batches(s)])
    assert len(torch.unique(first.flatten(1), dim=0)) == 40
    at = lambda step: {tuple(w.flatten()[:3].tolist()): e for b in source.batches(step) for w, e in zip(b.x0[:, 0], b.eps)}  # noqa: E731, B905
    one, two = {}, {}
    for s in range(5):
        one |= at(s)
        two |= at(s + 5)
    assert one.keys() == two.keys()
    assert not any(torch.equal(one[k], two[k]) for k in one)


def test_the_second_run_encodes_nothing(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    a = feed(model, pairs_csv, tmp_path)
    assert sum(c.made for c in a.latents.values()) == 80
    assert a.texts.made == 41  # and the empty prompt
    model.encode_images = None  # a call would fail
    b = feed(model, pairs_csv, tmp_path)
    assert (sum(c.made for c in b.latents.values()), b.texts.made) == (0, 0)


def test_timesteps_follow_their_law() -> None:
    g = torch.Generator().manual_seed(0)
    u = Uniform(low=0.2, high=0.6).draw(20_000, g)
    assert u.min() >= 0.2
    assert u.max() < 0.6
    assert u.mean().item() == pytest.approx(0.4, abs=0.005)
    t = LogitNormal(mean=0.5, std=0.8).draw(20_000, g)
    assert torch.logit(t).mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.logit(t).std().item() == pytest.approx(0.8, abs=0.03)


def test_min_snr_weight_is_capped_at_one() -> None:
    from diffalign.path import Coeffs

    s = torch.tensor([0.1, 0.3, 0.9])
    c = Coeffs((1 - s**2).sqrt(), s)
    wanted = torch.minimum(c.snr, torch.tensor(5.0)) / c.snr
    torch.testing.assert_close(Uniform(weighting="min_snr").weight(c), wanted)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(overrides: list[str], tmp_path: Path) -> None:
    result = run(overrides, "train.ema_decay=0.5", "train.eval_steps=1", "train.logging_steps=1", "data.holdout=0.2")
    names = {p.name for p in result.folder.iterdir()}
    assert names >= {
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "metrics.json",
        "checkpoint-2",
        "pytorch_lora_weights.safetensors",
        "samples",
    }
    m = json.loads((result.folder / "metrics.json").read_text())
    assert {"score", "score_se", "exact", "exact_se", "diversity"} <= m["base"].keys() == m["aligned"].keys()
    assert m["ceiling"]["exact"] >= 0
    assert "gap_closed" in m
    assert m["win_rate"].keys() == {"value", "low", "high"}
    assert m["denoiser_passes"] == 2 * 4 * 8  # steps x pairs x (2 images: one reference and three policy passes)
    lines = read_metrics(result.folder)
    logged = set().union(*lines)
    assert {"loss", "drift/winner", "drift/loser", "margin", "accuracy", "images_per_second", "peak_memory_gib"} <= logged
    assert {"heldout/loss", "heldout/accuracy", "heldout/drift/winner"} <= logged
    assert any(k.startswith("margin/q") for k in logged)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_training_comes_to_prefer_what_was_preferred(overrides: list[str], tmp_path: Path) -> None:
    """Bright pictures win over dark ones; after some steps the policy prefers them on pairs it was not trained on."""
    from PIL import Image

    lines = ["prompt,chosen,rejected"]
    for i in range(40):
        Image.new("RGB", (32, 32), (200 + i, 220, 240 - i)).save(tmp_path / f"{i}w.png")
        Image.new("RGB", (32, 32), (10 + i, 40, 50 - i)).save(tmp_path / f"{i}l.png")
        lines.append(f"picture {i},{i}w.png,{i}l.png")
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    more = ["model.lora=null", "train.learning_rate=2e-3", "train.max_steps=60", "train.per_device_train_batch_size=8"]
    result = run(overrides, *more, f"data.path={tmp_path / 'p.csv'}", "data.holdout=0.3", "evaluate.enabled=false")
    last = read_metrics(result.folder)[-1]
    assert last["heldout/accuracy"] > 0.8
    assert last["heldout/margin"] > 0


@pytest.mark.parametrize("more", [[], ["model.lora=null", "train.ema_decay=0.9"]], ids=["lora", "full-ema"])
def test_six_steps_are_three_and_three_bit_for_bit(overrides: list[str], tmp_path: Path, more: list[str]) -> None:
    common = [*overrides, "evaluate.enabled=false", "train.learning_rate=1e-3", "train.caption_dropout=0.3", *more]
    straight = tmp_path / "straight"
    run(common, "train.max_steps=6", f"output_dir={straight}", "train.logging_steps=1")
    halves = tmp_path / "halves"
    run(common, "train.max_steps=3", f"output_dir={halves}", "train.logging_steps=1")
    run(common, "train.max_steps=6", f"output_dir={halves}", "train.logging_steps=1", "resume_from=latest")
    from safetensors.torch import load_file

    for name in ("weights.safetensors", *(["ema.safetensors"] if more else [])):
        a, b = (load_file(f / "checkpoint-6" / name) for f in (straight, halves))
        assert all(torch.equal(a[k], b[k]) for k in a)
    optimizers = [torch.load(f / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"] for f in (straight, halves)]
    for i in optimizers[0]:
        assert all(torch.equal(optimizers[0][i][k], optimizers[1][i][k]) for k in ("exp_avg", "exp_avg_sq"))

    def strip(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        timed = ("images_per_second", "peak_memory_gib")
        return [{k: v for k, v in r.items() if k not in timed} for r in rows if "loss" in r]

    assert strip(read_metrics(straight)) == strip(read_metrics(halves))


def test_training_time_adds_up_over_resumes(overrides: list[str], tmp_path: Path) -> None:
    common = [*overrides, "evaluate.enabled=false", f"output_dir={tmp_path / 'run'}"]
    run(common, "train.max_steps=2")
    state = tmp_path / "run" / "checkpoint-2" / "state.json"
    stored = json.loads(state.read_text())
    assert stored["seconds"] > 0
    state.write_text(json.dumps(stored | {"seconds": 1000.0}))
    assert 1000 < run(common, "train.max_steps=3", "resume_from=latest").metrics["train_seconds"] < 1900


STATEFUL = {
    "sigmoid": (),
    "kto": ("objective={type: kto, beta: 500, decay: 0.5}",),
    "bco": ("objective={type: bco, beta: 500, decay: 0.5}",),
    "bco_pair": ("objective={type: bco_pair, beta: 500, decay: 0.5}",),
    "auto_beta": ("objective={type: sigmoid, beta: 50, auto_beta: 0.2}",),
    "groups": ("data.groups={by: user, robust: 0.5}",),
    "kinds": ("train.balance_kinds=0.5",),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_accumulation_equals_a_larger_batch(name: str, overrides: list[str], pairs_csv: Path, tmp_path: Path) -> None:
    """What an objective keeps moves once a step, whatever the micro-batches: seen in losses, weights and the checkpoint."""
    head, *lines = pairs_csv.read_text().splitlines()
    table = pairs_csv.parent / f"{name}.csv"
    rows = [f"{x},{'ab'[i % 3 > 0]},{i % 3 > 0:d}" for i, x in enumerate(lines)]
    table.write_text("\n".join([f"{head},user,kind", *rows]) + "\n")
    results, kept = [], []
    for batch, accumulation in ((8, 1), (2, 4)):
        folder = tmp_path / f"{batch}x{accumulation}"
        run(
            overrides,
            *STATEFUL[name],
            f"data.path={table}",
            f"train.per_device_train_batch_size={batch}",
            f"train.gradient_accumulation_steps={accumulation}",
            "train.learning_rate=1e-3",
            "train.adam_epsilon=0.01",  # or a weight without a gradient moves by the sign of rounding
            "train.max_steps=4",
            "train.logging_steps=1",
            "evaluate.enabled=false",
            f"output_dir={folder}",
        )
        results.append((weights(folder), [r["loss"] for r in read_metrics(folder) if "loss" in r]))
        kept.append(torch.load(folder / "checkpoint-4" / "extra.pt", weights_only=True)["objective"])
    assert bool(kept[0]) == (name != "sigmoid")
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-3, atol=1e-5)
    (a, losses_a), (b, losses_b) = results
    assert losses_a == pytest.approx(losses_b, rel=1e-4)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(overrides: list[str], tmp_path: Path) -> None:
    out = []
    for flag in ("true", "false"):
        run(overrides, f"model.gradient_checkpointing={flag}", "evaluate.enabled=false", f"output_dir={tmp_path / flag}")
        out.append(weights(tmp_path / flag))
    assert all(torch.allclose(out[0][k], out[1][k], atol=1e-6) for k in out[0])


def test_bf16_starts_at_ln_2_too(overrides: list[str]) -> None:
    result = run(overrides, "train.mixed_precision=bf16", "evaluate.enabled=false", "train.logging_steps=1")
    assert read_metrics(result.folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_fp16_without_a_gpu_is_refused(overrides: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, where fp16 is allowed")
    with pytest.raises(ConfigError, match=r"train\.mixed_precision: fp16 needs a CUDA device"):
        run(overrides, "train.mixed_precision=fp16")


def test_early_stop_and_best_weights(overrides: list[str]) -> None:
    """With a learning rate that ruins the model the first evaluation stays the best, and its weights are exported."""
    more = ["train.eval_steps=1", "train.max_steps=10", "train.early_stopping_patience=2", "train.load_best=true"]
    result = run(overrides, *more, "data.holdout=0.3", "train.learning_rate=0.3", "evaluate.enabled=false")
    assert result.metrics["steps"] < 10
    from safetensors.torch import load_file

    state = json.loads((result.folder / f"checkpoint-{result.metrics['steps']}" / "state.json").read_text())
    assert state["since_best"] == 2
    best = load_file(result.folder / f"checkpoint-{result.metrics['steps']}" / "best.safetensors")
    exported = weights(result.folder)
    total = lambda d: sum(v.double().abs().sum().item() for v in d.values())  # noqa: E731
    assert total(best) == pytest.approx(total(exported))


def test_a_learning_rate_that_explodes_stops_with_the_weights_untouched(overrides: list[str]) -> None:
    class Exploding(Objective):
        needs = frozenset({"loser"})

        def __call__(self, terms, state):  # type: ignore[no-untyped-def]
            from diffalign.objectives import LossOutput

            return LossOutput(terms.winner * float("inf"))

    config = validate(TrainConfig, with_overrides(BASE, [*overrides, "evaluate.enabled=false"]))
    with pytest.raises(DiffalignError, match=r"step 0: the gradient is (nan|inf); the weights were not touched"):
        train(config.model_copy(update={"objective": (Exploding(),)}))


def test_a_scaled_step_without_examples_is_none(tiny: Path) -> None:
    """fp16's scaler refuses to step where nothing was scaled: online training has such steps when all rewards tie."""
    state = scaled(tiny)
    before = {n: p.detach().clone() for n, p in state.parameters.items()}
    assert state.update()["grad_norm"] == 0
    assert state.step == 1
    assert all(torch.equal(p, before[n]) for n, p in state.parameters.items())


def test_scaled_steps_that_are_all_skipped_end_the_run(tiny: Path) -> None:
    """The scale is halved while there is hope; one good step and the count begins anew."""
    state = scaled(tiny)

    def step(gradient: float) -> None:
        for p in state.parameters.values():
            p.grad = torch.full_like(p, gradient)
        state.update()

    for _ in range(2):
        for _ in range(24):
            step(math.inf)
        step(1.0)
    for _ in range(24):
        step(math.nan)
    with pytest.raises(DiffalignError, match="as in the 24 steps before; the weights were not touched"):
        step(math.nan)


def scaled(tiny: Path) -> TrainState:
    """As with fp16 on a GPU, with the scaler that there is for the CPU."""
    acc = make_accelerator()
    acc.scaler = torch.amp.GradScaler("cpu")
    acc.scaler.scale(torch.ones(()))
    acc.state._mixed_precision, acc.native_amp = "fp16", True  # what makes it scale gradients back
    return TrainState(build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4))), acc, TrainSettings(max_steps=100))


def test_processes_wait_for_an_evaluation() -> None:
    """Of hours, on one process alone; the backends give up after 10 and 30 minutes."""
    assert make_accelerator().init_handler.timeout.total_seconds() >= 6 * 3600


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_trackers_get_the_numbers(overrides: list[str], tracker: str) -> None:
    result = run(overrides, f"train.report_to=[{tracker}]", "evaluate.enabled=false", "train.logging_steps=1")
    assert list(result.folder.rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(overrides: list[str]) -> None:
    try:
        import trackio  # noqa: F401

        pytest.skip("trackio is installed")
    except ImportError:
        pass
    with pytest.raises(ConfigError, match=r"train\.report_to"):
        run(overrides, "train.report_to=[trackio]", "evaluate.enabled=false")


def test_eight_bit_adam_without_bitsandbytes_is_named(overrides: list[str]) -> None:
    try:
        import bitsandbytes  # noqa: F401

        pytest.skip("bitsandbytes is installed")
    except ImportError:
        pass
    with pytest.raises(ConfigError, match=r"train\.optimizer: adamw_8bit needs bitsandbytes"):
        run(overrides, "train.optimizer=adamw_8bit")


def test_schedules() -> None:
    s = TrainSettings(lr_scheduler="cosine", warmup_steps=10, max_steps=110)
    assert learning_rate_factor(s, 0) == pytest.approx(0.1)
    assert learning_rate_factor(s, 10) == pytest.approx(1.0)
    assert learning_rate_factor(s, 60) == pytest.approx(0.5)
    assert learning_rate_factor(s, 110) == pytest.approx(0.0)
    linear = TrainSettings(lr_scheduler="linear", max_steps=100)
    assert learning_rate_factor(linear, 25) == pytest.approx(0.75)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(overrides: list[str]) -> None:
    run(overrides, "evaluate.enabled=false")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(overrides, "evaluate.enabled=false")
    run(overrides, "evaluate.enabled=false", "resume_from=auto", "train.max_steps=3")


def test_going_back_to_an_older_checkpoint_takes_another_folder(overrides: list[str], tmp_path: Path) -> None:
    folder = run(overrides, "evaluate.enabled=false", "train.save_steps=1").folder
    first = f"resume_from={folder}/checkpoint-1"
    with pytest.raises(ConfigError, match=r"holds checkpoint-2, not .*checkpoint-1, as its last.*another output_dir"):
        run(overrides, "evaluate.enabled=false", first)
    again = run(overrides, "evaluate.enabled=false", first, f"output_dir={tmp_path / 'again'}")
    a, b = weights(folder), weights(again.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resuming_from_nothing_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        run(overrides, "resume_from=latest")


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "extra.pt", "rng-0.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(overrides: list[str], file: str) -> None:
    result = run(overrides, "evaluate.enabled=false", "train.save_steps=1")
    damaged = result.folder / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"checkpoint-2: .*delete this checkpoint"):
        run(overrides, "evaluate.enabled=false", "resume_from=latest", "train.max_steps=3")
    shutil.rmtree(result.folder / "checkpoint-2")
    again = run(overrides, "evaluate.enabled=false", "resume_from=latest", "train.max_steps=3")
    assert again.metrics["steps"] == 3


def test_another_adapter_cannot_resume(overrides: list[str]) -> None:
    run(overrides, "evaluate.enabled=false")
    with pytest.raises(ModelError, match="cannot resume"):
        run(overrides, "evaluate.enabled=false", "model.lora.rank=2", "resume_from=latest", "train.max_steps=3")


def test_old_checkpoints_are_rotated(overrides: list[str]) -> None:
    result = run(overrides, "evaluate.enabled=false", "train.save_steps=1", "train.max_steps=5", "train.save_total_limit=2")
    assert sorted(p.name for p in result.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_corrupt_image_stops_before_anything_is_trained(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\n" + "a red circle on a grey background,bad.png,bad.png\n" * 4)
    with pytest.raises(DataError, match=r"row 1, chosen: cannot read the image"):
        run(overrides, f"data.path={tmp_path / 'p.csv'}", "data.holdout=0")


@pytest.mark.parametrize(
    ("wrong", "error", "part"),
    [
        ("data.path={0}/gone.csv", DataError, "gone.csv, row 1, chosen: cannot read .*none.png: no such file"),
        ("data.path={0}/loserless.csv", DataError, "loserless.csv, row 1: rejected is empty"),
        ("model.path={0}", ModelError, "not a model in the diffusers layout"),
        ("evaluate.prompts={0}/dogs.txt", ConfigError, "evaluate.scorers: shapes: not a caption .*'a dog'"),
        ("output_dir={0}/dogs.txt", ConfigError, "output_dir: nothing can be written to .*dogs.txt"),
    ],
)
def test_wrong_input_stops_before_anything_is_written(
    overrides: list[str], tmp_path: Path, wrong: str, error: type[Exception], part: str
) -> None:
    head = "prompt,chosen,rejected\na red circle on a grey background,none.png,"
    (tmp_path / "gone.csv").write_text(head + "none.png\n")
    (tmp_path / "loserless.csv").write_text(head + "\n")
    (tmp_path / "dogs.txt").write_text("a dog\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=part):
        run(overrides, "data.holdout=0", wrong.format(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_resume_leaves_the_run_as_it_was(overrides: list[str]) -> None:
    folder = run(overrides, "evaluate.enabled=false").folder
    before = (folder / "config.resolved.yaml").read_bytes()
    with pytest.raises(ModelError, match="cannot resume"):
        run(overrides, "evaluate.enabled=false", "model.lora.rank=2", "resume_from=latest", "train.max_steps=3")
    assert (folder / "config.resolved.yaml").read_bytes() == before


@pytest.mark.parametrize("writer", ["torch.save", "safetensors.torch.save_file"])
def test_a_failed_save_keeps_the_older_checkpoints(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writer: str
) -> None:
    from safetensors import SafetensorError

    result = run(overrides, "evaluate.enabled=false")

    def full(obj: object, f: object, *args: object, **kwargs: object) -> None:
        if writer == "torch.save":
            raise OSError(28, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # its own words

    monkeypatch.setattr(writer, full)
    with pytest.raises(DiffalignError, match=r"cannot write .*No space left"):
        run(overrides, "evaluate.enabled=false", "resume_from=latest", "train.max_steps=3")
    assert sorted(p.name for p in result.folder.iterdir() if "checkpoint" in p.name) == ["checkpoint-2"]


def test_configs_of_several_objectives_train(overrides: list[str]) -> None:
    config = validate(TrainConfig, with_overrides(BASE, [*overrides, "evaluate.enabled=false"]))
    both = Total((Sigmoid(beta=100), MaPO(weight=0.1)))
    assert train(config.model_copy(update={"objective": both.parts})).metrics["steps"] == 2


def test_state_counts_every_pass(tiny: Path, pairs_csv: Path, tmp_path: Path) -> None:
    """The cost of a pair, counted at the network."""
    model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    source = feed(model, pairs_csv, tmp_path)
    state = TrainState(model, make_accelerator(), TrainSettings())
    calls: list[tuple[int, bool]] = []
    model.named_weights.net.register_forward_pre_hook(lambda m, args: calls.append((len(args[0]), torch.is_grad_enabled())))
    for needs in (BOTH, frozenset({"loser"}), frozenset()):
        calls.clear()
        (batch,) = source.batches(0)
        terms = source.terms(state.model, batch, needs)
        assert terms.cost == sum(n * (3 if grad else 1) for n, grad in calls)


def test_the_shipped_config_names_only_keys_that_exist() -> None:
    for name, path in shipped_configs().items():
        if kind_of(name) == "train":
            validate(TrainConfig, load_yaml(path), str(path))
