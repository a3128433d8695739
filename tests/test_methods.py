"""What methods are made of beside the loss: couplings, times, references, safeguards, kinds of data, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture

from diffalign.building import build_model
from diffalign.catalogue import shipped_configs
from diffalign.data.examples import Example, labels_of, of_pair, read_groups, read_labels, spread
from diffalign.data.pairs import Pair, Picture, flipped, read_pairs, shuffled_labels
from diffalign.errors import ConfigError, DataError
from diffalign.models import LoRA, ModelSpec
from diffalign.models.paths import NoisePrediction
from diffalign.objectives import OBJECTIVES, GroupTerms, PairTerms, Total
from diffalign.objectives.safeguards import protected
from diffalign.path import Coeffs, add_noise, split, target
from diffalign.recipes import TrainConfig, train
from diffalign.spec import load, validate, with_overrides
from diffalign.timesteps import LogitNormal, Skewed, Steps, Uniform
from diffalign.train.coupling import Coupling, first_noise, invert
from diffalign.train.feeds import Curriculum, Offline
from diffalign.train.references import EMA, Past, Periodic
from diffalign.train.tracking import read_metrics

BOTH = frozenset({"loser", "reference"})
ALL = BOTH | {"distance", "overlap", "scores", "p_win"}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))


@pytest.fixture
def feed(model: Any, pairs_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Offline]:
    cache = tmp_path_factory.getbasetemp() / "methods-cache"  # one for all, so that pictures are encoded once

    def make(examples: list[Example] | None = None, **more: Any) -> Offline:
        found = examples or [of_pair(p) for p in read_pairs(pairs_csv, 8)]
        timesteps = more.pop("timesteps", Uniform())
        return Offline(model, found, timesteps, cache, **{"size": (32, 32), "batch_size": 4, "seed": 3} | more)

    return make


@pytest.fixture(scope="module")
def scored_csv(pairs_csv: Path) -> Path:
    """The same pairs with scores and a caption of the loser's own."""
    lines = pairs_csv.read_text().splitlines()
    head = lines[0] + ",chosen_score,rejected_score,rejected_prompt"
    rows = [f"{line},{1 + i / 10},0.5,a grey background" for i, line in enumerate(lines[1:])]
    path = pairs_csv.parent / "scored.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def groups_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 groups of five pictures."""
    folder = tmp_path_factory.mktemp("groups")
    lines = []
    for i in range(10):
        for k in range(5):
            picture(100 + 5 * i + k).save(folder / f"{i}-{k}.png")
        scores = [0.1, 0.9, 0.5, 0.3, 0.7]
        images = [f"{i}-{k}.png" for k in range(5)]
        lines.append(json.dumps({"prompt": f"picture {i}", "images": images, "scores": scores}))
    (folder / "groups.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "groups.jsonl"


# --- data ------------------------------------------------------------------------------------------------------------


def test_columns_of_pairs(scored_csv: Path) -> None:
    first = read_pairs(scored_csv, 1)[0]
    assert first.scores == (1.0, 0.5)
    assert first.rejected_prompt == "a grey background"
    turned = flipped(first)
    assert (turned.chosen, turned.rejected) == (first.rejected, first.chosen)
    assert (turned.prompt, turned.rejected_prompt) == ("a grey background", first.prompt)
    assert flipped(turned) == first


def test_label_noise_flips_the_share_that_was_asked_for(pairs_csv: Path) -> None:
    one = Picture(b"", "x")
    pairs = [Pair(str(i), Picture(str(i).encode(), "w"), one) for i in range(2000)]
    noisy = shuffled_labels(pairs, 0, 0.2)
    share = sum(a.chosen != b.chosen for a, b in zip(pairs, noisy, strict=True)) / 2000
    assert share == pytest.approx(0.2, abs=3 * (0.16 / 2000) ** 0.5)


def test_an_image_that_won_once_is_good() -> None:
    a, b, c = (Picture(x, "") for x in (b"a", b"b", b"c"))
    found = {x.pictures[0].source: x.good for x in labels_of([Pair("p", a, b), Pair("p", b, c)])}
    assert found == {b"a": True, b"b": True, b"c": False}


def test_labels_and_groups_are_read(tmp_path: Path, groups_jsonl: Path, pairs_csv: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("prompt,image,label\nred,0.png,1\nblue,0.png,0\n")
    assert [(x.prompt, x.good) for x in read_labels(str(tmp_path / "labels.csv"))] == [("red", True), ("blue", False)]
    (tmp_path / "odd.csv").write_text("prompt,image,label\nred,0.png,3\n")
    with pytest.raises(DataError, match=r"row 1: label must be 1 \(good\) or 0 \(bad\), got 3 .*write 1 or 0"):
        read_labels(str(tmp_path / "odd.csv"))
    (group, *rest) = read_groups(str(groups_jsonl), 3)
    assert group.scores == (0.9, 0.5, 0.1)
    assert len(rest) == 9
    with pytest.raises(DataError, match="no group has 6 images"):
        read_groups(str(groups_jsonl), 6)
    with pytest.raises(DataError, match="holds no groups, which this objective ranks"):
        read_groups(str(pairs_csv), 2)
    for row, said in (
        ('{"prompt": "p", "images": ["0.png"], "scores": [1, 2]}', "1 images need as many scores, .*one number per image"),
        ('{"prompt": "p", "images": ["0.png"], "scores": null}', "no scores; found .*fill the column scores"),
    ):
        (tmp_path / "groups.jsonl").write_text(row + "\n")
        with pytest.raises(DataError, match=f"row 1: {said}"):
            read_groups(str(tmp_path / "groups.jsonl"), 1)


def test_a_dataset_folder_brings_margins_weights_captions_and_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffalign.data.images import encode_png

    images = [
        {"image_id": str(k), "image": {"bytes": encode_png(picture(k)), "path": None}, "seed": 5, "prompt_id": "q", "k": k}
        for k in range(3)
    ]
    pair = {"pair_id": "0", "prompt": "red", "chosen_id": "0", "rejected_id": "1", "p_win": 0.8}
    more = {"margins": '{"reward": 0.25}', "weight": 2.0, "rejected_prompt": "blue"}
    group = {"group_id": "0", "prompt": "red", "image_ids": ["0", "1", "2"], "rewards": [0.0, 1.0, 0.5]}
    for table, rows in (("images", images), ("pairs", [pair | more]), ("groups", [group])):
        (tmp_path / table).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / table / "00000.parquet")
    found = of_pair(read_pairs(tmp_path)[0])
    assert (found.scores, found.weight, found.prompts, found.p_win) == ((0.25, 0.0), 2.0, ("red", "blue"), 0.8)
    assert found.pictures[0].made == (5, "q", 0)
    assert read_groups(str(tmp_path), 2)[0].scores == (1.0, 0.0)
    pq.write_table(pa.Table.from_pylist([group | {"image_ids": ["0", "1", "9"]}]), tmp_path / "groups" / "00000.parquet")
    with pytest.raises(DataError, match=r"group 0: '9' is not in images/ .*make the groups again"):
        read_groups(str(tmp_path), 2)


def test_larger_groups_are_thinned_evenly() -> None:
    group = Example((Picture(b"", ""),) * 5, ("p",) * 5, (1.0, 5.0, 3.0, 2.0, 4.0))
    assert spread(group, 3).scores == (5.0, 3.0, 1.0)
    assert spread(group, 5).scores == (5.0, 4.0, 3.0, 2.0, 1.0)


# --- couplings -------------------------------------------------------------------------------------------------------


def test_shared_noise_is_one_and_independent_noise_two(feed: Any) -> None:
    (one,) = feed().batches(0)
    assert torch.equal(one.eps[:, 0], one.eps[:, 1])
    assert torch.equal(one.u[:, 0], one.u[:, 1])
    (two,) = feed(coupling=Coupling(noise="independent")).batches(0)
    assert not (two.u[:, 0] == two.u[:, 1]).any()
    assert abs(torch.corrcoef(two.eps.flatten(2).transpose(0, 1).flatten(1))[0, 1]) < 0.2


def test_draws_come_one_from_each_part_and_are_averaged_before_the_loss(feed: Any, model: Any) -> None:
    several, needs = feed(coupling=Coupling(draws=4)), ALL - {"scores", "p_win"}
    (batch,) = several.batches(0)
    assert batch.u.shape == (4, 2, 4)
    assert (batch.u * 4).long().eq(torch.arange(4)).all()
    together = several.terms(model, batch, needs)
    apart = [
        several.terms(model, replace(batch, eps=batch.eps[:, :, s : s + 1], u=batch.u[:, :, s : s + 1]), needs)
        for s in range(4)
    ]
    for name in ("winner", "loser", "ref_winner", "ref_loser", "distance", "overlap"):
        mean = torch.stack([getattr(x, name) for x in apart]).mean(0)
        torch.testing.assert_close(getattr(together, name), mean, rtol=1e-4, atol=1e-6)
    assert together.cost == sum(x.cost for x in apart) == 4 * 4 * 2 * 4


def test_each_picture_is_seen_with_its_own_caption(feed: Any, model: Any, scored_csv: Path) -> None:
    pairs = [of_pair(p) for p in read_pairs(scored_csv, 8)]
    seen: list[torch.Tensor] = []
    hook = model.net.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["encoder_hidden_states"]), with_kwargs=True)
    source = feed(pairs, coupling=Coupling(captions="own"))
    (batch,) = source.batches(0)
    source.terms(model, batch, BOTH)
    hook.remove()
    other = model.encode_prompts(["a grey background"]).embeds
    torch.testing.assert_close(seen[0][4:], other.expand(4, -1, -1))
    assert not torch.allclose(seen[0][:4], other.expand(4, -1, -1))


def test_stored_noise_is_what_the_image_was_sampled_from(model: Any) -> None:
    from diffalign.data.prompts import Prompt
    from diffalign.sampling import Item, generators

    prompt = Prompt("a red circle")
    (g,) = generators([Item(prompt, 3)], 11)
    wanted = torch.randn(model.latent_shape, generator=g)
    made = Picture(b"", "here", (11, prompt.id, 3))
    assert torch.equal(first_noise(made, model), wanted)


@pytest.mark.parametrize(
    ("last", "size", "said"),
    [
        ((32, None), (32, 32), "here: its first noise is not known .*stored needs images by diffalign"),
        (
            (32, (11, "p", 0)),
            (64, 64),
            "this model makes 32 x 32, and it would be trained at 64 x 64.*without data.resolution",
        ),
        ((64, (11, "p", 0)), (32, 32), "here: it is 64 x 64, this model makes 32 x 32.*the same kind of model"),
    ],
)
def test_all_pictures_have_their_noise_before_any_is_encoded(
    model: Any, tmp_path: Path, last: tuple[int, Any], size: tuple[int, int], said: str
) -> None:
    from diffalign.data.images import encode_png

    def example(i: int, side: int = 32, made: Any = (11, "p", 0)) -> Example:
        pictures = (
            Picture(encode_png(picture(i, 32)), "there", (11, "p", 1)),
            Picture(encode_png(picture(i, side)), "here", made),
        )
        return Example(pictures, ("p", "p"))

    coupling, found = Coupling(noise="stored"), [*map(example, range(3)), example(3, *last)]
    with pytest.raises(DataError, match=said):
        Offline(model, found, Uniform(), tmp_path / "cache", size=size, batch_size=2, coupling=coupling)
    assert not (tmp_path / "cache").exists()


class Gaussian:
    """The exact denoiser of data N(mean, 0.5^2) on the variance-preserving path: its sampler is known in closed form."""

    kind, std = "epsilon", 0.5
    mean = 0.7

    def timestep(self, u: torch.Tensor, size: Any = None) -> torch.Tensor:
        return u.double()

    def coeffs(self, t: torch.Tensor) -> Coeffs:
        return Coeffs(torch.cos(1.4 * t), torch.sin(1.4 * t))

    def predict(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        a, s = self.coeffs(t).over(x)
        return s * (x - a * self.mean) / (a**2 * self.std**2 + s**2)


@pytest.mark.parametrize("u", [0.3, 0.9])
def test_inversion_follows_the_probability_flow(u: float) -> None:
    """Along it (x - a mean) / sqrt(a^2 std^2 + s^2) stays as it is; the error falls with 1 / steps, and with refinements."""
    g = Gaussian()
    x0 = torch.linspace(-1, 2, 7, dtype=torch.double).view(7, 1, 1, 1)
    at = torch.full((7,), u, dtype=torch.double)
    c = g.coeffs(at)
    wanted = c.alpha[0] * g.mean + (c.alpha[0] ** 2 * 0.25 + c.sigma[0] ** 2).sqrt() * (x0 - g.mean) / 0.5

    def error(steps: int, renoise: int) -> float:
        eps = invert(g, x0, at, None, steps, renoise)  # type: ignore[arg-type]
        return (add_noise(x0, eps, c) - wanted).abs().max().item()

    assert error(200, 0) == pytest.approx(error(100, 0) / 2, rel=0.1)
    assert error(400, 0) == pytest.approx(error(100, 0) / 4, rel=0.1)
    assert error(10, 1) < error(10, 0) / 2


def test_inverted_noise_differs_between_the_members_and_is_paid_for(feed: Any, model: Any) -> None:
    source = feed(coupling=Coupling(noise="inverted", inversion_steps=2, renoise=1))
    (batch,) = source.batches(0)
    terms = source.terms(model, batch, BOTH)
    assert terms.winner.isfinite().all()
    assert torch.equal(terms.winner, terms.ref_winner)
    assert terms.cost == 4 * 2 * (4 + 2 * 2)


def test_distance_and_overlap_are_those_of_the_predictions(feed: Any, model: Any) -> None:
    source = feed()
    (batch,) = source.batches(0)
    start = source.terms(model, batch, ALL - {"scores", "p_win"})
    assert start.distance.tolist() == [0] * 4
    weights = model.named_weights.trainable()
    saved = {n: p.detach().clone() for n, p in weights.items()}
    with torch.no_grad():
        for p in weights.values():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved = source.terms(model, batch, ALL - {"scores", "p_win"})
    assert (moved.distance > 0).all()
    moved.distance.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())
    root = moved.distance.sqrt()  # the triangle inequality, and Cauchy and Schwarz
    assert ((moved.winner.sqrt() - moved.ref_winner.sqrt()).abs() <= root + 1e-6).all()
    assert (moved.overlap.abs() <= (moved.winner * moved.loser).sqrt() + 1e-6).all()
    with torch.no_grad():
        for n, p in weights.items():
            p.copy_(saved[n])
            p.grad = None


# --- times -----------------------------------------------------------------------------------------------------------


def test_times_follow_their_laws() -> None:
    g = torch.Generator().manual_seed(0)
    one = lambda policy: torch.cat([policy.draw(1, g) for _ in range(4000)])  # noqa: E731
    skewed = one(Skewed(gamma_rank=0.5, bins=4))
    mass = torch.bincount((skewed * 4).long(), minlength=4) / 4000
    np.testing.assert_allclose(mass, np.array([1, 2, 4, 8]) / 15, atol=0.03)
    steps = one(Steps(times=(0.25, 0.75)))
    assert set(steps.tolist()) == {0.25, 0.75}
    assert (steps == 0.25).float().mean() == pytest.approx(0.5, abs=0.03)
    t = one(LogitNormal(shift=3.0))
    back = t / (3 - 2 * t)  # undo the shift
    assert torch.logit(back).mean().item() == pytest.approx(0, abs=0.06)
    assert torch.logit(back).std().item() == pytest.approx(1, abs=0.04)


def test_stratified_draws_have_the_same_law() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.cat([LogitNormal(mean=0.5).draw(4, g) for _ in range(2000)])
    assert torch.logit(t).mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.logit(t).std().item() == pytest.approx(1.0, abs=0.03)


def test_weights_of_times() -> None:
    s = torch.tensor([0.1, 0.5, 0.9])
    flow, vp = Coeffs(1 - s, s), Coeffs((1 - s**2).sqrt(), s)
    torch.testing.assert_close(Uniform(weighting="epsilon").weight(flow, "flow"), (1 - s) ** 2)
    torch.testing.assert_close(Uniform(weighting="epsilon").weight(vp, "v_prediction"), 1 - s**2)
    torch.testing.assert_close(Uniform(weighting="epsilon").weight(vp, "epsilon"), torch.ones(3))
    low = Uniform(weighting="low_snr").weight(vp, "epsilon", Coeffs(vp.alpha[2:], vp.sigma[2:]))
    assert low[2].item() == pytest.approx(2)
    assert (low.diff() > 0).all()
    torch.testing.assert_close(Uniform(weighting="sigmoid", bias=1.0).weight(vp), torch.sigmoid(1 - vp.snr.log()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_min_snr_is_the_error_of_x0_by_at_most_gamma(kind: Any) -> None:
    """Hang et al. 2023: min(SNR, gamma) |x0 - x0_hat|^2, which is min / SNR on noise and min / (SNR + 1) on v."""
    s = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.98], dtype=torch.double)
    c = Coeffs(1 - s, s) if kind == "flow" else Coeffs((1 - s**2).sqrt(), s)
    got = Uniform(weighting="min_snr", gamma=3.0).weight(c, kind)
    least = torch.minimum(c.snr, torch.tensor(3.0, dtype=torch.double))
    published = {"epsilon": least / c.snr, "v_prediction": least / (c.snr + 1), "sample": least}
    torch.testing.assert_close(got, published.get(kind, least * s**2))
    g = torch.Generator().manual_seed(0)
    x0, eps, off = torch.randn(3, 5, 2, 4, 4, generator=g, dtype=torch.double)
    x, wanted = add_noise(x0, eps, c), target(kind, x0, eps, c)
    x0_hat, _ = split(kind, wanted + off, x, c)
    by_hand = least * (x0_hat - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(got * off.square().flatten(1).mean(1), by_hand)


@pytest.mark.parametrize("end", [0.0, 2.0**-12, 5.96e-8], ids=["zero", "diffusers", "flow"])
def test_low_snr_has_no_meaning_where_a_schedule_ends_in_noise_alone(end: float) -> None:
    c = Coeffs(torch.tensor([0.5]), torch.tensor([0.5]))
    noisiest = Coeffs(torch.tensor([end]), torch.ones(1))
    with pytest.raises(ConfigError, match=r"timesteps\.weighting: low_snr .* ends in noise alone") as e:
        Uniform(weighting="low_snr").weight(c, "flow", noisiest)
    assert e.value.hint == "take none, epsilon, min_snr or sigmoid"


def test_low_snr_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    flow: Any = SimpleNamespace(kind="flow", timestep=lambda u: u, coeffs=lambda t: Coeffs(1 - t, t))
    with pytest.raises(ConfigError, match="ends in noise alone"):
        Offline(flow, [], Uniform(weighting="low_snr"), tmp_path, size=(32, 32), batch_size=1)


@pytest.mark.parametrize("name", ["pso", "reconstructed/lcm-dpo"])
def test_times_of_distilled_models_are_the_steps_that_are_written(name: str) -> None:
    """Thousandths of a schedule of 1000 steps, which neither fp32 nor truncation makes the step before."""
    policy = load(TrainConfig, shipped_configs()[f"presets/{name}"]).timesteps
    assert isinstance(policy, Steps)
    u = policy.draw(len(policy.times), torch.Generator().manual_seed(0))
    schedule: Any = SimpleNamespace(_alpha=torch.zeros(1000), device=torch.device("cpu"))
    steps = NoisePrediction.timestep(schedule, u).tolist()
    assert steps == [round(1000 * t) for t in policy.times]
    assert steps[-1] == 999


# --- references ------------------------------------------------------------------------------------------------------


class FakeWeights:
    """One weight that the policy moves by one in each step."""

    def __init__(self) -> None:
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.snapshots: dict[str, dict[str, torch.Tensor]] = {}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {"p": self.p}

    def take(self, name: str) -> None:
        self.snapshots[name] = {"p": self.p.detach().clone()}


def run_reference(policy: Any, steps: int, drift: Callable[[Any], float] = lambda w: 0.0) -> tuple[FakeWeights, list[float]]:
    w: Any = FakeWeights()
    policy.begin(w)
    seen = []
    for step in range(1, steps + 1):
        seen.append(w.snapshots[policy.name(w, step, 0)]["p"].item())
        with torch.no_grad():
            w.p += 1
        policy.update(w, step, lambda: drift(w))
    return w, seen


def test_a_reference_averages_follows_and_freezes() -> None:
    assert run_reference(EMA(decay=0.5), 4)[1] == [0.0, 0.5, 1.25, 2.125]
    assert run_reference(Periodic(every=2), 6)[1] == [0, 0, 2, 2, 4, 4]
    assert run_reference(Periodic(every=2, mix=0.5), 6)[1] == [0, 0, 1, 1, 2.5, 2.5]
    guarded = run_reference(Periodic(every=2, max_drift=3.0), 8, lambda w: w.snapshots["moving"]["p"].item())[1]
    assert guarded == [0, 0, 2, 2, 4, 4, 4, 4]  # 4 is above 3: it stays there


def test_a_past_reference_is_one_of_those_kept_and_a_function_of_the_step() -> None:
    policy = Past(every=1, keep=3)
    w, seen = run_reference(policy, 30)
    assert sorted(w.snapshots) == ["past-28", "past-29", "past-30"]
    assert all(step - 3 <= value <= step - 1 for step, value in enumerate(seen, 1) if step > 3)
    names = {policy.name(w, step, 0) for step in range(50)}  # type: ignore[arg-type]
    assert names == set(w.snapshots)
    assert [policy.name(w, s, 1) for s in range(9)] == [policy.name(w, s, 1) for s in range(9)]  # type: ignore[arg-type]


# --- runs ------------------------------------------------------------------------------------------------------------


def small(overrides: list[str], objective: Any, *more: str) -> TrainConfig:
    base = {"objective": objective, "model": {"path": "set below", "lora": {"rank": 4}}}
    return validate(TrainConfig, with_overrides(base, [*overrides, "evaluate.enabled=false", "data.limit=12", *more]))


@pytest.mark.parametrize(
    "reference",
    ["{type: ema, decay: 0.5}", "{type: periodic, every: 1, max_drift: 1e-9}", "{type: past, every: 1, keep: 2}"],
    ids=["ema", "periodic", "past"],
)
def test_a_moving_reference_survives_a_resume_bit_for_bit(overrides: list[str], tmp_path: Path, reference: str) -> None:
    from safetensors.torch import load_file

    more = [f"reference={reference}", "train.learning_rate=1e-3", "train.logging_steps=1", "train.eval_steps=0"]
    both = (tmp_path / "straight", tmp_path / "halves")
    objective = [{"type": "sigmoid", "beta": 500}, {"type": "bco_pair", "beta": 500, "weight": 0.5}]
    train(small(overrides, objective, *more, "train.max_steps=4", f"output_dir={both[0]}"))
    train(small(overrides, objective, *more, "train.max_steps=2", f"output_dir={both[1]}"))
    train(small(overrides, objective, *more, "train.max_steps=4", f"output_dir={both[1]}", "resume_from=latest"))
    ends = [f / "checkpoint-4" for f in both]
    names = {f.name for f in ends[0].glob("*.safetensors")}
    assert names == {f.name for f in ends[1].glob("*.safetensors")}
    assert len(names) > 1
    for name in names:
        a, b = (load_file(f / name) for f in ends)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", ["kto", "pmpo", "infonca", "rank_dpo"])
def test_labels_and_groups_train(overrides: list[str], groups_jsonl: Path, objective: str) -> None:
    groups = OBJECTIVES.options[objective].data == "groups"  # type: ignore[attr-defined]
    more = [f"data.path={groups_jsonl}", "data.group_size=3"] if groups else ["data.positive_share=0.8"]
    run = train(small(overrides, {"type": objective}, *more, "train.logging_steps=1", "data.holdout=0.3"))
    logged = set().union(*read_metrics(run.folder))
    assert {"loss", "accuracy", "drift/winner", "drift/loser", "heldout/loss", "heldout/accuracy"} <= logged
    assert run.metrics["denoiser_passes"] == 2 * 4 * (3 if groups else 1) * 4


def test_pairs_come_in_the_clearest_first(feed: Any, scored_csv: Path) -> None:
    examples = [of_pair(p) for p in read_pairs(scored_csv, 8)]  # the gap rises with the row
    source = feed(examples, curriculum=Curriculum(chunks=2, every=3), batch_size=2)
    seen: list[list[tuple[int, int]]] = []
    source.batch = seen.append
    for step in range(7):
        list(source.batches(step))
    early = [i for rows in seen[:3] for _, i in rows]
    assert set(early) == {4, 5, 6, 7}
    assert {i for rows in seen[3:] for _, i in rows} == set(range(8))
    again: list[Any] = []
    source.batch = again.append
    list(source.batches(5))
    assert again == [seen[5]]


def test_training_stops_when_winners_stay_worse(overrides: list[str]) -> None:
    """Trained on the opposite of the held-out winners, a model with all weights gets worse on them at once."""
    more = ["model.lora=null", "train.learning_rate=1e-2", "train.max_steps=30", "train.eval_steps=1", "data.holdout=0.4"]
    run = train(small(overrides, {"type": "npo", "beta": 500}, *more, "train.winner_drift_patience=2", "data.limit=40"))
    assert run.metrics["steps"] < 30
    last = [x["heldout/drift/winner"] for x in read_metrics(run.folder) if "heldout/drift/winner" in x][-2:]
    assert all(x > 0 for x in last)


# --- safeguards ------------------------------------------------------------------------------------------------------


def test_the_protected_winner_does_not_rise_at_first_order() -> None:
    """A step along the gradient of -log sigmoid of the margin, in the space of predictions: |rho_w|^2 must not grow."""
    g = torch.Generator().manual_seed(0)
    rose = []
    for trial in range(50):
        rho_w = torch.randn(12, generator=g, dtype=torch.double)
        rho_l = (0.9 * rho_w + 0.3 * torch.randn(12, generator=g, dtype=torch.double)) * (3 if trial % 2 else 0.5)
        for mu in (None, 0.0, 0.5):
            shift = torch.zeros(12, dtype=torch.double, requires_grad=True)  # a change that both predictions share
            win, lose = (rho_w + shift).square().mean()[None], (rho_l + shift).square().mean()[None]
            overlap = (rho_w * rho_l).mean()[None]
            terms = PairTerms(win, lose, win.detach(), lose.detach(), overlap=overlap)
            if mu is not None:
                safe = protected(terms, mu)
                assert torch.equal(safe.loser, terms.loser)  # the value stays
                terms = safe
            (slope,) = torch.autograd.grad(OBJECTIVES.options["sigmoid"](beta=10)(terms, {}).loss.sum(), shift)  # type: ignore[call-arg]
            change = -(slope * 2 * rho_w / 12).sum().item()  # of the winner's error, along minus the gradient
            if mu is None:
                rose.append(change > 0)
            else:
                assert change <= 1e-12
    assert any(rose)


def test_protection_is_part_of_the_sum() -> None:
    total = Total((OBJECTIVES.options["sigmoid"](beta=500),), protect=0.9)  # type: ignore[arg-type, call-arg]
    assert "overlap" in total.needs


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        ({"type": "mapo"}, ["reference={type: ema}"], "reference is set, but mapo does without one: drop it"),
        ({"type": "kto"}, ["coupling.noise=shared"], "coupling.noise is shared, but kto sees single images"),
        ({"type": "kto"}, ["data.shuffle_labels=true"], "data.shuffle_labels is about pairs, but kto is about labels"),
        ({"type": "infonca"}, ["data.flip_labels=0.2"], "data.flip_labels is about pairs, but infonca is about groups"),
        ({"type": "sigmoid"}, ["data.positive_share=0.5"], "data.positive_share is about labels"),
        ({"type": "sigmoid"}, ["train.protect_winner=0.5", "coupling.noise=inverted"], "residuals at the same noise"),
        ({"type": "sigmoid"}, ["data.curriculum={}", "data.buckets=true"], "drop one"),
        ([{"type": "sigmoid"}, {"type": "kto"}], [], "objectives of different data cannot be summed"),
        ({"type": "infonca"}, ["coupling.captions=own"], "coupling.captions: own is about pairs"),
        ({"type": "sigmoid"}, ["coupling.renoise=1"], "coupling: renoise is read with noise: inverted alone: .*drop renoise"),
        (
            {"type": "sigmoid"},
            ["coupling={noise: replay, inversion_steps: 5}"],
            "inversion_steps is read with noise: inverted",
        ),
        (
            {"type": "sigmoid"},
            ["coupling={noise: inverted, replay_steps: 5}"],
            "replay_steps is read with noise: replay alone",
        ),
        ({"type": "sigmoid"}, ["coupling.replay_every=2"], "replay_every is read with noise: replay alone"),
        ({"type": "ppo"}, [], "ppo learns from the model.s own samples"),
        ({"type": "prdp"}, [], "prdp learns from the model.s own samples"),
        ({"type": "sigmoid"}, ["data.p_win_scale=2"], r"data\.p_win_scale makes p_win, which sigmoid does not read"),
        ({"type": "sigmoid"}, ["data.standardize_scores=true"], r"data\.standardize_scores is about scores, which sigmoid"),
        ({"type": "soft"}, ["data.standardize_scores=true"], r"nothing reads: set data\.p_win_scale"),
        (
            {"type": "sigmoid"},
            ["timesteps.type=uniform", "timesteps.gamma=3"],
            "gamma is read with weighting: min_snr alone",
        ),
        (
            {"type": "sigmoid"},
            ["timesteps={type: uniform, weighting: min_snr, bias: 1}"],
            "bias is read with weighting: sigmoid alone",
        ),
        ({"type": "aot"}, ["train.per_device_train_batch_size=1"], "of one pair it is sigmoid"),
        (
            {"type": "sigmoid"},
            ["train.winner_drift_patience=2", "train.eval_steps=0"],
            r"winner_drift_patience needs train\.eval",
        ),
        ({"type": "sigmoid"}, ["train.winner_drift_patience=2", "data.holdout=0"], "data.holdout above 0"),
        ({"type": "sft"}, ["train.protect_winner=0.5"], r"train\.protect_winner is about winners and losers, but sft reads"),
        ({"type": "kl"}, ["train.gradient_angle_steps=1"], r"train\.gradient_angle_steps is about winners and losers, but kl"),
    ],
)
def test_contradictions_are_refused_at_load(overrides: list[str], objective: Any, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(overrides, objective, *more)


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        ({"type": "soft"}, [], "soft reads p_win, but every pair is as good as certain.* set data.p_win_scale"),
        ({"type": "rdp"}, [], "some examples have no scores .*chosen_score and rejected_score"),
        ({"type": "sigmoid"}, ["data.curriculum={}"], "some examples have no scores"),
        ({"type": "sigmoid"}, ["coupling.captions=own"], "no loser has a caption of its own .*rejected_prompt"),
        ({"type": "infonca"}, [], "holds no groups, which this objective ranks .*or a loss on pairs"),
        ({"type": "sigmoid"}, ["coupling.noise=stored"], "its first noise is not known"),
    ],
)
def test_data_that_lacks_what_is_asked_is_refused(overrides: list[str], objective: Any, more: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        train(small(overrides, objective, *more))


def test_groups_share_their_noise_and_start_at_the_reference(feed: Any, model: Any, groups_jsonl: Path) -> None:
    groups = feed(read_groups(str(groups_jsonl), 3), data="groups")
    (batch,) = groups.batches(0)
    terms = groups.terms(model, batch, frozenset({"reference", "scores"}))
    assert isinstance(terms, GroupTerms)
    assert torch.equal(terms.error, terms.ref)
    assert terms.scores.tolist() == [pytest.approx([0.9, 0.5, 0.1])] * 4


# --- guided away -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters(load: Any, stock: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A stock pipeline with the adapters ``good`` and ``bad``, loaded as docs/exports.md says."""
    from peft import PeftModel
    from side_by_side import disturb

    def get(name: str) -> Any:
        trained, pipe, wrapped = load(name), stock(name), None
        for seed, adapter in enumerate(("good", "bad")):
            disturb(trained, seed)
            trained.export(folder := tmp_path / adapter)
            if not name.startswith("pixart"):
                pipe.load_lora_weights(folder, adapter_name=adapter)
            elif wrapped is None:
                wrapped = PeftModel.from_pretrained(pipe.transformer, folder, adapter_name=adapter)
            else:
                wrapped.load_adapter(folder, adapter)
        return pipe

    return get


def switch(net: Any, weights: dict[str, float]) -> None:
    """These adapters alone, with these weights."""
    from peft.tuners.lora import LoraLayer

    for layer in (m for m in net.modules() if isinstance(m, LoraLayer)):
        layer.set_adapter(list(weights))
        for adapter, weight in weights.items():
            layer.set_scale(adapter, weight)


def latents_of(pipe: Any, guidance: float = 3.0) -> Any:
    """Two steps for two prompts, the same noise each time."""
    more: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": 2, "output_type": "latent"}
    if type(pipe).__name__ == "StableDiffusion3Pipeline":
        more["max_sequence_length"] = 16
    if type(pipe).__name__.startswith("PixArt"):
        more |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(["a red circle", "a blue square"], generator=generator, **more).images


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart-sigma", "pixart-alpha"])
def test_an_adapter_is_on_for_the_unconditional_half_alone(name: str, two_adapters: Callable[[str], Any]) -> None:
    """Against whole batches under each half's adapters; a preferred one stays on, merged with the base if asked for."""
    from diffalign.models.guidance import guide_away

    pipe, calls = two_adapters(name), []
    net = getattr(pipe, "unet", None) or pipe.transformer
    plain = net.forward

    def spied(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return plain(*args, **kwargs)

    net.forward = spied
    latents_of(pipe)
    args, kwargs = calls[-1]
    said: dict[str, Any]
    for said, away, there in (
        ({}, {"good": 1.0, "bad": 1.0}, {}),
        ({"adapter": "bad"}, {"good": 0.8, "bad": 1.0}, {"good": 0.8}),
        ({"adapter": "bad", "merge_weight": 0.25}, {"good": 0.6, "bad": 1.0}, {"good": 0.8}),
    ):
        net.forward, halves = plain, []
        with torch.no_grad():
            for half, weights in enumerate((away, there)):
                switch(net, weights)
                halves.append(plain(*args, **kwargs)[0].chunk(2)[half])
            switch(net, {"good": 1.0, "bad": 1.0} | there)
            before = plain(*args, **kwargs)[0]
            guide_away(pipe, **said)
            wanted = torch.cat(halves)
            torch.testing.assert_close(net.forward(*args, **kwargs)[0], wanted)
            assert not torch.allclose(wanted, before, rtol=1e-2)
            assert torch.equal(plain(*args, **kwargs)[0], before)  # adapters and their weights are as they were
    assert latents_of(pipe).isfinite().all()
    with pytest.raises(ValueError, match="needs guidance"):
        latents_of(pipe, 1.0)


def test_what_cannot_be_guided_away_is_refused(two_adapters: Callable[[str], Any], stock: Any) -> None:
    from diffalign.models.guidance import guide_away

    with pytest.raises(ValueError, match="FluxPipeline asks for the two halves of guidance one by one"):
        guide_away(stock("flux-dev"))
    with pytest.raises(ValueError, match="no adapter ugly is active, only: bad"):
        guide_away(two_adapters("sd"), "ugly")


def test_our_own_sampling_is_guided_away_as_well(model: Any) -> None:
    from side_by_side import disturb

    from diffalign.models.guidance import guided_away

    weights = {n: p.detach().clone() for n, p in model.named_weights.trainable().items()}
    disturb(model)
    x, t = torch.randn(2, *model.latent_shape), model.timestep(torch.tensor([0.4, 0.8]))
    cond, none = model.encode_prompts(["a red circle", "a blue square"]), model.encode_prompts([None, None])
    with torch.no_grad():
        away = model.predict(x, t, none)
        with model.weights("reference"):
            there = model.predict(x, t, cond)
        plain = model.predict(x, t, cond, 2.0)
        with guided_away(model):
            torch.testing.assert_close(model.predict(x, t, cond, 2.0), away + 2 * (there - away))
            with pytest.raises(ValueError, match="needs guidance"):
                model.predict(x, t, cond)
        torch.testing.assert_close(model.predict(x, t, cond, 2.0), plain)
        for n, p in model.named_weights.trainable().items():
            p.copy_(weights[n])
