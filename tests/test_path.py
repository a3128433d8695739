"""The Gaussian path and the one-step rules, against closed forms and against diffusers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import path, rules
from diffalign.path import Coeffs

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def coeffs(kind: str, s: torch.Tensor) -> Coeffs:
    return Coeffs(1 - s, s) if kind == "flow" else Coeffs((1 - s**2).sqrt(), s)


def draw(seed: int = 0, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 4, 3, 3, generator=g, dtype=torch.double).unbind()


@pytest.mark.parametrize("kind", KINDS)
@given(s=st.floats(0.02, 0.98), seed=st.integers(0, 99))
def test_split_inverts_target(kind: str, s: float, seed: int) -> None:
    x0, eps = draw(seed)
    c = coeffs(kind, torch.full((5,), s, dtype=torch.double))
    x = path.add_noise(x0, eps, c)
    found = path.split(kind, path.target(kind, x0, eps, c), x, c)
    torch.testing.assert_close(found, (x0, eps))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_all_kinds_agree_after_their_weight(kind: str) -> None:
    """A wrong guess of x0 costs the same in every space once lambda(t) is applied."""
    x0, eps = draw(1)
    wrong = x0 + 0.1 * draw(2)[0]
    c = coeffs(kind, torch.linspace(0.1, 0.9, 5, dtype=torch.double))
    x = path.add_noise(x0, eps, c)
    _, s = c.over(x)
    a, _ = c.over(x)
    implied_eps = (x - a * wrong) / s  # the noise that the wrong guess implies at the same x_t
    native = path.denoise_error(path.target(kind, wrong, implied_eps, c), path.target(kind, x0, eps, c))
    in_x0 = path.denoise_error(wrong, x0)
    torch.testing.assert_close(path.error_weight(kind, c).float() * native, in_x0, rtol=1e-5, atol=1e-7)


def test_v_error_is_epsilon_error_over_alpha_squared() -> None:
    c = coeffs("epsilon", torch.tensor([0.2, 0.5, 0.9], dtype=torch.double))
    torch.testing.assert_close(path.error_weight("v_prediction", c) / path.error_weight("epsilon", c), c.alpha**2)


def test_denoise_error_is_taken_in_fp32() -> None:
    a, b = torch.full((1, 4096), 1.0, dtype=torch.bfloat16), torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    assert path.denoise_error(a, b).dtype == torch.float32
    assert path.denoise_error(a, b).item() == pytest.approx(0.0078125**2)


def test_log_density_is_the_normal_density_per_dimension() -> None:
    x, mean = (v.float() for v in draw(3))
    std = torch.linspace(0.3, 2.0, 5)
    wanted = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(path.log_density(x, mean, std), wanted)


def test_ddim_equals_diffusers_at_eta_0_and_1() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    x, eps = (v[:2].float() for v in draw(4))
    abar = scheduler.alphas_cumprod
    for eta in (0.0, 1.0):
        for t, t_next in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
            z = torch.zeros_like(x)
            wanted = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
            c, c_next = (Coeffs(abar[i].sqrt().expand(2), (1 - abar[i]).sqrt().expand(2)) for i in (t, t_next))
            k, d = rules.DDIM(eta=eta)(c, c_next)
            x0, noise = path.split("epsilon", eps, x, c)
            torch.testing.assert_close(path.step_mean(x0, noise, c_next, k), wanted, rtol=1e-4, atol=1e-4)
            one = torch.ones_like(x)
            with_noise = scheduler.step(eps, t, x, eta=eta, variance_noise=one).prev_sample
            torch.testing.assert_close((with_noise - wanted).flatten(1).mean(1), d, rtol=1e-4, atol=1e-4)


def test_ode_equals_diffusers_euler_on_a_flow_path() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    x, v = (u[:2].float() for u in draw(5))
    for i, t in enumerate(scheduler.timesteps):
        wanted = scheduler.step(v, t, x).prev_sample
        now, later = scheduler.sigmas[i].expand(2), scheduler.sigmas[i + 1].expand(2)
        c, c_next = Coeffs(1 - now, now), Coeffs(1 - later, later)
        k, d = rules.ODE()(c, c_next)
        assert (d == 0).all()
        x0, eps = path.split("flow", v, x, c)
        torch.testing.assert_close(path.step_mean(x0, eps, c_next, k), wanted, rtol=1e-5, atol=1e-5)


FLOW = (Coeffs(torch.tensor([0.3]), torch.tensor([0.7])), Coeffs(torch.tensor([0.4]), torch.tensor([0.6])))


def test_flow_sde_has_the_published_mean_and_noise() -> None:
    """x (1 + g^2 dt / 2 sigma) + v (1 + g^2 (1 - sigma) / 2 sigma) dt with g = a sqrt(sigma / (1 - sigma)), dt < 0."""
    x, v = torch.randn(1, 4, dtype=torch.double), torch.randn(1, 4, dtype=torch.double)
    a, s, dt = 0.7, 0.7, -0.1
    g2 = a * a * s / (1 - s)
    wanted = x * (1 + g2 * dt / (2 * s)) + v * (1 + g2 * (1 - s) / (2 * s)) * dt
    k, d = rules.FlowSDE(noise_level=a)(*FLOW)
    x0, eps = path.split("flow", v, x, FLOW[0])
    torch.testing.assert_close(path.step_mean(x0, eps, FLOW[1], k), wanted, rtol=1e-5, atol=1e-5)
    assert d.item() == pytest.approx((g2 * 0.1) ** 0.5)


def test_flow_sde_is_finite_at_the_first_step() -> None:
    one = Coeffs(torch.tensor([0.0]), torch.tensor([1.0]))
    later = Coeffs(torch.tensor([0.1]), torch.tensor([0.9]))
    k, d = rules.FlowSDE(noise_level=0.7)(one, later)
    assert d.item() == pytest.approx(0.7 * (1 / 0.1) ** 0.5 * 0.1**0.5)
    assert torch.isfinite(k).all()


def test_dance_sde_has_the_published_mean() -> None:
    x, v = torch.randn(1, 4, dtype=torch.double), torch.randn(1, 4, dtype=torch.double)
    eta, s, dt = 0.3, 0.7, -0.1
    x0 = x - s * v
    score = -(x - (1 - s) * x0) / s**2
    wanted = x + v * dt - 0.5 * eta**2 * score * dt
    k, d = rules.DanceSDE(eta=eta)(*FLOW)
    x0_hat, eps = path.split("flow", v, x, FLOW[0])
    torch.testing.assert_close(path.step_mean(x0_hat, eps, FLOW[1], k), wanted, rtol=1e-5, atol=1e-5)
    assert d.item() == pytest.approx(eta * 0.1**0.5)


@given(level=st.floats(0, 1))
def test_cps_keeps_the_noise_level(level: float) -> None:
    k, d = rules.CPS(noise_level=level)(*FLOW)
    assert (k**2 + d**2).item() == pytest.approx(0.36, rel=1e-5)


@pytest.mark.parametrize(
    "rule", [rules.DDIM(eta=0), rules.FlowSDE(noise_level=0), rules.DanceSDE(eta=0), rules.CPS(noise_level=0)]
)
def test_every_rule_without_noise_is_the_ode(rule: rules.Rule) -> None:
    torch.testing.assert_close(rule(*FLOW), rules.ODE()(*FLOW))
