"""Direct reward fine-tuning: what the gradient is, where it enters, and that it does not depend on how the work is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from diffalign.backprop import Chain, ChainSettings, Last, Preview, Random, Renoised, Single, Strided, Through
from diffalign.building import build_model
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.models import Cond, LoRA, ModelSpec
from diffalign.path import Coeffs
from diffalign.recipes import TrainConfig, train
from diffalign.sampling import Item, Sampler, sample
from diffalign.scorers.base import Card
from diffalign.scoring import make_scorers
from diffalign.spec import dump, validate
from diffalign.train.direct import Direct, DirectFeed
from diffalign.train.rewards import GradientRewards, GradientRewardSpec
from diffalign.train.tracking import read_metrics

PROMPTS = [Prompt(f"picture {i}") for i in range(5)]
ITEMS = [Item(PROMPTS[0], 0), Item(PROMPTS[1], 0)]
BRIGHT = "test_direct:Brightness"
NONE: frozenset[Any] = frozenset()


class Brightness:
    """A reward that any picture has: the mean of its pixels."""

    name = "brightness"
    card: ClassVar[Card] = Card("brightness", "mean of the pixels", "0 to 1", "none", "none", differentiable=True)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.flatten(1).mean(1)


class Endless(Brightness):
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score_pixels(pixels, prompts) / torch.tensor([0.0 if "3" in p else 1.0 for p in prompts])


def direct(through: dict[str, Any] | None = None, steps: int = 3, **more: Any) -> Direct:
    reward = {"scorers": [BRIGHT]}
    base = {"reward": reward, "sampling": {"num_inference_steps": steps} | more.pop("sampling", {})}
    return validate(Direct, base | ({"through": through} if through else {}) | more)


THROUGH: dict[str, dict[str, Any]] = {
    "last": {"type": "last", "steps": 2},
    "random": {"type": "random", "low": 0, "high": 2},
    "strided": {"type": "strided", "every": 2},
    "renoised": {"type": "renoised", "draws": 2},
    "preview": {"type": "preview", "low": 1, "high": 2},
    "single": {"type": "single", "low": 0, "high": 2},
}


@pytest.fixture
def model(tiny: Path) -> Any:
    torch.manual_seed(0)
    made = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4)))
    for name, p in made.named_weights.trainable().items():  # so that both halves of the adapter have a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return made


def precise(model: Any) -> Any:
    """The same model in fp64, so that finite differences can be taken."""
    for part in (model.net, model.pipeline.vae):
        part.double()
    model.dtype = torch.float64
    model._call = lambda x, t, cond, **more: model._forward(x.double(), t, cond.to(torch.float64), **more)
    return model


def feed_of(model: Any, spec: Direct, **more: Any) -> DirectFeed:
    rewards = GradientRewards(spec.reward, make_scorers(spec.reward.scorers))
    return DirectFeed(model, PROMPTS, spec, rewards, **{"batch_size": 2, "seed": 1} | more)


def latents(model: Any, through: Through, steps: int = 2, seed: int = 0, **settings: Any) -> tuple[Tensor, Chain]:
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=steps, **settings), seed=0, step=0)
    return through(chain, torch.Generator().manual_seed(seed)), chain


def reward_of(model: Any, x0: Tensor) -> Tensor:
    """Smooth in the pixels, and not linear in them."""
    return model.decode(x0).square().mean()


def gradients(model: Any, reward: Tensor) -> dict[str, Tensor]:
    named = model.named_weights.trainable()
    return dict(zip(named, torch.autograd.grad(reward, list(named.values())), strict=True))


def agree(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **(tolerance or {"rtol": 1e-6, "atol": 1e-12}), msg=lambda m, n=name: f"{n}: {m}"
        )


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_whole_chain_has_the_gradient_of_finite_differences(model: Any, guidance: float) -> None:
    """Two steps, decoder and reward, in fp64: a difference of the reward in single weights of the adapter."""
    precise(model)
    value = lambda: reward_of(model, latents(model, Last(steps=2), guidance_scale=guidance)[0])  # noqa: E731
    found = gradients(model, value())
    name = max(found, key=lambda n: found[n].abs().max())
    p = model.named_weights.trainable()[name]
    for place in found[name].flatten().abs().topk(3).indices.tolist():
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[place] += sign * 1e-5
                sides.append(value().item())
                p.view(-1)[place] -= sign * 1e-5
        difference = (sides[0] - sides[1]) / 2e-5
        assert found[name].flatten()[place].item() == pytest.approx(difference, rel=1e-5)


def ode(model: Any, steps: int, n: int) -> tuple[float, float, Any]:
    """DDIM at eta 0 written by hand: x_next = a x + b eps; and the timestep."""
    t, c = model.grid(steps)
    alpha, sigma = c.alpha.double(), c.sigma.double()
    a = alpha[n + 1] / alpha[n]
    return a.item(), (sigma[n + 1] - a * sigma[n]).item(), t[n]


def by_hand(model: Any, steps: int) -> tuple[list[Tensor], Cond]:
    """States of the ODE before each step and at the end, without a gradient."""
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=steps), seed=0, step=0)
    xs = [chain.noise().double()]
    with torch.no_grad():
        for n in range(steps):
            a, b, t = ode(model, steps, n)
            xs.append(a * xs[-1] + b * model.predict(xs[-1], t.expand(2), chain.cond))
    return xs, chain.cond


def test_draft_1_is_the_last_step_alone(model: Any) -> None:
    precise(model)
    xs, cond = by_hand(model, 3)
    a, b, t = ode(model, 3, 2)
    wanted = gradients(model, reward_of(model, a * xs[2] + b * model.predict(xs[2], t.expand(2), cond)))
    agree(gradients(model, reward_of(model, latents(model, Last(steps=1), 3)[0])), wanted)


def test_strided_is_the_sum_over_its_steps(model: Any) -> None:
    """With constant inputs the chain is linear: x0 = sum over n of (product of the later a) b_n eps_n + what is constant."""
    precise(model)
    steps, every, first = 5, 2, 1
    seed = next(s for s in range(9) if int(torch.randint(every, (), generator=torch.Generator().manual_seed(s))) == first)
    xs, cond = by_hand(model, steps)
    end = xs[-1].clone().requires_grad_()
    (up,) = torch.autograd.grad(reward_of(model, end), end)
    named = model.named_weights.trainable()
    wanted = {n: torch.zeros_like(p) for n, p in named.items()}
    for n in range(first, steps, every):
        _, b, t = ode(model, steps, n)
        later = torch.tensor([ode(model, steps, m)[0] for m in range(n + 1, steps)], dtype=torch.double).prod()
        eps = model.predict(xs[n], t.expand(2), cond)
        parts = torch.autograd.grad(eps, list(named.values()), grad_outputs=later * b * up)
        wanted = {name: w + part for (name, w), part in zip(wanted.items(), parts, strict=True)}
    agree(gradients(model, reward_of(model, latents(model, Strided(every=every), steps, seed)[0])), wanted)


def test_random_truncation_spans_one_step_to_all(model: Any) -> None:
    precise(model)
    full = gradients(model, reward_of(model, latents(model, Last(steps=3), 3)[0]))
    one = gradients(model, reward_of(model, latents(model, Last(steps=1), 3)[0]))
    agree(gradients(model, reward_of(model, latents(model, Random(low=0, high=0), 3)[0])), full)
    agree(gradients(model, reward_of(model, latents(model, Random(low=2, high=2), 3)[0])), one)


def test_a_trained_step_before_a_constant_one_counts_through_the_latents(model: Any) -> None:
    """AlignProp draws a threshold at every step: the gradient passes a constant output as a multiple of x."""
    precise(model)
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=2), seed=0, step=0)
    found = gradients(model, reward_of(model, chain.run([True, False])))
    xs, cond = by_hand(model, 2)
    (a, b, t), (a2, b2, t2) = ode(model, 2, 0), ode(model, 2, 1)
    x1 = a * xs[0] + b * model.predict(xs[0], t.expand(2), cond)
    with torch.no_grad():
        constant = model.predict(xs[1], t2.expand(2), cond)
    agree(found, gradients(model, reward_of(model, a2 * x1 + b2 * constant)))


def test_without_trained_steps_there_is_no_gradient(model: Any) -> None:
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=3), seed=0, step=0)
    assert not chain.run().requires_grad
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=3), seed=0, step=0)
    before = chain.run([False, False, True], end=2)
    assert not before.requires_grad
    assert chain.step(before, 2, trained=True).requires_grad


def test_prompts_are_encoded_in_full_precision_as_they_are_sampled(model: Any) -> None:
    settings = ChainSettings(num_inference_steps=2, guidance_scale=2.0)
    plain = Chain.begin(model, ITEMS, settings, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Chain.begin(model, ITEMS, settings, 0, 0)
    assert plain.negative is not None
    assert mixed.negative is not None
    for a, b in ((plain.cond, mixed.cond), (plain.negative, mixed.negative)):
        assert torch.equal(a.embeds, b.embeds)


def test_a_preview_is_the_prediction_at_its_step(model: Any) -> None:
    precise(model)
    xs, cond = by_hand(model, 3)
    t, c = model.grid(3)
    eps = model.predict(xs[1], t[1].expand(2), cond)
    wanted = (xs[1] - c.sigma[1] * eps) / c.alpha[1]
    found, _ = latents(model, Preview(low=1, high=1), 3)
    torch.testing.assert_close(found, wanted)
    agree(gradients(model, reward_of(model, found)), gradients(model, reward_of(model, wanted)), rtol=1e-5, atol=1e-9)


def test_images_noised_anew_share_the_level_of_the_last_step(model: Any) -> None:
    """The first is DRaFT-1's image; the others start from it and new noise, and differ from one another."""
    precise(model)
    found, _ = latents(model, Renoised(draws=2), 3)
    first, second, third = found.chunk(3)
    assert torch.equal(first, latents(model, Last(steps=1), 3)[0])
    chain = Chain.begin(model, ITEMS, ChainSettings(num_inference_steps=3), seed=0, step=0)
    chain.noise()  # the start
    t, c = model.grid(3)
    x = c.alpha[2] * first.detach() + c.sigma[2] * chain.noise()
    wanted = (x - c.sigma[2] * model.predict(x, t[2].expand(2), chain.cond)) / c.alpha[2]
    torch.testing.assert_close(second, wanted)
    assert not torch.allclose(second, third)


class Perfect:
    """A network that knows the image."""

    kind: Any = "flow"
    latent_shape = (2, 4, 4)
    takes_negative = True
    path = "perfect"
    net = torch.nn.Linear(1, 1)

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.x0 = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.double)
        self.off = torch.zeros((), dtype=torch.double, requires_grad=True)

    def grid(self, steps: int) -> tuple[Tensor, Coeffs]:
        sigma = torch.linspace(0.98, 0, steps + 1, dtype=torch.double)
        alpha = 1 - sigma if self.kind == "flow" else (1 - sigma**2).sqrt()
        return 1000 * sigma[:-1], Coeffs(alpha, sigma)

    def encode_prompts(self, prompts: Sequence[str | None]) -> Cond:
        return Cond(torch.zeros(len(prompts), 1, 1))

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, negative: Cond | None = None) -> Tensor:
        sigma = (t / 1000).view(-1, 1, 1, 1)
        alpha = 1 - sigma if self.kind == "flow" else (1 - sigma**2).sqrt()
        eps = (x - alpha * self.x0) / sigma
        return (eps - self.x0 if self.kind == "flow" else eps) + self.off


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("n", [0, 3, 5])
def test_a_single_step_recovers_the_image_of_a_perfect_network(kind: str, n: int) -> None:
    """And what the network is off by arrives as the length of the step over alpha, in the closed form."""
    perfect: Any = Perfect(kind)
    found, chain = latents(perfect, Single(low=n, high=n), 6)
    torch.testing.assert_close(found, perfect.x0, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(found.mean(), perfect.off)
    (_, c) = perfect.grid(6)
    a, s, a2, s2 = c.alpha[n], c.sigma[n], c.alpha[n + 1], c.sigma[n + 1]
    wanted = (s2 - s) / a2 if kind == "flow" else (s2 - a2 * s / a) / a2
    torch.testing.assert_close(slope, wanted)
    assert chain.passes == 2 * (6 + 3)


@pytest.mark.parametrize("through", THROUGH)
def test_checkpointed_gradients_are_the_same(through: str, tiny: Path) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4), gradient_checkpointing=checkpointed))
        model.net.train()
        feed = feed_of(model, direct(THROUGH[through]))
        terms = feed.terms(model, next(feed.batches(0)), NONE)
        found.append(gradients(model, terms.reward.sum()))
    assert any(g.abs().max() > 0 for g in found[0].values())
    agree(found[0], found[1], rtol=1e-5, atol=1e-9)


def test_pictures_decoded_one_by_one_have_the_same_gradient(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for large in (32 * 32 * 2, 32 * 32):  # two pictures of 32 px together, or each alone
        monkeypatch.setattr("diffalign.models.pipeline.LARGE", large)
        found.append(gradients(model, reward_of(model, latents(model, Last())[0])))
        assert model.pipeline.vae.use_slicing == (large == 32 * 32)
    agree(found[0], found[1], rtol=1e-4, atol=1e-8)


def test_half_precision_keeps_the_gradient(model: Any) -> None:
    feed = feed_of(model, direct({"type": "last", "steps": 2}))
    whole = gradients(model, feed.terms(model, next(feed.batches(0)), NONE).reward.sum())
    with torch.autocast("cpu", torch.bfloat16):
        terms = feed.terms(model, next(feed.batches(0)), NONE)
    assert terms.reward.dtype == torch.float32
    half = gradients(model, terms.reward.sum())
    a, b = (torch.cat([g.flatten() for g in x.values()]) for x in (whole, half))
    assert torch.cosine_similarity(a, b, 0) > 0.98


def test_adapters_of_text_encoders_are_reached(tiny: Path) -> None:
    model: Any = build_model(ModelSpec(path=str(tiny), lora=LoRA(rank=4, text_encoders=True)))
    feed = feed_of(model, direct({"type": "last", "steps": 2}))
    found = gradients(model, feed.terms(model, next(feed.batches(0)), NONE).reward.sum())
    assert any(g.abs().max() > 0 for n, g in found.items() if n.startswith("text_encoder.") and "lora_B" in n)


# --- what is sampled -------------------------------------------------------------------------------------------------


def test_the_images_are_those_of_the_stock_scheduler(model: Any) -> None:
    """The chain of the ODE is diffusers' DDIM from the same noise."""
    from diffalign.data.images import to_uint8
    from diffalign.rollout import epoch_seed

    found, _ = latents(model, Last(), 4)
    wanted = sample(model, ITEMS, Sampler(num_inference_steps=4), epoch_seed(0, 0), scheduler="DDIMScheduler")
    off = (to_uint8(model.decode(found.detach())).cpu().int() - wanted.int()).abs()
    assert off.max() <= 1


COST = {"last": 1 + 2 * 3, "renoised": 2 + 3 * 3, "single": 3 + 3}
"""Of three steps: a forward for each that is not trained, three passes for each that is."""


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("through", COST)
def test_passes_are_counted(model: Any, through: str, guidance: float) -> None:
    feed = feed_of(model, direct(THROUGH[through], sampling={"guidance_scale": guidance}))
    terms = feed.terms(model, next(feed.batches(0)), NONE)
    assert terms.cost == 2 * COST[through] * (2 if guidance > 1 else 1)
    assert terms.images == 2
    assert feed.totals()["reward_calls"] == len(terms.reward) == (6 if through == "renoised" else 2)


def test_prompts_come_in_epochs_and_no_noise_is_used_twice(model: Any) -> None:
    feed = feed_of(model, direct(), accumulation=5)
    blocks = list(feed.batches(0))
    items = [item for block in blocks for item in block.items]
    assert sorted(i.prompt.text for i in items[:5]) == sorted(p.text for p in PROMPTS)
    assert len({(i.prompt.text, i.k) for i in items}) == 10
    starts = [Chain.begin(model, b.items, ChainSettings(), 1, step).noise() for step in (0, 1) for b in feed.batches(step)]
    assert len({x.sum().item() for block in starts for x in block}) == 20


@pytest.mark.parametrize("through", THROUGH)
def test_two_processes_make_the_blocks_of_one(model: Any, through: str) -> None:
    """Bit for bit, the draws of the truncation included."""
    spec = direct(THROUGH[through])
    alone = feed_of(model, spec, accumulation=2)
    wanted = [alone.terms(model, b, NONE).reward for b in alone.batches(3)]
    for rank in (0, 1):
        shared = feed_of(model, spec, rank=rank, world=2)
        (found,) = (shared.terms(model, b, NONE).reward for b in shared.batches(3))
        assert torch.equal(found, wanted[rank])


@pytest.mark.parametrize("through", THROUGH)
def test_the_reward_rises_and_falls_as_asked(model: Any, through: str) -> None:
    """Brightness of the same noise before, after steps up, and after the same steps down."""
    spec = direct(THROUGH[through])
    feed, named = feed_of(model, spec, batch_size=4), model.named_weights.trainable()
    begin = {n: p.detach().clone() for n, p in named.items()}

    def after(steps: int, sign: float) -> float:
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(begin[n])
        optimizer = torch.optim.Adam(named.values(), lr=1e-2)
        for step in range(steps):
            (batch,) = feed.batches(step)
            (-sign * feed.terms(model, batch, NONE).reward.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return model.decode(Chain.begin(model, ITEMS, spec.sampling, seed=9, step=9).run()).double().mean().item()

    assert after(4, -1.0) < after(0, 1.0) < after(4, 1.0)


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_scorer_without_gradients_is_named(tmp_path: Path) -> None:
    spec = GradientRewardSpec(scorers=["compressibility"])
    with pytest.raises(ConfigError, match=r"compressibility gives no gradient") as e:
        GradientRewards(spec, make_scorers(spec.scorers))
    assert "hpsv2" in str(e.value.hint)
    plain = GradientRewardSpec(scorers=["test_online:brightness"])
    with pytest.raises(ConfigError, match="brightness gives no gradient"):
        GradientRewards(plain, make_scorers(plain.scorers))


def test_weights_must_name_the_scorers() -> None:
    spec = GradientRewardSpec(scorers=[BRIGHT], weights={"beauty": 1.0})
    with pytest.raises(ConfigError, match="beauty"):
        GradientRewards(spec, make_scorers(spec.scorers))


def test_a_reward_that_is_not_finite_names_the_prompt() -> None:
    spec = GradientRewardSpec(scorers=["test_direct:Endless"])
    rewards = GradientRewards(spec, make_scorers(spec.scorers))
    with pytest.raises(Exception, match="brightness of 'picture 3' is not finite"):
        rewards(torch.rand(5, 3, 8, 8), [p.text for p in PROMPTS])


def test_rewards_are_columns_by_their_weights() -> None:
    from diffalign.objectives import RewardTerms
    from diffalign.objectives.direct import ReFL

    spec = GradientRewardSpec(scorers=[BRIGHT, "clip:shapes-clip"], weights={"brightness": 2.0})
    rewards = GradientRewards(spec, make_scorers(spec.scorers))
    pixels = torch.rand(3, 3, 32, 32)
    found, values = rewards(pixels, ["a red circle"] * 3)
    torch.testing.assert_close(found[:, 0], 2 * pixels.mean((1, 2, 3)))
    torch.testing.assert_close(found[:, 1], values["clip"])
    # IterComp: each of several rewards has a hinge of its own
    hinged = ReFL(target=0.9)(RewardTerms(found, values), {}).loss
    torch.testing.assert_close(hinged, (0.9 - found).clamp(min=0).sum(1))


def test_a_contrast_is_one_embedding_less_another() -> None:
    """SRPO: f . ((1 + k) t_pos - t_neg), with unit vectors."""
    contrast = {"positive": "a red circle", "negative": "a blue square", "k": 0.3}
    spec = validate(GradientRewardSpec, {"contrast": contrast})
    (clip,) = scorers = make_scorers(spec.scorers)
    pixels = torch.rand(2, 3, 32, 32)
    found, _ = GradientRewards(spec, scorers)(pixels, ["on a grey background"] * 2)
    encoder: Any = clip.encoder  # type: ignore[attr-defined]
    f = torch.nn.functional.normalize(encoder.pixels(pixels), dim=-1)
    pos, neg = (encoder.texts([f"{w}. on a grey background"])[0] for w in ("a red circle", "a blue square"))
    torch.testing.assert_close(found[:, 0], f @ (1.3 * pos - neg))


# --- whole runs ------------------------------------------------------------------------------------------------------


def small(tiny: Path, out: Path, **more: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "model": {"path": str(tiny), "lora": {"rank": 4}},
        "objective": {"type": "draft"},
        "direct": direct(THROUGH["random"]).model_dump(mode="json"),
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3},
        "evaluate": {"enabled": False},
        "output_dir": str(out),
    }
    for key, value in more.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) and key != "objective" else value
    return sections


def weights_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("objective", ["draft", "refl"])
def test_a_run_leaves_weights_and_figures(objective: str, tiny: Path, tmp_path: Path) -> None:
    run = train(validate(TrainConfig, small(tiny, tmp_path / "run", objective={"type": objective})))
    lines = [x for x in read_metrics(run.folder) if "loss" in x]
    assert run.metrics["reward_calls"] == 4
    made_from = [x["name"] for x in json.loads((run.folder / "env.json").read_text())["licences"]]
    assert made_from == [str(tiny), BRIGHT]  # and no pairs
    assert run.metrics["denoiser_passes"] > 0
    assert all(0 < line["reward"] == line["reward/brightness"] < 1 for line in lines)
    assert any(w.abs().sum() > 0 for n, w in weights_of(run.folder).items() if "lora_B" in n)


def test_it_trains_on_a_flow_as_well(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for through in ("last", "single"):
        more = {"direct": direct(THROUGH[through], sampling={"guidance_scale": 2.0}).model_dump(mode="json")}
        sections = small(folder_of("sd3"), tmp_path / through, **more, model={"max_sequence_length": 16})
        run = train(validate(TrainConfig, sections))
        assert any(w.abs().sum() > 0 for n, w in weights_of(run.folder).items() if "lora_B" in n)


def test_resuming_is_bit_equal(tiny: Path, tmp_path: Path) -> None:
    whole = train(validate(TrainConfig, small(tiny, tmp_path / "whole", train={"max_steps": 4})))
    train(validate(TrainConfig, small(tiny, tmp_path / "cut", train={"max_steps": 2})))
    cut = small(tiny, tmp_path / "cut", train={"max_steps": 4}) | {"resume_from": "latest"}
    rest = train(validate(TrainConfig, cut))
    a, b = weights_of(whole.folder), weights_of(rest.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    for key in ("denoiser_passes", "reward_calls"):
        assert rest.metrics[key] == whole.metrics[key]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_two_processes_train_as_one(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Real processes over gloo, several passes of the network in one backward, and not as many in each process, on networks
    without and with buffers: the same losses and weights.
    """
    tiny, more = folder_of(family), {}
    losses = []
    for n in (1, 2):
        more["train"] = {"gradient_accumulation_steps": 3 - n, "adam_epsilon": 0.01, "max_steps": 3, "seed": 1}
        more["model"] = {"max_sequence_length": 16} if family == "sd3" else {}
        config = validate(TrainConfig, small(tiny, tmp_path / f"run{n}", **more))
        (tmp_path / f"{n}.yaml").write_text(dump(config))
        env = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
        launch += ["--master-port", str(29400 + os.getpid() % 200), "-m", "diffalign", "train", str(tmp_path / f"{n}.yaml")]
        done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([x["loss"] for x in read_metrics(tmp_path / f"run{n}") if "loss" in x])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    a, b = (weights_of(tmp_path / f"run{n}") for n in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rewards without the section": ({"direct": None}, "add the section direct"),
    "another objective": ({"objective": {"type": "sft"}}, "sft is about"),
    "both sections": ({"online": {}}, "keep one of them"),
    "rounds beside": ({"rounds": {"count": 2, "source": {"type": "self_play"}}}, "keep one of them"),
    "stored data beside": ({"data": {"limit": 3}}, "drop data"),
    "times of noising": ({"timesteps": {"type": "logit_normal"}}, "timesteps and coupling"),
    "captions dropped": ({"train": {"caption_dropout": 0.1}}, "drop"),
    "no pairs to stop on": ({"train": {"early_stopping_patience": 2}}, "select/score"),
    "more steps than there are": ({"direct": {"through": {"type": "last", "steps": 4}}}, "through.steps 4"),
    "a step beyond the last": ({"direct": {"through": {"type": "preview", "low": 1, "high": 3}}}, "through.high 3"),
    "bounds in disorder": ({"direct": {"through": {"type": "single", "low": 2, "high": 1}}}, "below through.low"),
    "a rule for flows": (
        {"direct": {"sampling": {"num_inference_steps": 3, "rule": {"type": "flow_sde"}}}}, "not defined for epsilon"
    ),
    "a reward without gradients": (
        {"direct": {"reward": {"scorers": ["shapes"]}}}, "shapes gives no gradient"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        ("compressibility", "compressibility gives no gradient"),
        ("shapes", "shapes gives no gradient"),
        ("taste:size", "taste:size gives no gradient"),
        ("beauty", "direct.reward.scorers: unknown scorer 'beauty'"),
    ],
)
def test_scorers_are_told_by_their_cards_before_the_model_is_read(scorer: str, said: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "no model"
    with pytest.raises(ConfigError, match=said):
        validate(TrainConfig, small(nowhere, tmp_path / "run", direct={"reward": {"scorers": [scorer]}}))


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_with_the_remedy(case: str, tiny: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    with pytest.raises(ConfigError, match=said):
        train(validate(TrainConfig, small(tiny, tmp_path / "run", **change)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
