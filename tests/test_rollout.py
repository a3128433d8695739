"""Rollouts and their replay, on tiny models of every family and on closed forms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from side_by_side import PROMPTS, RANK_2, same
from tiny_families import FAMILIES

from diffalign import path, rules
from diffalign.branching import branch
from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.oversample import preselect
from diffalign.path import Coeffs
from diffalign.preflight import leverage, preflight
from diffalign.rollout import (
    RolloutSettings,
    Trajectories,
    check,
    conditions,
    epoch_seed,
    evaluations,
    replay,
    rollout,
)
from diffalign.rules import CPS, DDIM, ODE, DanceSDE, FlowSDE
from diffalign.sampling import Item, sample
from diffalign.solvers import dpm_2m
from diffalign.windows import Fixed, Progressive, Random

FLOW = [name for name in FAMILIES if name.startswith(("sd3", "flux"))]
every_family = pytest.mark.parametrize("name", FAMILIES)

A, B = (Prompt(text) for text in PROMPTS)
ITEMS = [Item(A, 0), Item(A, 1), Item(B, 0), Item(B, 1)]


def stochastic(name: str) -> rules.Rule:
    return FlowSDE() if name in FLOW else DDIM(eta=1.0)


def real_schedule(model: Any) -> Any:
    """The tiny SDXL and PixArt with the spacing that SDXL ships: theirs is diffusers' default, whose steps DDIM rounds."""
    if model.kind != "flow" and model.family != "stable-diffusion":
        from diffusers import EulerDiscreteScheduler

        model.scheduler = EulerDiscreteScheduler.from_config(
            model.scheduler.config, timestep_spacing="leading", steps_offset=1
        )
    return model


def tensors(made: Trajectories) -> list[torch.Tensor]:
    parts = [getattr(made, f.name) for f in fields(made)]
    return [t for p in parts for t in ((p.alpha, p.sigma) if isinstance(p, Coeffs) else (p,))]


def equal(one: Trajectories, other: Trajectories) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


# --- densities --------------------------------------------------------------------------------------------------------


def gaussians(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    mean, old, x = torch.randn(3, 3, 2, 4, 4, generator=g, dtype=torch.double).unbind()
    return mean, old, x, torch.tensor([0.05, 0.5, 2.0], dtype=torch.double)


def normal(mean: torch.Tensor, std: torch.Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(mean, std.view(-1, 1, 1, 1))


@given(seed=st.integers(0, 99))
def test_log_ratio_is_the_difference_of_log_densities(seed: int) -> None:
    mean, old, x, std = gaussians(seed)
    wanted = (normal(mean, std).log_prob(x) - normal(old, std).log_prob(x)).flatten(1).mean(1)
    torch.testing.assert_close(path.log_ratio(mean, old, x, std), wanted)


def test_log_ratio_has_the_gradient_of_finite_differences() -> None:
    mean, old, x, std = gaussians()
    assert torch.autograd.gradcheck(lambda m: path.log_ratio(m, old, x, std), mean.requires_grad_())


def test_log_ratio_keeps_what_a_difference_of_densities_loses() -> None:
    """In fp32, means 1e-6 apart: the closed form is right to six digits, the difference of two densities of order 1 is not."""
    _, old, x, std = (v.float() for v in gaussians())
    moved = old + 1e-6 * torch.sign(x)
    exact = path.log_ratio(moved.double(), old.double(), x.double(), std.double())
    torch.testing.assert_close(path.log_ratio(moved, old, x, std).double(), exact, rtol=1e-5, atol=0)
    assert path.log_ratio(old, old, x, std).eq(0).all()
    lossy = path.log_density(x, moved, std) - path.log_density(x, old, std)
    assert ((lossy - exact) / exact).abs().max() > 1e-2


def test_kl_is_the_closed_form() -> None:
    mean, other, _, std = gaussians()
    wanted = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).flatten(1).mean(1)
    torch.testing.assert_close(path.kl(mean, other, std), wanted)


# --- rules against a second writing -----------------------------------------------------------------------------------

LEVELS = [(0.96, 0.91), (0.7, 0.6), (0.3, 0.05), (0.1, 0.0)]


def published(name: str, a: float, s: float, s_next: float, first: float) -> Callable[..., Any]:
    """(mean, std) as the authors write them, in numpy fp64: a function of x and the velocity."""
    dt = s_next - s
    if name == "flow_sde":
        g2 = a * a * s / (1 - (first if s == 1 else s))
        return lambda x, v: (x * (1 + g2 / (2 * s) * dt) + v * (1 + g2 * (1 - s) / (2 * s)) * dt, np.sqrt(g2 * -dt))
    if name == "dance_sde":
        return lambda x, v: (
            x + v * dt - 0.5 * a * a * (-(x - (1 - s) * (x - s * v)) / s**2) * dt,
            a * np.sqrt(-dt),
        )
    d = s_next * np.sin(a * np.pi / 2)
    return lambda x, v: ((1 - s_next) * (x - s * v) + np.sqrt(s_next**2 - d**2) * (x + (1 - s) * v), d)


@pytest.mark.parametrize("levels", [(1.0, 0.96), *LEVELS])
@pytest.mark.parametrize(("name", "a"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)])
def test_flow_rules_against_numpy(name: str, a: float, levels: tuple[float, float]) -> None:
    s, s_next = levels
    rule = {"flow_sde": FlowSDE(noise_level=a), "dance_sde": DanceSDE(eta=a), "cps": CPS(noise_level=a)}[name]
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 3, 4, 2, 2))
    mean, std = published(name, a, s, s_next, first=0.96)(x, v)
    c, c_next = (
        Coeffs(1 - u, u) for u in (torch.full((3,), s, dtype=torch.double), torch.full((3,), s_next, dtype=torch.double))
    )
    k, d = rule(c, c_next)
    x0, eps = path.split("flow", torch.tensor(v), torch.tensor(x), c)
    torch.testing.assert_close(path.step_mean(x0, eps, c_next, k), torch.tensor(mean))
    torch.testing.assert_close(d, torch.full((3,), float(std), dtype=torch.double))


def test_ddim_takes_the_step_of_diffusers_with_eta_and_given_noise(load: Any) -> None:
    """Every step of the schedule that stable diffusion ships, offset 1 and a final alpha of the first timestep."""
    from diffusers import DDIMScheduler

    model = load("sd")
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="leading", steps_offset=1)
    ddim = model.solver(10)
    timesteps, grid = model.grid(10)
    assert timesteps.tolist() == ddim.timesteps.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    x, eps, z = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for n, t in enumerate(timesteps):
        c, c_next = grid[[n] * 2], grid[[n + 1] * 2]
        for eta in (0.3, 1.0):
            k, d = DDIM(eta=eta)(c, c_next)
            x0, noise = path.split("epsilon", eps, x, c)
            ours = path.step_mean(x0, noise, c_next, k) + d.view(-1, 1, 1, 1) * z
            wanted = ddim.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert rules.trainable(DDIM(eta=1.0), grid) == 10  # the last ends at alpha of timestep 0, not at clean data


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_cps_leaves_exactly_sigma_on_both_paths(level: float) -> None:
    """In samples: known x0 and eps, exact prediction, a million fresh draws."""
    g = torch.Generator().manual_seed(0)
    for c, c_next in (
        (Coeffs(torch.tensor([0.3]), torch.tensor([0.7])), Coeffs(torch.tensor([0.4]), torch.tensor([0.6]))),
        (Coeffs(torch.tensor([0.6]), torch.tensor([0.8])), Coeffs(torch.tensor([0.8]), torch.tensor([0.6]))),
    ):
        k, d = CPS(noise_level=level)(c, c_next)
        eps, z = torch.randn(2, 1, 1_000_000, generator=g, dtype=torch.double).unbind()
        x_next = path.step_mean(torch.full_like(eps, 2.0), eps, c_next, k) + d * z
        assert x_next.mean().item() == pytest.approx(2 * c_next.alpha.item(), abs=5e-3)  # 5 errors of 0.0006 and more
        assert x_next.std().item() == pytest.approx(0.6, rel=5e-3)
        torch.testing.assert_close(rules.noise_after(CPS(noise_level=level), c, c_next), c_next.sigma)


@given(eta=st.floats(0, 1), s=st.floats(0.05, 0.99), share=st.floats(0.01, 0.99))
def test_ddim_leaves_exactly_sigma_and_adds_the_posterior_variance(eta: float, s: float, share: float) -> None:
    """At eta 1 of q(x_s | x_t, x0) (Ho et al. 2020, eq. 7): beta_tilde = (1 - abar_s) / (1 - abar_t) beta."""
    s_next = s * share
    c, c_next = (Coeffs((1 - u**2).sqrt(), u) for u in torch.tensor([[s], [s_next]], dtype=torch.double))
    assert rules.noise_after(DDIM(eta=eta), c, c_next).item() == pytest.approx(s_next)
    beta = 1 - (1 - s**2) / (1 - s_next**2)
    assert DDIM(eta=eta)(c, c_next)[1].item() ** 2 == pytest.approx(eta**2 * s_next**2 / s**2 * beta)


@given(a=st.floats(0.1, 1.5), s=st.floats(0.05, 0.95), share=st.floats(0.05, 0.95))
def test_flow_sde_adds_more_noise_than_its_schedule_says(a: float, s: float, share: float) -> None:
    """Of the published step the signal is exactly 1 - sigma_next, the noise sqrt(sigma_next^2 + (d^2 / 2 sigma)^2 +
    d^2 (1 - sigma_next / sigma)).
    """
    s_next = s * share
    x_of = published("flow_sde", a, s, s_next, first=s_next)
    signal, std = x_of(1 - s, -1.0)  # x0 = 1 and eps = 0: x = alpha, v = eps - x0
    k, _ = x_of(s, 1.0)
    assert signal == pytest.approx(1 - s_next)
    c, c_next = (Coeffs(1 - u, u) for u in torch.tensor([[s], [s_next]], dtype=torch.double))
    total = rules.noise_after(FlowSDE(noise_level=a), c, c_next).item()
    assert total == pytest.approx(np.hypot(k, std))
    assert total**2 == pytest.approx(s_next**2 + (std**2 / (2 * s)) ** 2 + std**2 * (1 - share))
    assert total > s_next


# --- the grid and the solvers -----------------------------------------------------------------------------------------


@every_family
def test_the_grid_is_the_stock_schedulers(load: Any, name: str) -> None:
    model = real_schedule(load(name))
    timesteps, grid = model.grid(5)
    solver = model.solver(5)
    assert timesteps.tolist() == solver.timesteps.tolist()
    assert len(grid.alpha) == 6
    if name in FLOW:
        assert torch.equal(grid.sigma, solver.sigmas)
        assert torch.equal(grid.alpha, 1 - solver.sigmas)
        assert timesteps.dtype == torch.float32
        assert torch.equal(timesteps, 1000 * solver.sigmas[:-1])  # never rounded to whole numbers
    else:
        abar = solver.alphas_cumprod.double()
        end = abar[0] if name == "sd" else torch.ones(())  # set_alpha_to_one is false there
        wanted = torch.cat([abar[timesteps.long()], end.double()[None]])
        torch.testing.assert_close(grid.alpha, wanted.sqrt().float())
        torch.testing.assert_close(grid.sigma, (1 - wanted).sqrt().float())
    noisy = 5 if name == "sd" else 4  # a step onto clean data has no density worth training on
    assert [rules.trainable(rule, grid) for rule in (stochastic(name), CPS(), CPS(noise_level=0), ODE())] == [noisy] * 2 + [
        0
    ] * 2


def test_a_scheduler_that_clips_is_refused(load: Any) -> None:
    from diffusers import DDIMScheduler

    from diffalign.errors import ModelError

    model = load("sd")
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=True)
    with pytest.raises(ModelError, match="clip_sample"):
        model.grid(4)


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_dpm_solver_is_that_of_diffusers(kind: str, steps: int) -> None:
    """A network that is not linear in x, the solver's own noise levels, from the first step to clean data."""
    from diffusers import DPMSolverMultistepScheduler

    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": kind}
    scheduler = DPMSolverMultistepScheduler(**(flow if kind == "flow" else noise))
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    alpha, sigma = (1 - sigmas, sigmas) if kind == "flow" else (1 / (sigmas**2 + 1).sqrt(), sigmas / (sigmas**2 + 1).sqrt())
    x = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = None
    for n, t in enumerate(scheduler.timesteps):
        c, c_next = (Coeffs(alpha[[m] * 2], sigma[[m] * 2]) for m in (n, n + 1))
        x0, _ = path.split(kind, torch.tanh(x + n / steps), x, c)
        x = dpm_2m(x, x0, c, c_next, before)
        before = (x0, c, torch.ones(2, dtype=torch.bool))
        theirs = scheduler.step(torch.tanh(theirs + n / steps), t, theirs).prev_sample
        torch.testing.assert_close(x, theirs, rtol=2e-4, atol=2e-4)


def test_dpm_solver_starts_at_pure_noise_and_ends_at_clean_data() -> None:
    sigma = torch.tensor([1.0, 0.7, 0.3, 0.0])
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    target, before = torch.full_like(x, 0.5), None
    for n in range(3):
        c, c_next = (Coeffs(1 - s, s) for s in (sigma[[n] * 2], sigma[[n + 1] * 2]))
        x = dpm_2m(x, target, c, c_next, before)
        before = (target, c, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(x, target)


def test_dpm_solver_is_of_second_order() -> None:
    """Halving the steps on Gaussian data, whose exact ODE is known, divides the error by four; of Euler's by two."""

    def error(steps: int, second: bool) -> float:
        s = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.double)
        std = 0.5  # data N(0, 0.25): the ODE keeps x / sqrt(alpha^2 std^2 + sigma^2)
        spread = ((1 - s) ** 2 * std**2 + s**2).sqrt()
        x, before = spread[:1].clone(), None
        for n in range(steps):
            c, c_next = (Coeffs(1 - u, u) for u in (s[n : n + 1], s[n + 1 : n + 2]))
            x0 = (1 - s[n]) * std**2 / spread[n] ** 2 * x
            x = dpm_2m(x, x0, c, c_next, before)
            before = (x0, c, torch.tensor([second]))
        return abs((x - spread[-1]).item())

    assert error(512, True) / error(1024, True) == pytest.approx(4, rel=0.1)
    assert error(512, False) / error(1024, False) == pytest.approx(2, rel=0.1)


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@every_family
def test_without_noise_the_images_are_those_of_sampling(load: Any, name: str, guidance: float) -> None:
    """With the stock scheduler, from the same noise, whatever the rule."""
    model = real_schedule(load(name))
    wanted = sample(model, ITEMS, RolloutSettings(num_inference_steps=5, guidance_scale=guidance), epoch_seed(3, 1), once=True)
    for rule in (ODE(), CPS(noise_level=0), *((FlowSDE(noise_level=0), DanceSDE(eta=0)) if name in FLOW else (DDIM(),))):
        made = rollout(model, ITEMS, RolloutSettings(num_inference_steps=5, guidance_scale=guidance, rule=rule), 3, 1)
        assert made.steps.shape == (4, 0)
        same(to_uint8(model.decode(made.x0)), wanted, 2.0)  # the arithmetic of a step is rounded in another order


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@every_family
def test_the_ratio_to_itself_is_one_bit_for_bit(load: Any, name: str, guidance: float) -> None:
    """At the rollout's own batch, with a gradient, and windows that differ between the prompts of a batch."""
    model = load(name)
    settings = RolloutSettings(
        num_inference_steps=5, guidance_scale=guidance, rule=stochastic(name), window=Random(size=2, per="group")
    )
    cond, negative = conditions(model, ITEMS, settings)
    steps = check(model, settings)
    epoch = next(n for n in range(99) if len({settings.window.start(n, steps, 0, p.id) for p in (A, B)}) == 2)
    made = rollout(model, ITEMS, settings, 0, epoch, cond, negative)
    assert made.std.min() > 0
    for slot in range(2):
        mean = replay(model, made, slot, cond, settings, negative)
        assert torch.equal(mean, made.mean[:, slot])
        assert path.log_ratio(mean, made.mean[:, slot], made.x_next[:, slot], made.std[:, slot]).eq(0).all()
        mean.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.named_weights.trainable().values())


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_from_pure_noise_too(tiny_v: Path, tmp_path: Path, zero_snr: bool) -> None:
    """A terminal signal-to-noise ratio of zero: alpha is 0 at the first step, for the rules and both solvers."""
    import json
    import shutil

    from diffalign.building import build_model
    from diffalign.models import ModelSpec

    folder = shutil.copytree(tiny_v, tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": zero_snr}))
    model = build_model(ModelSpec(path=str(folder), lora=RANK_2))
    _, grid = model.grid(5)
    assert grid.alpha[0].eq(0) == zero_snr
    for rule, solver in ((DDIM(eta=1), "euler"), (CPS(noise_level=0.5), "dpm++")):
        settings = RolloutSettings(num_inference_steps=5, rule=rule, solver=solver, window=Fixed(begin=0, size=2))
        cond, _ = conditions(model, ITEMS, settings)
        made = rollout(model, ITEMS, settings, 0, 0, cond)
        assert all(t.isfinite().all() for t in tensors(made))
        assert all(torch.equal(replay(model, made, n, cond, settings), made.mean[:, n]) for n in range(2))
    settings = RolloutSettings(num_inference_steps=5, rule=ODE())
    made = rollout(model, ITEMS, settings, 0, 0)
    same(to_uint8(model.decode(made.x0)), sample(model, ITEMS, settings, epoch_seed(0, 0), once=True), 2.0)
    second = rollout(model, ITEMS, settings.model_copy(update={"solver": "dpm++"}), 0, 0)
    assert second.x0.isfinite().all()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_gradient_checkpointing_replays_the_same_bits(load: Any, name: str) -> None:
    model = load(name, gradient_checkpointing=True)
    model.net.train()
    settings = RolloutSettings(num_inference_steps=4, rule=stochastic(name), guidance_scale=2.0)
    cond, negative = conditions(model, ITEMS, settings)
    made = rollout(model, ITEMS, settings, 0, 0, cond, negative)
    mean = replay(model, made, 1, cond, settings, negative)
    assert torch.equal(mean, made.mean[:, 1])
    mean.sum().backward()


def test_a_transition_is_the_density_that_is_trained(load: Any) -> None:
    """(x_next - mean) / std of the trained steps is the standard normal noise that was drawn, and states chain."""
    model = load("sd3")
    settings = RolloutSettings(num_inference_steps=8, rule=CPS(noise_level=0.8))
    items = [Item(A, k) for k in range(16)]
    made = rollout(model, items, settings, 0, 0)
    assert made.steps.tolist() == [list(range(7))] * 16  # the last has no noise
    assert torch.equal(made.x[:, 1:], made.x_next[:, :-1])
    assert made.states.shape[1] == made.mean.shape[1] + 1  # each state is kept once
    z = (made.x_next - made.mean) / made.std.view(16, 7, 1, 1, 1)
    assert z.mean().item() == pytest.approx(0, abs=4 / z.numel() ** 0.5)
    assert z.square().mean().item() == pytest.approx(1, abs=4 * (2 / z.numel()) ** 0.5)
    flat = z.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(7)).abs().max() < 4.5 / flat.shape[1] ** 0.5  # fresh noise in each step


def test_states_are_those_of_the_window_alone(load: Any) -> None:
    """Before the window the ODE, from its end on the ODE again; steps and levels are the window's."""
    model = load("sd3")
    base = {"num_inference_steps": 6, "rule": FlowSDE()}
    made = rollout(model, ITEMS, RolloutSettings(**base, window=Fixed(begin=2, size=2)), 0, 0)
    assert made.steps.tolist() == [[2, 3]] * 4
    timesteps, grid = model.grid(6)
    assert torch.equal(made.t, timesteps[2:4].expand(4, 2))
    assert torch.equal(made.c.sigma, grid.sigma[2:4].expand(4, 2))
    assert torch.equal(made.c_next.alpha, grid.alpha[3:5].expand(4, 2))
    plain = rollout(model, ITEMS, RolloutSettings(num_inference_steps=6, rule=CPS(noise_level=1e-6)), 0, 0)
    torch.testing.assert_close(made.x[:, 0], plain.x[:, 2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made.x[:, 1], plain.x[:, 3], atol=1e-2)


def test_members_of_a_group_share_their_window(load: Any) -> None:
    model = load("sd")
    items = [Item(p, k) for k in range(3) for p in (A, B)]
    settings = RolloutSettings(num_inference_steps=6, rule=DDIM(eta=1), window=Random(size=2, per="group"))
    windows = set()
    for epoch in range(6):
        steps = rollout(model, items, settings, 0, epoch).steps.tolist()
        assert steps[0] == steps[2] == steps[4]
        assert steps[1] == steps[3] == steps[5]
        windows |= {tuple(s) for s in steps}
    assert len(windows) > 2


def test_noise_belongs_to_seed_epoch_prompt_and_k(load: Any) -> None:
    """Neither order nor company nor another epoch before changes it; each of the four does."""
    model = load("sd3")
    settings = RolloutSettings(num_inference_steps=3, rule=FlowSDE())

    def noise(items: list[Item], seed: int = 0, epoch: int = 0) -> dict[Item, torch.Tensor]:
        made = rollout(model, items, settings, seed, epoch)
        first, fresh = made.x[:, :1], (made.x_next - made.mean) / made.std.view(*made.std.shape, 1, 1, 1)
        return dict(zip(items, torch.cat([first, fresh], 1), strict=True))

    wanted = noise(ITEMS)
    for other in (noise(ITEMS[::-1]), noise(ITEMS[:2]), noise(ITEMS[2:])):
        for item, z in other.items():
            torch.testing.assert_close(z, wanted[item], rtol=1e-3, atol=1e-3)  # fresh noise is a difference over std
            assert torch.equal(z[0], wanted[item][0])
    later = noise(ITEMS[1:2], epoch=7)  # of an epoch that none went before
    seen = [wanted, noise(ITEMS, seed=1), noise(ITEMS, epoch=7)]
    assert torch.equal(later[ITEMS[1]][0], seen[2][ITEMS[1]][0])
    first = torch.stack([z for part in seen for z in part.values()])[:, 0].flatten(1)
    assert (torch.corrcoef(first) - torch.eye(12)).abs().max() < 0.5  # 256 values each, a deviation of 0.06


def test_one_latent_for_all_images_of_a_prompt(load: Any) -> None:
    model = load("sd3")
    settings = RolloutSettings(num_inference_steps=3, rule=FlowSDE())
    shared = rollout(model, ITEMS, settings.model_copy(update={"same_noise": True}), 0, 0)
    own = rollout(model, ITEMS, settings, 0, 0)
    assert torch.equal(shared.x[0, 0], shared.x[1, 0])
    assert torch.equal(shared.x[0, 0], own.x[0, 0])
    assert not torch.equal(shared.x[0, 0], shared.x[2, 0])
    z = [(made.x_next[:, 0] - made.mean[:, 0]) / made.std[:, 0].view(-1, 1, 1, 1) for made in (shared, own)]
    torch.testing.assert_close(z[0], z[1], rtol=1e-3, atol=1e-3)  # only the start is shared
    assert not torch.allclose(z[0][0], shared.x[0, 0], atol=0.1)


@pytest.mark.slow
def test_the_same_blocks_give_the_same_bytes_in_two_processes(folder_of: Any, tmp_path: Path) -> None:
    """Four blocks by one process, and two by each of two."""
    import subprocess
    import sys

    code = """
import sys, torch
torch.set_num_threads(1)
from diffalign.building import build_model
from diffalign.data.prompts import Prompt
from diffalign.models import ModelSpec
from diffalign.rollout import RolloutSettings, rollout
from diffalign.sampling import Item
from diffalign.scoring import quiet
quiet()
out, blocks, folders = sys.argv[1], [int(n) for n in sys.argv[2]], sys.argv[3:]
settings = RolloutSettings(num_inference_steps=4, guidance_scale=2, window={"type": "random", "size": 2, "per": "group"})
items = [Item(Prompt(p), k) for p in ("a red circle", "a blue cross") for k in range(4)]
for f, folder in enumerate(folders):
    torch.manual_seed(len(blocks))
    model = build_model(ModelSpec(path=folder))
    for n in blocks:
        made = rollout(model, items[2 * n : 2 * n + 2], settings, 5, 2)
        torch.save([made.x0, made.x, made.x_next, made.mean, made.t, made.std, made.steps], f"{out}-{f}-{n}.pt")
"""
    folders = [str(folder_of(name)) for name in ("sd", "sd3")]
    for out, blocks in (("one", "0123"), ("two", "02"), ("two", "13")):
        command = [sys.executable, "-c", code, str(tmp_path / out), blocks, *folders]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for part in ("0-0", "0-1", "0-2", "0-3", "1-0", "1-1", "1-2", "1-3"):
        made = [torch.load(tmp_path / f"{out}-{part}.pt", weights_only=True) for out in ("one", "two")]
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_prompts_are_encoded_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("sd")
    asked: list[list[str | None]] = []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: (asked.append(list(prompts)), encode(prompts))[1])
    rollout(model, ITEMS, RolloutSettings(num_inference_steps=2, guidance_scale=2, rule=ODE()), 0, 0)
    assert asked == [PROMPTS, [None]]


def test_rows_and_devices(load: Any) -> None:
    made = rollout(load("sd"), ITEMS, RolloutSettings(num_inference_steps=3, rule=DDIM(eta=1)), 0, 0)
    part = made[[2, 0]]
    assert len(part) == 2
    assert torch.equal(part.c.alpha, made.c.alpha[[2, 0]])
    assert torch.equal(part.mean, made.mean[[2, 0]])
    assert equal(made.to(torch.device("cpu")), made)
    assert made.t.dtype == torch.int64
    assert {t.dtype for t in tensors(made)} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_dpm_solver_in_rollouts_takes_the_stock_solvers_steps(load: Any, name: str) -> None:
    """Around no window: the images are those of diffusers' DPM-Solver++ on the same noise levels."""
    from diffusers import DPMSolverMultistepScheduler

    model, steps = load(name), 6
    timesteps, grid = model.grid(steps)
    settings = RolloutSettings(num_inference_steps=steps, rule=ODE(), solver="dpm++")
    made = rollout(model, ITEMS, settings, 0, 0)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    config = flow if name == "sd3" else {**model.scheduler.config, "final_sigmas_type": "sigma_min"}
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sigmas = grid.sigma / (1 if name == "sd3" else grid.alpha)
    scheduler.sigmas = sigmas.where(sigmas < 1, 1 - 1e-7) if name == "sd3" else sigmas  # theirs has no log of 0
    scheduler.timesteps, scheduler.num_inference_steps = timesteps, steps
    cond, _ = conditions(model, ITEMS, settings)
    from diffalign.sampling import generators

    x = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators(ITEMS, epoch_seed(0, 0))])
    with torch.no_grad():
        for t in timesteps:
            x = scheduler.step(model.predict(x, t.expand(4), cond), t, x).prev_sample
    torch.testing.assert_close(made.x0, x, rtol=1e-3, atol=1e-3)
    euler = rollout(model, ITEMS, settings.model_copy(update={"solver": "euler"}), 0, 0)
    assert not torch.allclose(made.x0, euler.x0, atol=1e-3)


def test_dpm_solver_starts_afresh_after_the_window(load: Any) -> None:
    """What was predicted before noise was added says nothing of the slope behind it. Of six steps the last two then are of
    first order, as Euler's, which go on from the same state; the one before the window, the third, is not.
    """
    model = load("sd3")
    base = {"num_inference_steps": 6, "rule": FlowSDE(), "window": Fixed(begin=3, size=1)}
    made = rollout(model, ITEMS, RolloutSettings(**base, solver="dpm++"), 0, 0)
    x, (timesteps, grid), cond = made.x_next[:, 0], model.grid(6), model.encode_prompts([i.prompt.text for i in ITEMS])
    with torch.no_grad():
        for n in (4, 5):
            x = x + (grid.sigma[n + 1] - grid.sigma[n]) * model.predict(x, timesteps[n].expand(4), cond)
    torch.testing.assert_close(made.x0, x, rtol=1e-4, atol=1e-4)
    euler = rollout(model, ITEMS, RolloutSettings(**base), 0, 0)
    assert not torch.allclose(made.x[:, 0], euler.x[:, 0], atol=1e-3)


def test_compressed_rollouts_make_fewer_steps_and_keep_the_window(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("sd3")
    base = {"num_inference_steps": 12, "rule": FlowSDE(), "window": Progressive(size=2), "solver": "dpm++"}
    full = rollout(model, ITEMS, RolloutSettings(**base), 0, 0)
    levels: list[float] = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda x, t, *a: (levels.append(t[0].item()), predict(x, t, *a))[1])
    short = rollout(model, ITEMS, RolloutSettings(**base, compress=0.4), 0, 0)
    assert len(levels) == 2 + 4  # the window, and 0.4 of the 10 steps after it
    assert set(levels) <= set(model.grid(12)[0].tolist())  # on the stock schedule
    assert evaluations(model, ITEMS, RolloutSettings(**base, compress=0.4), 0, 0) == 6
    assert evaluations(model, ITEMS, RolloutSettings(**base), 0, 0) == 12
    levels.clear()
    seen: list[torch.Tensor] = []
    made = branch(model, ITEMS, RolloutSettings(**base, compress=0.4), 0, 0, 3, lambda rows, slots, x0, t: seen.append(x0))
    assert made.passes == 4 * 6 + 4 * 3 * 2  # and a preview of three candidates of each trained step
    assert len(levels) == 6 + 2
    for a, b in zip(tensors(full)[1:], tensors(short)[1:], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(full.x0, short.x0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"window": {"type": "fixed", "begin": 4, "size": 2}, "num_inference_steps": 5}, "does not fit"),
        ({"compress": 0.4}, "dpm"),
        ({"compress": 0.4, "solver": "dpm++", "window": {"type": "random", "per": "group"}}, "one window"),
        ({"compress": 0.4, "solver": "dpm++"}, "window all leaves none"),
        ({"window": {"type": "rnadom"}}, "did you mean 'random'"),
        ({"rule": {"type": "cps", "noise_level": 2}}, "noise_level"),
    ],
)
def test_settings_that_cannot_run_are_refused_at_load(bad: dict[str, Any], said: str) -> None:
    from diffalign.spec import validate

    with pytest.raises(ConfigError, match=said):
        validate(RolloutSettings, bad)


def test_rules_of_another_path_are_refused(load: Any) -> None:
    with pytest.raises(ConfigError, match="use ode, flow_sde, dance_sde, cps"):
        check(load("sd3"), RolloutSettings(rule=DDIM(eta=1)))
    with pytest.raises(ConfigError, match="use ddim, ode, cps"):
        check(load("sd"), RolloutSettings(rule=FlowSDE()))


def test_windows_of_steps_without_density_are_refused(load: Any) -> None:
    last = {"num_inference_steps": 5, "window": Fixed(begin=4, size=1)}
    with pytest.raises(ConfigError, match="no density"):
        check(load("sd3"), RolloutSettings(**last, rule=FlowSDE()))
    assert check(load("sd"), RolloutSettings(**last, rule=DDIM(eta=1))) == 5
    with pytest.raises(ConfigError, match="no density"):
        check(load("sd"), RolloutSettings(**last, rule=DDIM(eta=0)))


def test_a_rule_says_whether_it_adds_noise() -> None:
    quiet = [ODE(), DDIM(), FlowSDE(noise_level=0), DanceSDE(eta=0), CPS(noise_level=0)]
    loud = [DDIM(eta=0.1), FlowSDE(), DanceSDE(), CPS()]
    assert [rules.noisy(rule) for rule in quiet + loud] == [False] * 5 + [True] * 4


def test_distilled_guidance_is_a_number_and_not_two_passes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = load("flux-dev"), RolloutSettings(num_inference_steps=3, guidance_scale=3.5, rule=FlowSDE())
    with pytest.raises(ConfigError, match="guidance_scale is that number"):
        check(model, settings, [Prompt("a red circle", "a cross")])
    sizes: list[int] = []
    forward = model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda x, **k: (sizes.append(len(x)), forward(x, **k))[1])
    assert conditions(model, ITEMS, settings)[1] is None
    rollout(model, ITEMS, settings, 0, 0)
    assert sizes == [4, 4, 4]
    assert check(load("flux-schnell"), settings, [Prompt("a red circle", "a cross")]) == 2


# --- preflight --------------------------------------------------------------------------------------------------------


def test_preflight_is_exact_where_nothing_differs(load: Any) -> None:
    settings = RolloutSettings(num_inference_steps=4, guidance_scale=2, rule=FlowSDE(), window=Fixed(begin=1, size=2))
    found = preflight(load("sd3"), ITEMS, settings, 0, micro_batch=4)
    assert found.ratio_error == 0
    assert found.trained == (1, 2)
    assert len(found.std) == len(found.noise) == len(found.sigma_next) == 4
    sigma = load("sd3").grid(4)[1].sigma.double().numpy()
    for n in range(4):
        mean, std = published("flow_sde", 0.7, sigma[n], sigma[n + 1], first=sigma[1])(sigma[n], 1.0)  # x0 = 0, eps = 1
        assert found.std[n] == pytest.approx(std, rel=1e-4)
        assert found.noise[n] == pytest.approx(np.hypot(mean, std), rel=1e-4)
    assert found.excess == pytest.approx(max(found.noise[n] - found.sigma_next[n] for n in (1, 2)))
    assert found.rollout_seconds > 0
    assert found.replay_seconds > 0


def test_preflight_samples_as_sampling_and_replays_as_training(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare network in eval mode without gradients; then the one that is trained, in train mode, with them. Every step
    that the window reaches in some epoch is among the trained ones.
    """
    model, seen = load("sd"), []
    predict, inside = model.predict, [False]

    @contextmanager
    def bare() -> Any:
        inside[0] = True
        yield
        inside[0] = False

    def watched(*a: Any) -> torch.Tensor:
        seen.append((inside[0], model.net.training, torch.is_grad_enabled()))
        return predict(*a)

    monkeypatch.setattr(model, "predict", watched)
    model.net.eval()
    settings = RolloutSettings(num_inference_steps=6, rule=DDIM(eta=1), window=Random(size=2, low=1, high=5))
    found = preflight(model, ITEMS, settings, 0, 2, bare=bare)
    assert found.trained == (1, 2, 3, 4)
    assert seen == [(True, False, False)] * 6 + [(False, True, True)] * 4 * 2
    assert not model.net.training
    compressed = RolloutSettings(num_inference_steps=6, window=Progressive(size=2), solver="dpm++", compress=0.4)
    assert preflight(load("sd3"), ITEMS, compressed, 0, 4).trained == (0, 1, 2, 3, 4)  # the last is onto clean data


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_leverage_is_the_score_of_a_step_by_autograd(kind: Any) -> None:
    """d log N(x_next; mean, std^2) / d prediction is leverage times the drawn noise."""
    s, s_next = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.5, 0.2, 0.02]).double()
    a, a_next = (1 - s, 1 - s_next) if kind == "flow" else ((1 - s**2).sqrt(), (1 - s_next**2).sqrt())
    c, c_next = Coeffs(a, s), Coeffs(a_next, s_next)
    rule = FlowSDE() if kind == "flow" else DDIM(eta=1)
    prediction = torch.randn(3, 1, dtype=torch.double, requires_grad=True)
    k, std = rule(c, c_next)
    mean = path.step_mean(*path.split(kind, prediction, torch.randn(3, 1).double(), c), c_next, k)
    z = torch.randn(3, 1).double()
    log_p = torch.distributions.Normal(mean, std[:, None]).log_prob(mean.detach() + std[:, None] * z)
    (score,) = torch.autograd.grad(log_p.sum(), prediction)
    torch.testing.assert_close(leverage(rule, kind, c, c_next), (score / z).abs()[:, 0])


def test_ddim_with_eta_1_pulls_alike_but_at_the_last_step() -> None:
    """On the built-in world's schedule: near 1 at nine steps, and 11.7 at the last, whose noise is 0.029 of the image."""
    from diffalign.building import build_model
    from diffalign.models import ModelSpec

    grid = build_model(ModelSpec(path="shapes-unet")).grid(10)[1]
    pull = leverage(DDIM(eta=1), "epsilon", grid[:-1], grid[1:])
    abar = (grid.alpha.double() ** 2).numpy()
    a, b = abar[:-1], abar[1:]  # the posterior of DDPM: mu = ... - sqrt(b/a) (1 - a/b) / sqrt(1 - a) eps
    wanted = np.sqrt(b / a) * (1 - a / b) / np.sqrt(1 - a) / np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    np.testing.assert_allclose(pull, wanted, rtol=1e-5)
    assert pull[:-1].max() < 2
    assert round(pull[-1].item(), 1) == 11.7  # as docs/rollouts.md says, and of the squares
    assert round((pull[-1] ** 2 / pull.square().sum()).item(), 3) == 0.919


def test_preflight_sees_that_training_has_another_precision(load: Any) -> None:
    """fp32 in the rollout and bf16 in the replay is found; bf16 in both is exact."""
    settings = RolloutSettings(num_inference_steps=4, rule=CPS(noise_level=0.5))
    model = load("sd3")

    half = iter([False] + [True] * 9)
    mixed = preflight(model, ITEMS, settings, 0, 4, lambda: torch.autocast("cpu", torch.bfloat16, enabled=next(half)))
    assert mixed.ratio_error > 1e-6
    assert preflight(model, ITEMS, settings, 0, 4, lambda: torch.autocast("cpu", torch.bfloat16)).ratio_error == 0


def test_preflight_does_not_hide_what_is_not_finite(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("sd3")
    predict = model.predict
    broken = iter([1.0] * 4 + [torch.nan] * 9)
    monkeypatch.setattr(model, "predict", lambda *a: predict(*a) * next(broken))
    assert preflight(model, ITEMS, RolloutSettings(num_inference_steps=4), 0, 4).ratio_error == float("inf")


@pytest.mark.parametrize(("world", "rule"), [("shapes-unet", DDIM(eta=1)), ("shapes-dit", FlowSDE())])
def test_the_built_in_worlds_roll_out_and_replay(world: str, rule: rules.Rule) -> None:
    """With trained weights: exact at the rollout's batch, and without noise the images are those of sampling."""
    from diffalign.building import build_model
    from diffalign.models import ModelSpec

    model = build_model(ModelSpec(path=world, lora=RANK_2))
    settings = RolloutSettings(num_inference_steps=10, guidance_scale=2.0, rule=rule, window=Fixed(begin=1, size=2))
    assert preflight(model, ITEMS, settings, 0, micro_batch=4).ratio_error == 0
    made = rollout(model, ITEMS, RolloutSettings(num_inference_steps=10, guidance_scale=2.0, rule=ODE()), 0, 0)
    same(to_uint8(model.decode(made.x0)), sample(model, ITEMS, settings, epoch_seed(0, 0), once=True), 2.0)


# --- oversample, then select ------------------------------------------------------------------------------------------


def brightness(images: torch.Tensor, items: Any) -> torch.Tensor:
    return images.float().flatten(1).mean(1)


@pytest.mark.parametrize("by", ["best", "worst", "extremes"])
def test_preselected_seeds_are_those_of_the_previews(load: Any, by: Any) -> None:
    """Against the images that sampling makes from the same seeds, sorted by hand."""
    model, settings = load("sd"), RolloutSettings(num_inference_steps=10, batch_size=3)
    kept = preselect(model, [A, B], brightness, settings, 0, 2, candidates=8, keep=3, steps=5, by=by)
    for prompt, chosen in zip((A, B), kept, strict=True):
        items = [Item(prompt, k) for k in range(8)]
        order = brightness(sample(model, items, settings.model_copy(update={"num_inference_steps": 5}), epoch_seed(0, 2)), 0)
        rank = order.argsort(descending=True).tolist()
        assert chosen == tuple(sorted({"best": rank[:3], "worst": rank[-3:], "extremes": rank[:2] + rank[-1:]}[by]))
    assert kept == preselect(model, [B, A], brightness, settings, 0, 2, candidates=8, keep=3, steps=5, by=by)[::-1]


def test_preselection_keeps_what_has_no_reward_last(load: Any) -> None:
    def broken(images: torch.Tensor, items: Any) -> torch.Tensor:
        return torch.tensor([torch.nan if item.k % 2 else float(item.k) for item in items])

    model, settings = load("sd"), RolloutSettings()
    assert preselect(model, [A], broken, settings, 0, 0, candidates=6, keep=2, steps=1) == [(0, 4)]
    assert preselect(model, [A], broken, settings, 0, 0, candidates=6, keep=4, steps=1) == [(0, 1, 2, 4)]
    with pytest.raises(ConfigError, match="cannot keep 7 of 6"):
        preselect(model, [A], broken, settings, 0, 0, candidates=6, keep=7)
    with pytest.raises(ConfigError, match="same_noise"):
        preselect(model, [A], broken, RolloutSettings(same_noise=True), 0, 0, candidates=6, keep=2)
