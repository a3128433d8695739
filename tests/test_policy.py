"""Online losses: the Gaussian's own score, the authors' formulas in numpy, identities that tie them together, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, softmax

from diffalign.advantages import Advantages
from diffalign.objectives import (
    OBJECTIVES,
    GroupTerms,
    ImageTerms,
    PairTerms,
    RewardTerms,
    StepTerms,
    Total,
    metrics_of,
)
from diffalign.objectives.forward import AWM, CRD, DGPO, NFT, RWR, Weighting
from diffalign.objectives.policy import PPO, FlowDPPO, GRPOGuard, Reinforce
from diffalign.objectives.stepwise import PRDP, SPO
from diffalign.path import log_density
from diffalign.testing import random_images, random_steps, terms_for
from diffalign.timesteps import Uniform
from diffalign.train.terms import Batch, terms_of

D = 48


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def steps(log_ratio: Any, advantage: Any, kl: Any = 0.0, std: Any = 0.5, dt: Any = 0.1, ref: Any = None) -> StepTerms:
    row = lambda v: torch.as_tensor(v, dtype=torch.double).expand(len(log_ratio))  # noqa: E731
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.double)
    return StepTerms(log_ratio, row(advantage), row(kl), row(std), row(dt), None if ref is None else row(ref), t=row(0.5))


def gradient(objective: Any, terms: Any, name: str = "log_ratio") -> torch.Tensor:
    x = getattr(terms, name).detach().clone().requires_grad_(True)
    (g,) = torch.autograd.grad(objective(replace(terms, **{name: x}), {}).loss.sum() + 0 * x.sum(), x)
    return g


class Step:
    """A transition of three policies: x_next ~ N(old mean, std^2), as the rollout gives it and the feed scores it."""

    def __init__(self, rows: int = 6, moved: float = 0.05, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(rows, D, generator=g, dtype=torch.double)  # noqa: E731
        self.std = 0.2 + torch.rand(rows, generator=g, dtype=torch.double)
        self.old, self.ref = draw(), draw()
        self.x = self.old + self.std[:, None] * draw()
        self.mean = (self.old + moved * self.std[:, None] * draw()).requires_grad_(True)
        self.ref = self.old + 0.1 * (self.ref - self.old)
        self.advantage = torch.randn(rows, generator=g, dtype=torch.double)
        self.dt = 0.02 + 0.1 * torch.rand(rows, generator=g, dtype=torch.double)

    def kl(self, other: torch.Tensor) -> torch.Tensor:
        return (self.mean - other).square().mean(1) / (2 * self.std**2)

    def terms(self) -> StepTerms:
        log_ratio = ((self.mean - self.old) * (2 * self.x - self.mean - self.old)).mean(1) / (2 * self.std**2)
        return StepTerms(log_ratio, self.advantage, self.kl(self.old), self.std, self.dt, self.kl(self.ref), t=self.dt)


# --- policy gradients ------------------------------------------------------------------------------------------------


def test_the_terms_are_densities_of_the_step() -> None:
    s = Step()
    t = s.terms()
    said = torch.distributions.Normal(s.mean, s.std[:, None])
    was = torch.distributions.Normal(s.old, s.std[:, None])
    torch.testing.assert_close(t.log_ratio, (said.log_prob(s.x) - was.log_prob(s.x)).mean(1))
    torch.testing.assert_close(t.kl_old, torch.distributions.kl_divergence(said, was).mean(1))


def test_reinforce_is_minus_the_advantage_times_the_score() -> None:
    s = Step(moved=0.0)
    (got,) = torch.autograd.grad(Reinforce()(s.terms(), {}).loss.sum(), s.mean)
    score = (s.x - s.mean.detach()) / s.std[:, None] ** 2 / D
    torch.testing.assert_close(got, -s.advantage[:, None] * score)


@pytest.mark.parametrize("cls", [PPO, FlowDPPO])
def test_where_the_ratio_is_1_all_are_reinforce(cls: Any) -> None:
    s = Step(moved=0.0)
    (wanted,) = torch.autograd.grad(Reinforce()(s.terms(), {}).loss.sum(), s.mean)
    (got,) = torch.autograd.grad(cls()(s.terms(), {}).loss.sum(), s.mean)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_guard_at_ratio_1_is_reinforce_times_std_over_dt() -> None:
    s = Step(moved=0.0)
    (wanted,) = torch.autograd.grad(Reinforce()(s.terms(), {}).loss.sum(), s.mean)
    (got,) = torch.autograd.grad(GRPOGuard()(s.terms(), {}).loss.sum(), s.mean)
    torch.testing.assert_close(got, (s.std / s.dt)[:, None] * wanted)


def test_ppo_in_numpy() -> None:
    s = Step(rows=400, moved=0.3)
    t = s.terms()
    lr, a, kl = (x.detach().numpy() for x in (t.log_ratio, t.advantage, t.kl_ref))
    rho = np.exp(lr)
    wanted = np.maximum(-a * rho, -a * np.clip(rho, 1 - 1e-2, 1 + 3e-2)) + 0.04 * kl
    out = PPO(clip_range=1e-2, clip_range_high=3e-2, beta=0.04)(t, {})
    np.testing.assert_allclose(out.loss.detach().numpy(), wanted, rtol=1e-12)
    outside = (rho < 1 - 1e-2) | (rho > 1 + 3e-2)
    assert 0 < outside.mean() < 1
    np.testing.assert_array_equal(out.metrics["ratio/clipped"].numpy(), outside)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope"),
    [
        (0.05, 1.0, 0.0),  # good and already likelier than the band allows: nothing more
        (-0.05, 1.0, -math.exp(-0.05)),  # good and less likely: pulled back with full force
        (-0.05, -1.0, 0.0),  # bad and already less likely
        (0.05, -1.0, math.exp(0.05)),
        (0.005, 2.0, -2 * math.exp(0.005)),  # within the band
    ],
)
def test_ppo_clips_one_side(log_ratio: float, advantage: float, slope: float) -> None:
    t = steps([log_ratio], advantage)
    objective = PPO(clip_range=0.01)
    assert gradient(objective, t).item() == pytest.approx(slope, rel=1e-12)
    assert objective(t, {}).metrics["rows_trained"].item() == (slope != 0)


def test_guard_in_numpy_row_by_row() -> None:
    s = Step(rows=64, moved=0.2)
    t = s.terms()
    x, mu, old, std, dt = (v.detach().numpy() for v in (s.x, s.mean, s.old, s.std[:, None], s.dt))
    log_p = lambda m: (-((x - m) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)).mean(1)  # noqa: E731
    sigma, sqrt_dt = std[:, 0] / np.sqrt(dt), np.sqrt(dt)  # the authors' std of a step is sigma sqrt(dt)
    bias = ((mu - old) ** 2).mean(1) / (2 * (sqrt_dt * sigma) ** 2)
    rho = np.exp((log_p(mu) - log_p(old) + bias) * (sqrt_dt * sigma))
    a = s.advantage.numpy()
    wanted = np.maximum(-a * rho, -a * np.clip(rho, 1 - 2e-3, 1 + 2e-3)) / sqrt_dt**2
    np.testing.assert_allclose(GRPOGuard(clip_range=2e-3)(t, {}).loss.detach().numpy(), wanted, rtol=1e-9)


def test_guard_removes_the_bias_of_the_mean_ratio() -> None:
    """E log rho = -r^2 / 2 with a spread of r / sqrt(D), r = rms(delta / std): drawn 20 000 times from the exact Gaussian."""
    g = torch.Generator().manual_seed(0)
    n, r, std = 20_000, 0.3, 0.7
    delta = r * std * torch.ones(D, dtype=torch.double)
    z = torch.randn(n, D, generator=g, dtype=torch.double)
    log_ratio = (z * delta / std - delta**2 / (2 * std**2)).mean(1)
    kl = (delta**2).mean() / (2 * std**2)
    error = r / math.sqrt(D * n)  # of the mean of n draws
    assert log_ratio.mean().item() == pytest.approx(-(r**2) / 2, abs=4 * error)
    assert (log_ratio + kl).mean().item() == pytest.approx(0, abs=4 * error)
    assert log_ratio.std().item() == pytest.approx(r / math.sqrt(D), rel=0.03)
    # so that PPO keeps teaching what is good and stops with what is bad, and the guard does neither more than the other
    eps = 0.02
    seen = {}
    for cls, sign in ((PPO, 1), (PPO, -1), (GRPOGuard, 1), (GRPOGuard, -1)):
        t = steps(log_ratio, float(sign), kl, std, 0.1)
        seen[cls, sign] = cls(clip_range=eps)(t, {}).metrics["rows_trained"].mean().item()
    assert seen[PPO, 1] - seen[PPO, -1] > 0.5
    assert abs(seen[GRPOGuard, 1] - seen[GRPOGuard, -1]) < 0.02


def test_the_gradient_of_the_guards_ratio_is_the_same_wherever_the_policy_went() -> None:
    """log p - log p_old + KL_old is linear in the mean, so that its slope does not shrink or turn with the distance."""
    near, far = Step(moved=0.0), Step(moved=0.5)
    far.x, far.std, far.old = near.x, near.std, near.old
    slopes = [torch.autograd.grad((s.terms().log_ratio + s.terms().kl_old).sum(), s.mean)[0] for s in (near, far)]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize(
    ("kl", "log_ratio", "advantage", "kept"),
    [
        (2e-5, 0.1, 1.0, False),  # far away, and pushed further
        (2e-5, -0.1, -1.0, False),
        (2e-5, -0.1, 1.0, True),  # far away, and pulled back
        (2e-5, 0.1, -1.0, True),
        (5e-6, 0.1, 1.0, True),  # near
        (5e-6, -0.1, -1.0, True),
        (1e-5, 0.1, 1.0, False),  # at the threshold
        (2e-5, 0.0, 1.0, True),  # neither nearer nor further
    ],
)
def test_dppo_drops_what_is_far_and_goes_further(kl: float, log_ratio: float, advantage: float, kept: bool) -> None:
    t = steps([log_ratio], advantage, kl)
    wanted = -advantage * math.exp(log_ratio) if kept else 0.0
    assert gradient(FlowDPPO(tau=1e-5), t).item() == pytest.approx(wanted)
    assert FlowDPPO(tau=1e-5)(t, {}).metrics["ratio/clipped"].item() == (not kept)


def test_dppo_in_numpy() -> None:
    """From densities and means, as the authors' code words the mask: far, likelier and good; or far, less likely and bad."""
    s = Step(rows=400, moved=0.05)
    x, mu, old, std = (v.detach().numpy() for v in (s.x, s.mean, s.old, s.std[:, None]))
    log_p = lambda m: (-((x - m) ** 2) / (2 * std**2) - np.log(std)).mean(1)  # noqa: E731
    rho, kl, a = np.exp(log_p(mu) - log_p(old)), ((mu - old) ** 2 / (2 * std**2)).mean(1), s.advantage.numpy()
    tau = float(np.median(kl))
    far = ~(kl < tau)
    dropped = (far & (rho > 1) & (a > 0)) | (far & (rho < 1) & (a < 0))
    out = FlowDPPO(tau=tau)(s.terms(), {})
    np.testing.assert_allclose(out.loss.detach().numpy(), np.where(dropped, 0, -a * rho), rtol=1e-9)
    assert 0.1 < dropped.mean() < far.mean()


@pytest.mark.parametrize("name", ["reinforce", "ppo", "grpo_guard", "flow_dppo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_advantage_gives_exactly_no_gradient(name: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1e-3, -0.5, 80.0, -80.0, 1e6], dtype=dtype)
    rows = torch.ones(6, dtype=dtype)
    t = StepTerms(values, 0 * rows, values.abs(), 0.5 * rows, 0.1 * rows, t=rows)
    objective = OBJECTIVES.options[name]()
    for term in ("log_ratio", "kl_old"):
        assert gradient(objective, t, term).abs().tolist() == [0.0] * 6
    assert objective(t, {}).metrics["rows_trained"].tolist() == [0.0] * 6


@pytest.mark.parametrize("name", ["ppo", "grpo_guard", "flow_dppo"])
@pytest.mark.parametrize("advantage", [-5.0, 5.0])
def test_extreme_ratios_stay_finite(name: str, advantage: float) -> None:
    values = torch.tensor([0.0, 100.0, -100.0, 1e8, -1e8])
    t = StepTerms(values, advantage + 0 * values, values.abs(), 0 * values + 0.5, 0 * values + 0.05, t=values * 0)
    objective = OBJECTIVES.options[name]()
    assert objective(t, {}).loss.isfinite().all()
    assert gradient(objective, t).isfinite().all()


def test_the_kl_to_the_reference_is_asked_for_when_it_has_a_weight() -> None:
    assert PPO().needs == frozenset()
    assert PPO(beta=0.01).needs == {"reference"}
    assert Total((PPO(beta=0.01),)).needs == {"reference"}
    t = random_steps(frozenset({"reference"}))
    assert gradient(PPO(beta=0.25), t, "kl_ref").tolist() == [0.25] * 8
    with pytest.raises(ValueError, match="kl_ref"):
        PPO(beta=0.25)(random_steps(frozenset()), {})


def test_fp32_ratios_follow_the_exact_log_ratio() -> None:
    """At |log rho| of 1e-6 a difference of two log densities in fp32 is lost; the product form keeps four digits."""
    s = Step(rows=1, moved=0.0)
    old = s.old.float()
    mean = old * (1 + 2**-16)
    x, std = s.x.float(), s.std.float()
    exact = log_density_64(x, mean, std) - log_density_64(x, old, std)
    product = ((mean - old) * (2 * x - mean - old)).mean(1) / (2 * std**2)
    assert abs(product.item() / exact - 1) < 1e-4
    naive = (log_density(x, mean, std) - log_density(x, old, std)).item()
    assert abs(naive / exact - 1) > abs(product.item() / exact - 1)


def log_density_64(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> float:
    return torch.distributions.Normal(mean.double(), std.double()[:, None]).log_prob(x.double()).mean().item()


# --- forward process -------------------------------------------------------------------------------------------------


def nft_in_numpy(res: Any, old: Any, a: Any, beta: float, clip: float = 5.0) -> Any:
    """The authors' lines: v+ and v- read as x0, errors over mean |.|, r from the advantage, times the clip over beta."""
    r = np.clip(a / clip / 2 + 0.5, 0, 1)
    total = 0
    for x0, share in ((beta * res + (1 - beta) * old, r), ((1 + beta) * old - beta * res, 1 - r)):
        w = np.clip(np.abs(x0).mean(1, keepdims=True), 1e-5, None)
        total = total + share * (x0**2 / w).mean(1)
    return total / beta * clip


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_nft_in_numpy(beta: float) -> None:
    t = random_images(frozenset({"residual", "old", "distance", "reference"}))
    got = NFT(beta=beta, kl=0.5)(t, {}).loss
    a = t.advantage.numpy() * 4  # some beyond the clip
    assert (np.abs(a) < 5).any()
    res, old = t.residual.numpy(), t.residual_old.numpy()
    got = NFT(beta=beta, kl=0.5)(replace(t, advantage=torch.as_tensor(a)), {}).loss
    np.testing.assert_allclose(got.numpy(), nft_in_numpy(res, old, a, beta) + 0.5 * t.distance.numpy(), rtol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_on_policy_is_the_advantage_times_the_error_over_w_whatever_beta(beta: float) -> None:
    t = random_images(frozenset({"residual", "old"}))
    t = replace(t, residual_old=t.residual)
    got = gradient(NFT(beta=beta, kl=0), t, "residual")
    x = t.residual.clone().requires_grad_(True)
    (of_error,) = torch.autograd.grad(x.square().mean(1).sum(), x)
    w = t.residual.abs().mean(1)
    torch.testing.assert_close(got, (t.advantage / w)[:, None] * of_error)


def test_nft_on_policy_is_awm_with_a_weight() -> None:
    """In velocities R = -t (v - target): the gradient is AWM's with weight t^2 / w, at the ratio 1."""
    t = random_images(frozenset({"residual", "old"}))
    t = replace(t, residual_old=t.residual)
    velocity = (-t.residual / t.time[:, None]).detach().requires_grad_(True)
    w = t.residual.abs().mean(1)
    e = velocity.square().mean(1)
    awm = AWM(weighting="t2", beta=0)(replace(t, error=e, old=e.detach()), {}).loss / w
    nft = NFT(kl=0)(replace(t, residual=-velocity * t.time[:, None]), {}).loss
    both = [torch.autograd.grad(x.sum(), velocity, retain_graph=True)[0] for x in (awm, nft)]
    torch.testing.assert_close(both[0], both[1])


def test_nft_with_w_held_agrees_with_finite_differences() -> None:
    t = random_images(frozenset({"residual", "old"}))
    beta, h = 0.5, 1e-6
    res, old, a = t.residual.numpy(), t.residual_old.numpy(), t.advantage.numpy()
    w = [np.abs(x).mean(1) for x in (beta * res + (1 - beta) * old, (1 + beta) * old - beta * res)]

    def value(x: Any) -> Any:
        r = a / 10 + 0.5
        plus, minus = beta * x + (1 - beta) * old, (1 + beta) * old - beta * x
        return 5 / beta * (r * (plus**2).mean(1) / w[0] + (1 - r) * (minus**2).mean(1) / w[1])

    got = gradient(NFT(beta=beta, kl=0), t, "residual").numpy()
    for k in range(res.shape[1]):
        one = np.zeros_like(res)
        one[:, k] = h
        np.testing.assert_allclose(got[:, k], (value(res + one) - value(res - one)) / (2 * h), rtol=1e-5, atol=1e-8)


def test_nft_of_a_perfect_or_a_broken_prediction_is_finite() -> None:
    zero = torch.zeros(3, 4)
    for residual in (zero, zero + 1e18, zero + 1e-30):
        t = ImageTerms(zero[:, 0], torch.tensor([5.0, -5.0, 100.0]), residual=residual, residual_old=residual, t=zero[:, 0])
        x = NFT(kl=0)(t, {}).loss
        assert x.isfinite().all()
        assert gradient(NFT(kl=0), t, "residual").isfinite().all()


AWM_IN_NUMPY = {
    "uniform": lambda log_p, t: log_p,
    "t": lambda log_p, t: log_p * t,
    "t2": lambda log_p, t: log_p * t**2,
    "huber": lambda log_p, t: -(np.sqrt(-log_p + 1e-10) - 1e-5) * t,
    "ghuber": lambda log_p, t: -(np.power(-log_p + 1e-10, 0.25) - np.power(1e-10, 0.25)) * t / 0.25,
}


@pytest.mark.parametrize("weighting", AWM_IN_NUMPY)
def test_awm_in_numpy(weighting: Weighting) -> None:
    t = random_images(frozenset({"old", "distance", "reference", "average"}))
    now, old, time, a = (x.double().numpy() for x in (t.error, t.old, t.time, t.advantage))
    log_p, log_p_old = (AWM_IN_NUMPY[weighting](-e, time) for e in (now, old))
    rho = np.exp(log_p - log_p_old)
    eps = 2e-4
    wanted = np.maximum(-a * rho, -a * np.clip(rho, 1 - eps, 1 + eps)) + 0.3 * t.distance.numpy()
    wanted = wanted + 2 * t.distance_average.numpy()
    out = AWM(weighting=weighting, clip_range=eps, beta=0.3, near=2)(t, {})
    np.testing.assert_allclose(out.loss.numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("weighting", AWM_IN_NUMPY)
def test_awm_at_extremes(weighting: Weighting) -> None:
    """No error at all, a broken network, and the ends of the path."""
    e, t = torch.tensor([0.0, 0.0, 1e8, 1e8, 0.2]), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5])
    for a in (-5.0, 0.0, 5.0):
        terms = ImageTerms(e, a + 0 * e, old=e.flip(0), t=t, time=t)
        assert AWM(weighting=weighting, beta=0)(terms, {}).loss.isfinite().all()
        slope = gradient(AWM(weighting=weighting, beta=0), terms, "error")
        assert slope.isfinite().all()
        assert a or slope.tolist() == [0.0] * 5


@pytest.mark.parametrize(("family", "told"), [("sd3", [0.5, 0.75, 0.9]), ("sd", [0.25, 0.5, 0.75])])
def test_awm_weighs_by_the_time_that_the_network_is_told(
    family: str, told: list[float], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shift 3 moves 1/4, 1/2 and 3/4 to 3u / (1 + 2u); without a shift they stay. Twice each, as draws of one image."""
    model = load(family, **({"max_sequence_length": 16} if family == "sd3" else {}))
    if family == "sd3":
        assert model.scheduler.shift == 3
    seen = []
    inner = model.predict
    monkeypatch.setattr(model, "predict", lambda x, t, *a, **k: seen.append(t) or inner(x, t, *a, **k))
    g = torch.Generator().manual_seed(0)
    u = torch.tensor([0.25, 0.5, 0.75])[:, None, None].expand(3, 1, 2)
    x0, eps = torch.randn(3, 1, *model.latent_shape, generator=g), torch.randn(3, 1, 2, *model.latent_shape, generator=g)
    cond, facts = model.encode_prompts(["a", "b", "c"]), {"advantage": torch.ones(3)}
    height, width = model.resolution
    frames = torch.tensor([height, width, 0, 0, height, width]).expand(3, 1, 6)
    batch = Batch(x0, frames, eps, u, (cond,), torch.ones(3), "images", facts)
    terms = terms_of(model, batch, Uniform(), frozenset())
    assert isinstance(terms, ImageTerms)
    assert terms.time.tolist() == pytest.approx(told, abs=1e-6)
    assert (seen[0].double() / 1000).tolist() == pytest.approx([*told, *told], abs=1e-6)
    terms = replace(terms, old=2 * terms.error.detach())
    loss = AWM(weighting="t", beta=0, clip_range=1e9)(terms, {}).loss
    expected = -(torch.tensor(told) * terms.error).exp()
    torch.testing.assert_close(loss, expected)


def test_regression_weighted_by_rewards() -> None:
    e, scores = torch.rand(5, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    got = RWR(alpha=0.5)(GroupTerms(e, scores), {}).loss
    np.testing.assert_allclose(got.numpy(), (softmax(scores.numpy() / 0.5, 1) * e.numpy()).sum(1))
    torch.testing.assert_close(RWR()(GroupTerms(e, scores * 0), {}).loss, e.mean(1))
    assert RWR()(GroupTerms(e.float(), scores.float() * 1e30), {}).loss.isfinite().all()


def test_dgpos_gradient_is_the_published_one() -> None:
    """w = sigmoid(sum A beta (l - l_ref) / K) held, loss mean w A l: their gradient, times beta."""
    g = torch.Generator().manual_seed(0)
    e, ref, a = torch.rand(3, 5, 4, generator=g, dtype=torch.double)
    a = a - a.mean(1, keepdim=True)
    x = e.clone().requires_grad_(True)
    w = torch.sigmoid((a * 100 * (x.detach() - ref) / 4).sum(1, keepdim=True))
    (published,) = torch.autograd.grad((w * a * x).mean(1).sum(), x)
    got = gradient(DGPO(beta=100), GroupTerms(e, a, ref), "error")
    torch.testing.assert_close(got, 100 * published)


def test_dgpo_sees_differences_alone() -> None:
    """A constant in all advantages of a group, or in all its rewards, would bring the partition function back."""
    e, ref, a = torch.rand(3, 5, 4, dtype=torch.double)
    shift = torch.randn(5, 1, dtype=torch.double)
    wanted = DGPO()(GroupTerms(e, a, ref), {}).loss
    torch.testing.assert_close(DGPO()(GroupTerms(e, a + shift, ref), {}).loss, wanted)
    torch.testing.assert_close(DGPO()(GroupTerms(e + shift, a, ref), {}).loss, wanted)


def test_dgpo_of_two_with_a_sure_winner_is_dpo() -> None:
    e, ref = torch.rand(2, 6, 2, dtype=torch.double)
    sure = torch.tensor([[1.0, -1.0]], dtype=torch.double).expand(6, 2)
    got = DGPO(beta=10)(GroupTerms(e, sure, ref), {}).loss
    pairs = PairTerms(e[:, 0], e[:, 1], ref[:, 0], ref[:, 1])
    wanted = OBJECTIVES.options["sigmoid"](beta=5, kappa=1)(pairs, {}).loss  # the mean over two halves beta
    torch.testing.assert_close(got, wanted)


def test_crd_in_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    e, ref, scores = torch.rand(3, 5, 4, generator=g, dtype=torch.double)
    got = CRD(beta=3)(GroupTerms(e, scores, ref), {}).loss
    r = 3 * (ref - e).numpy()
    r, wanted = r - r.mean(1, keepdims=True), expit((scores - scores.mean(1, keepdim=True)).numpy())
    np.testing.assert_allclose(got.numpy(), -(wanted * log_expit(r) + (1 - wanted) * log_expit(-r)).mean(1))


def test_crd_holds_the_mean_of_the_rewards() -> None:
    """Its slope in e_k is -beta (sigmoid(r_k - mean r) - sigmoid(R_k - mean R)) / K, without a term through the mean."""
    e, ref, scores = torch.rand(3, 5, 4, dtype=torch.double)
    r = 3 * (ref - e).numpy()
    target = expit((scores - scores.mean(1, keepdim=True)).numpy())
    wanted = -3 * (expit(r - r.mean(1, keepdims=True)) - target) / 4
    np.testing.assert_allclose(gradient(CRD(beta=3), GroupTerms(e, scores, ref), "error"), wanted)


# --- differentiable rewards ------------------------------------------------------------------------------------------


def test_rewards_are_raised_up_to_the_target() -> None:
    t = RewardTerms(tensor(0.5, 1.9, 2.5), t=tensor(0, 0, 0))
    draft, refl = OBJECTIVES.options["draft"](), OBJECTIVES.options["refl"](target=2.0)
    assert draft(t, {}).loss.tolist() == [-0.5, -1.9, -2.5]
    assert gradient(draft, t, "reward").tolist() == [-1, -1, -1]
    assert refl(t, {}).loss.tolist() == pytest.approx([1.5, 0.1, 0.0])
    assert gradient(refl, t, "reward").tolist() == [-1, -1, 0]
    assert Total((OBJECTIVES.options["refl"](weight=1e-3),))(t, {}).loss.tolist() == pytest.approx([1.5e-3, 1e-4, 0.0])


def test_several_rewards_are_each_held_at_the_target() -> None:
    """IterComp: sum_k relu(2 - R_k); a surplus of one does not pay for the lack of another."""
    rewards = tensor(3.0, 1.0, 0.0, 2.0, 5.0, 2.5).view(2, 3)
    t = RewardTerms(rewards, t=tensor(0, 0))
    assert OBJECTIVES.options["refl"]()(t, {}).loss.tolist() == [3.0, 0.0]
    assert OBJECTIVES.options["draft"]()(t, {}).loss.tolist() == [-4.0, -9.5]
    assert metrics_of(t)["reward"].tolist() == pytest.approx([4 / 3, 9.5 / 3])


# --- pairs of steps --------------------------------------------------------------------------------------------------


class Two:
    """Two steps from one x_t, as errors mean (x_next - mu)^2 / (2 std^2) of policy, reference and the one that sampled."""

    def __init__(self, rows: int = 7, moved: float = 0.1) -> None:
        s = Step(rows)
        g = torch.Generator().manual_seed(1)
        self.std, self.ref, self.old = s.std, s.ref, s.old
        self.mean = s.old + moved * torch.randn(rows, D, generator=g, dtype=torch.double)
        self.x = [s.x, s.old + s.std[:, None] * torch.randn(rows, D, generator=g, dtype=torch.double)]
        error = lambda x, mu: (x - mu).square().mean(1) / (2 * self.std**2)  # noqa: E731
        (now, ref, old) = ([error(x, mu) for x in self.x] for mu in (self.mean, self.ref, self.old))
        gap = {"score_winner": now[0] * 0 + 0.7, "score_loser": now[0] * 0 + 0.2}
        self.terms = PairTerms(*now, *ref, old_winner=old[0], old_loser=old[1], t=self.std, **gap)

    def log_ratios(self) -> list[Any]:
        normal = torch.distributions.Normal
        at = lambda x, mu: normal(mu, self.std[:, None]).log_prob(x).mean(1)  # noqa: E731
        return [(at(x, self.mean) - at(x, self.ref)).numpy() for x in self.x]


def test_rewards_of_steps_are_beta_times_log_ratios() -> None:
    two = Two()
    w, l = two.log_ratios()  # noqa: E741
    out = OBJECTIVES.options["sigmoid"](beta=0.1, kappa=1.0)(two.terms, {})  # TailorPO
    np.testing.assert_allclose(out.metrics["rewards/chosen"].numpy(), 0.1 * w, rtol=1e-9)
    np.testing.assert_allclose(out.metrics["rewards/rejected"].numpy(), 0.1 * l, rtol=1e-9)
    np.testing.assert_allclose(out.loss.numpy(), -log_expit(0.1 * (w - l)), rtol=1e-9)


@pytest.mark.parametrize(("beta", "moved"), [(10.0, 0.02), (10.0, 0.3), (0.1, 0.3)])
def test_spo_and_d3po_clamp_the_ratio(beta: float, moved: float) -> None:
    two = Two(rows=40, moved=moved)
    w, l = two.log_ratios()  # noqa: E741
    clamp = lambda x: np.log(np.clip(np.exp(x), 0.9, 1.1))  # noqa: E731
    got = SPO(beta=beta)(two.terms, {}).loss.numpy()
    np.testing.assert_allclose(got, -log_expit(beta * clamp(w) - beta * clamp(l)), rtol=1e-9)
    assert (np.abs(w) > 0.11).any() or moved < 0.1
    slope = gradient(SPO(beta=beta), two.terms, "winner").numpy()
    inside = (np.exp(w) > 0.9) & (np.exp(w) < 1.1)
    np.testing.assert_array_equal(slope != 0, inside)


def test_spo_cannot_leave_its_band() -> None:
    """beta (log 1.1 - log 0.9) is the largest margin: at beta = 10 the loss stays within 0.126 and 2.133."""
    far = tensor(50.0)
    best = PairTerms(0 * far, far, far, 0 * far, t=far)
    worst = PairTerms(far, 0 * far, 0 * far, far, t=far)
    assert SPO()(best, {}).loss.item() == pytest.approx(0.126, abs=5e-4)
    assert SPO()(worst, {}).loss.item() == pytest.approx(2.133, abs=5e-4)


def test_inside_the_band_the_clipped_losses_are_the_plain_ones() -> None:
    two = Two(moved=1e-6)
    near = replace(two.terms, ref_winner=two.terms.old_winner, ref_loser=two.terms.old_loser)
    plain = {"spo": "sigmoid", "prdp": "rdp"}
    for name, same in plain.items():
        settings = {"beta": 3.0, "kappa": 1.0}
        got, wanted = (OBJECTIVES.options[n](**settings)(near, {}).loss for n in (name, same))
        torch.testing.assert_close(got, wanted)


def test_prdp_in_numpy() -> None:
    two = Two(rows=60, moved=0.1)
    w, l = two.log_ratios()  # noqa: E741
    t = two.terms
    moved = [(a - b).numpy() for a, b in ((t.old_winner, t.winner), (t.old_loser, t.loser))]
    since = [(a - b).numpy() for a, b in ((t.ref_winner, t.old_winner), (t.ref_loser, t.old_loser))]
    eps, wanted = 0.05, 0.5 / 2
    m, held = w - l, np.clip(moved[0], -eps, eps) + since[0] - np.clip(moved[1], -eps, eps) - since[1]
    expected = np.maximum((m - wanted) ** 2, (held - wanted) ** 2)
    got = PRDP(beta=1, tau=2, clip_range=eps)(t, {}).loss.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert (expected > (m - wanted) ** 2).any()


def test_prdp_holds_each_step_of_a_sum() -> None:
    """Steps that go apart and cancel are held one by one: in numpy, and where all are inside it is the sum's own loss."""
    two, eps, steps = Two(rows=60, moved=0.0), 0.05, 4
    t = two.terms
    g = torch.Generator().manual_seed(3)
    moved = 0.1 * torch.randn(60, steps, 2, generator=g, dtype=torch.double)
    t = replace(t, winner=t.old_winner - moved[..., 0].sum(1), loser=t.old_loser - moved[..., 1].sum(1), log_ratios=moved)
    since = [(a - b).numpy() for a, b in ((t.ref_winner, t.old_winner), (t.ref_loser, t.old_loser))]
    free, held = (x.sum(1) for x in (moved.numpy(), np.clip(moved.numpy(), -eps, eps)))
    wanted = 0.5 / 2
    expected = np.maximum(*((x[:, 0] + since[0] - x[:, 1] - since[1] - wanted) ** 2 for x in (free, held)))
    got = PRDP(beta=1, tau=2, clip_range=eps)(t, {}).loss.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    wide = PRDP(beta=1, tau=2, clip_range=9.0)
    torch.testing.assert_close(wide(t, {}).loss, wide(replace(t, log_ratios=None), {}).loss)


# --- a toy whose optimum is known ------------------------------------------------------------------------------------


CLIMBING: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "ppo": {"clip_range": 0.2},
    "grpo_guard": {"clip_range": 0.2},
    "flow_dppo": {"tau": 0.02},
    "nft": {"kl": 0.0},
    "awm": {"weighting": "uniform", "beta": 0.0, "clip_range": 0.5},
    "draft": {},
    "refl": {"target": 0.0},
}


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("start", [-1.0, 3.0])
def test_a_gaussian_policy_climbs_to_the_reward(name: str, start: float) -> None:
    """A policy N(mu, 1) of steps or of images, rewarded by -(x - 1)^2: mu goes to 1 from both sides, two updates a rollout."""
    objective = OBJECTIVES.options[name](**CLIMBING[name])
    mean = torch.tensor(start, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.05)
    g = torch.Generator().manual_seed(0)
    one = torch.ones(64 * 8, dtype=torch.double)
    for _ in range(60):
        old, z = mean.detach().clone(), torch.randn(64, 8, generator=g, dtype=torch.double)
        x = (old + z).flatten()
        advantage = Advantages()({"r": -((old + z - 1) ** 2)}).values.flatten()
        t, eps = torch.rand(16, generator=g, dtype=torch.double), torch.randn(512, 16, generator=g, dtype=torch.double)
        for _ in range(2):
            match objective.data:
                case "steps":
                    log_ratio, kl = (mean - old) * (2 * x - mean - old) / 2, ((mean - old) ** 2 / 2).expand(512)
                    terms: Any = StepTerms(log_ratio, advantage, kl, one, one, t=one)
                case "images":  # x0_hat of x0 ~ N(mu, 1) at x_t on a flow path, at 16 times

                    def residual(mu: torch.Tensor, x: Any = x, t: Any = t, eps: Any = eps) -> torch.Tensor:
                        noisy = (1 - t) * x[:, None] + t * eps
                        return (mu * t**2 + (1 - t) * noisy) / ((1 - t) ** 2 + t**2) - x[:, None]

                    now, was = residual(mean), residual(old)
                    both = [v.square().mean(1) for v in (now, was)]
                    terms = ImageTerms(both[0], advantage, both[1], residual=now, residual_old=was, t=one, time=one)
                case _:
                    terms = RewardTerms(-((mean + z.flatten() - 1) ** 2), t=one)
            optimizer.zero_grad()
            objective(terms, {}).loss.mean().backward()
            optimizer.step()
    assert mean.item() == pytest.approx(1.0, abs=0.15)


# --- what is logged --------------------------------------------------------------------------------------------------


def test_what_is_logged_of_steps() -> None:
    t = steps([0.0, 0.01, -0.02], [1.0, 0.0, -1.0], kl=[1e-4, 2e-4, 3e-4], ref=[1.0, 2.0, 3.0])
    m = metrics_of(t)
    assert m["ratio"].tolist() == pytest.approx([1.0, math.exp(0.01), math.exp(-0.02)])
    assert m["ratio/largest_off_1"][0].item() == pytest.approx(1 - math.exp(-0.02))
    assert m["ratio/largest_off_1"][1:].isnan().all()  # so that means over rows are means over batches
    assert m["kl/old"].tolist() == [1e-4, 2e-4, 3e-4]
    assert m["kl/ref"].tolist() == [1.0, 2.0, 3.0]
    on_policy = metrics_of(steps([0.0, 0.0], 1.0))
    assert on_policy["ratio"].tolist() == [1.0, 1.0]
    assert on_policy["ratio/largest_off_1"][0].item() == 0.0


def test_what_is_logged_of_images() -> None:
    t = random_images(frozenset({"residual", "old", "reference"}))
    m = metrics_of(t)
    torch.testing.assert_close(m["deviation/old"], (t.residual - t.residual_old).square().mean(1))
    assert m["drift/winner"].isnan().tolist() == (t.advantage < 0).tolist()
    assert m["drift/loser"].isnan().tolist() == (t.advantage > 0).tolist()
    same = replace(t, residual=None, residual_old=None, old=t.error)
    assert metrics_of(same)["deviation/old"].abs().max() == 0


@pytest.mark.parametrize("name", ["ppo", "nft", "draft", "dgpo", "prdp"])
def test_metrics_are_rows_and_detached(name: str) -> None:
    objective = OBJECTIVES.options[name]()
    t = terms_for(objective)
    x = next(k for k in ("log_ratio", "residual", "reward", "error", "winner") if getattr(t, k, None) is not None)
    t = replace(t, **{x: getattr(t, x).clone().requires_grad_(True)})
    for metrics in (metrics_of(t), objective(t, {}).metrics):
        assert all(v.shape == (8,) and not v.requires_grad for v in metrics.values())


def test_kinds_of_data_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="ppo is about steps, nft is about images"):
        Total((PPO(), NFT()))
    both = Total((PPO(), Reinforce(weight=0.5)))
    t = random_steps(frozenset())
    torch.testing.assert_close(both(t, {}).loss, PPO()(t, {}).loss + 0.5 * Reinforce()(t, {}).loss)
