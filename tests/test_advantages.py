"""Advantages against numpy, identities between methods, and what must not be amplified, lost or made up."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import rankdata

from diffalign import advantages as adv
from diffalign.advantages import Advantages, Keep
from diffalign.errors import ConfigError
from diffalign.scorers import combine

G, K = 6, 5


def rewards(seed: int = 0, groups: int = G, size: int = K) -> torch.Tensor:
    return torch.randn(groups, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def values(r: Any, **settings: Any) -> torch.Tensor:
    return Advantages(**{"clip": None, **settings})({"r": torch.as_tensor(r)}).values


# --- against the group -----------------------------------------------------------------------------------------------


def test_the_defaults_are_flow_grpos() -> None:
    """Mean of the group, deviation of the whole batch in numpy, clipped at 5."""
    r = rewards() ** 3
    n = r.numpy()
    wanted = (n - n.mean(1, keepdims=True)) / np.std(n)
    assert np.abs(wanted).max() > 2
    np.testing.assert_allclose(values(r), wanted, rtol=1e-12)
    np.testing.assert_allclose(values(r, clip=1.5), np.clip(wanted, -1.5, 1.5), rtol=1e-12)


def test_group_deviation_and_none() -> None:
    r = rewards()
    n = r.numpy()
    centred = n - n.mean(1, keepdims=True)
    np.testing.assert_allclose(values(r, std="group"), centred / n.std(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(values(r, std="none"), centred, rtol=1e-12)


@given(st.integers(2, 12), st.sampled_from(["global", "none", "group"]))
def test_leave_one_out_is_k_over_k_minus_1_times_the_mean_baseline(k: int, std: str) -> None:
    r = rewards(k, size=k)
    loo, mean = values(r, baseline="leave_one_out", std=std), values(r, std=std)
    torch.testing.assert_close(loo, k / (k - 1) * mean)


def test_leave_one_out_is_against_the_others() -> None:
    r = rewards()
    others = [[(r[g].sum() - r[g, k]) / (K - 1) for k in range(K)] for g in range(G)]
    torch.testing.assert_close(values(r, baseline="leave_one_out", std="none"), r - torch.tensor(others))


@given(st.floats(-1e3, 1e3), st.floats(0.1, 1e3))
def test_a_reward_may_be_moved_and_stretched(shift: float, scale: float) -> None:
    r = rewards()
    for std in ("global", "group"):
        torch.testing.assert_close(values(scale * r + shift, std=std), values(r, std=std), rtol=1e-6, atol=1e-6)


def test_a_group_without_differences_teaches_nothing_and_is_counted() -> None:
    r = rewards(groups=4).float()
    r[1] = 0.1 + 0.2  # not exact in binary
    r[3] = torch.tensor([7.0, 7.0, 7.0, 7.0, 7.0 + 4e-7])  # one ulp
    for settings in (
        {},
        {"std": "group"},
        {"baseline": "leave_one_out", "std": "group"},
        {"std": "none"},
        {"aggregate": "gdpo"},
    ):
        out = Advantages(**settings)({"r": r})
        assert out.flat.tolist() == [False, True, False, True]
        assert out.metrics["advantage/groups_flat"] == 0.5
        if settings.get("aggregate") != "gdpo":
            assert out.values[[1, 3]].abs().max() == 0
            assert out.metrics["advantage/samples_trained"] == 0.5
        assert (out.values[[0, 2]] != 0).all()


def test_noise_below_the_floor_is_not_amplified() -> None:
    """A deviation of 1e-6 over a floor of 1e-2 stays 1e-4, where a divisor of std + 1e-8 would make it 1."""
    r = 0.5 + 1e-6 * rewards()
    assert values(r, std="group", floor=1e-2).abs().max() < 5e-4
    assert values(r, std="global", floor=1e-2).abs().max() < 5e-4
    assert values(r, std="group", floor=1e-9).abs().max() > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"std": "group"}, {"aggregate": "gdpo"}, {"shaping": "win_rate"}])
def test_a_group_with_a_failed_reward_takes_no_part(bad: float, settings: Any) -> None:
    """The others are as if it had not been drawn, also where deviations are those of the batch."""
    r = rewards()
    r[2, 1] = bad
    r[4] = bad
    out = Advantages(**settings)({"r": r, "unused": r * torch.nan}, {"r": 1.0})
    lost = torch.tensor([False, False, True, False, True, False])
    assert torch.equal(~out.kept, lost[:, None].expand(G, K))
    assert (out.values[lost] == 0).all()
    torch.testing.assert_close(out.values[~lost], Advantages(**settings)({"r": r[~lost]}).values)
    assert out.metrics["advantage/rewards_failed"] == pytest.approx((1 + K) / (G * K))
    assert out.metrics["advantage/groups_dropped"] == pytest.approx(2 / G)
    assert out.metrics["advantage/groups_flat"] == 0


def test_three_good_rewards_of_four_keep_none() -> None:
    assert not Advantages()({"r": torch.tensor([[1.0, 2.0, math.nan, 4.0]])}).kept.any()


def test_one_sample_has_no_differences_to_lack() -> None:
    out = Advantages(baseline="running")({"r": torch.rand(4, 1)}, prompts=["a", "b", "c", "d"])
    assert "advantage/groups_flat" not in out.metrics


def test_all_rewards_failed() -> None:
    out = Advantages(aggregate="gdpo")({"r": torch.full((2, 3), math.nan)})
    assert not out.kept.any()
    assert out.values.abs().sum() == 0
    assert out.flat.all()


def test_counts_and_halves_are_rewards_too() -> None:
    torch.testing.assert_close(values(torch.tensor([[0, 1, 1]])), values(torch.tensor([[0.0, 1.0, 1.0]])))
    assert values(torch.tensor([[0.0, 1.0]]), std="none").dtype == torch.float32


def test_one_sample_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ConfigError, match="baseline: running"):
        Advantages()({"r": torch.rand(4, 1)})


# --- several rewards -------------------------------------------------------------------------------------------------


def test_gdpo_in_numpy() -> None:
    a, b = rewards(1), rewards(2) ** 3
    z = lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)  # noqa: E731
    summed = 2.0 * z(a.numpy()) + 0.5 * z(b.numpy())
    wanted = (summed - summed.mean()) / summed.std()
    out = Advantages(aggregate="gdpo", clip=None)({"a": a, "b": b, "unused": a * math.nan}, {"a": 2.0, "b": 0.5})
    np.testing.assert_allclose(out.values, wanted, rtol=1e-9)


def test_gdpo_does_not_see_the_scale_of_a_reward_and_the_sum_does() -> None:
    a, b = rewards(1), rewards(2)
    for aggregate, same in (("gdpo", True), ("sum", False)):
        both = [Advantages(aggregate=aggregate)({"a": a, "b": s * b + m}).values for s, m in ((1.0, 0.0), (100.0, 7.0))]
        assert torch.allclose(both[0], both[1], rtol=1e-6, atol=1e-9) == same


def test_a_reward_that_says_nothing_in_a_group_leaves_the_others_word() -> None:
    a, b = rewards(1), rewards(2)
    b[0] = 3.0
    out = Advantages(aggregate="gdpo")({"a": a, "b": b})
    assert not out.flat[0]
    assert (out.values[0].argsort() == a[0].argsort()).all()


def test_gdpo_learns_nothing_from_a_group_that_all_rewards_find_flat() -> None:
    """Not even the rounding of the batch's mean."""
    a, b = rewards(1), rewards(2)
    a[1], b[1] = 0.9, 0.25
    out = Advantages(aggregate="gdpo")({"a": a, "b": b})
    assert out.flat.tolist() == [n == 1 for n in range(len(a))]
    assert (out.values[1] == 0).all()
    assert out.metrics["advantage/samples_trained"] == pytest.approx(1 - 1 / len(a))


def test_weights_pick_and_a_wrong_name_is_said() -> None:
    a, b = rewards(1), rewards(2)
    torch.testing.assert_close(
        Advantages()({"a": a, "b": b}, {"a": 1.0, "b": -2.0}).values, Advantages()({"sum": a - 2 * b}).values
    )
    with pytest.raises(ConfigError, match="no reward is called 'c'"):
        Advantages()({"a": a}, {"c": 1.0})


# --- shaping ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_win_rates_see_order_alone(seed: int) -> None:
    r = rewards(seed)
    out = values(r, shaping="win_rate")
    for monotone in (lambda x: x**3, torch.sigmoid, lambda x: 5 * x - 100):
        torch.testing.assert_close(values(monotone(r), shaping="win_rate"), out)


def test_win_rate_in_scipy() -> None:
    r = torch.tensor([[0.1, 0.4, 0.4, 0.9, -1.0]], dtype=torch.double)
    ranks = (rankdata(r[0]) - 1) / 4  # ties share
    np.testing.assert_allclose(values(r, shaping="win_rate", std="group")[0], (ranks - ranks.mean()) / ranks.std())
    torch.testing.assert_close(adv.win_rate(adv.beats(r))[0], torch.as_tensor(ranks))


def test_par_is_the_preference_over_the_reference() -> None:
    r, ref = rewards(1), rewards(2, size=3)
    shaped = np.mean(1 / (1 + np.exp(-(r.numpy()[..., None] - ref.numpy()[:, None, :]))), -1)
    out = Advantages(shaping="par", clip=None)({"r": r}, reference={"r": ref}).values
    np.testing.assert_allclose(out, values(torch.as_tensor(shaped)), rtol=1e-9)
    failed = torch.cat([ref, torch.full((G, 2), math.inf)], 1)
    assert torch.equal(Advantages(shaping="par", clip=None)({"r": r}, reference={"r": failed}).values, out)
    with pytest.raises(ConfigError, match="reference"):
        Advantages(shaping="par")({"r": r})


def test_hinge_pays_nothing_beyond_the_target() -> None:
    out = values(torch.tensor([[0.0, 1.0, 2.0, 9.0]]), shaping="hinge", target=1.0, std="none")
    assert out[0].tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])


def test_scorers_combine_with_the_same_functions() -> None:
    for name in ("weighted", "zscore", "beats", "win_rate", "rank", "par", "hinge"):
        assert getattr(combine, name) is getattr(adv, name)


# --- which are trained on --------------------------------------------------------------------------------------------


def test_best_and_worst() -> None:
    r = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 1.0, 0.0, 1.0]])
    out = Advantages(keep=Keep(best=2, worst=1))({"r": r})
    assert out.kept.tolist() == [[False, True, False, True, True], [True, True, False, True, False]]
    whole = Advantages()({"r": r}).values
    assert torch.equal(out.values, torch.where(out.kept, whole, 0))  # against all of the group
    all_of_it = Advantages(keep=Keep(best=4, worst=4))({"r": r})
    assert all_of_it.kept.all()
    assert torch.equal(all_of_it.values, whole)


def test_extremes_never_pick_a_failed_reward() -> None:
    r = torch.tensor([[math.nan, 1.0, math.nan, 2.0]])
    assert adv.extremes(r, 1, 0).tolist() == [[False, False, False, True]]
    assert adv.extremes(r, 0, 1).tolist() == [[False, True, False, False]]
    assert adv.extremes(r, 3, 3).tolist() == [[False, True, False, True]]


def test_certainty_in_numpy() -> None:
    """PrefPaint: clamp(exp(-0.05 |z V^-1| + 0.7), 1, 2.21)."""
    z, v = rewards(1, 40, 6) * 30, rewards(2, 6, 6)
    v = v @ v.T + torch.eye(6)
    inverse = torch.linalg.inv(v)
    boundary = np.sqrt(((z.numpy() @ inverse.numpy()) ** 2).sum(1))
    wanted = np.clip(np.exp(-0.05 * boundary + 0.7), 1.0, 2.21)
    np.testing.assert_allclose(adv.certainty(z, inverse), wanted, rtol=1e-9)
    assert adv.certainty(z * 0, inverse).tolist() == pytest.approx([math.exp(0.7)] * 40)
    assert adv.certainty(z * 1e9, inverse).tolist() == [1.0] * 40


# --- the prompt's last rewards ---------------------------------------------------------------------------------------


class Tracker:
    """DDPO's, in numpy, from its description: a queue for each prompt, the batch until it holds min_count."""

    def __init__(self, size: int, least: int) -> None:
        self.size, self.least, self.seen = size, least, {}

    def update(self, prompts: Any, r: Any) -> Any:
        prompts, out = np.array(prompts), np.empty_like(r)
        for p in np.unique(prompts):
            here = r[prompts == p]
            queue = self.seen.setdefault(p, deque(maxlen=self.size))
            queue.extend(here)
            enough = len(queue) >= self.least
            mean, std = (np.mean(queue), np.std(queue)) if enough else (np.mean(r), np.std(r))
            out[prompts == p] = (here - mean) / std
        return out


RUNNING = {"baseline": "running", "std": "group", "clip": None, "buffer_size": 8, "min_count": 4}


@pytest.mark.parametrize("size", [1, 3])
def test_running_statistics_are_ddpos(size: int) -> None:
    spec, tracker, history = Advantages(**RUNNING), Tracker(8, 4), {}
    for step in range(9):
        prompts = [["a red circle", "two squares", "a", "a"][(step + i) % 4] for i in range(3)]
        r = rewards(step, 3, size)
        out = spec({"r": r}, prompts=prompts, history=history)
        history = out.history
        wanted = tracker.update(np.repeat(prompts, size), r.flatten().numpy()).reshape(3, size)
        np.testing.assert_allclose(out.values, wanted, rtol=1e-9)
    assert max(len(v) for v in history.values()) == 8


def test_the_history_is_json_and_gives_the_same_after_it() -> None:
    spec = Advantages(**RUNNING)
    prompts = ["a", "b", 'a "quoted" ü']
    before: adv.History = {}
    for step in range(4):
        before = spec({"r": rewards(step, 3).float()}, prompts=prompts, history=before).history
    restored = json.loads(json.dumps(before))
    assert restored == before
    copy = json.dumps(before)
    out = [spec({"r": rewards(9, 3).float()}, prompts=prompts, history=h) for h in (before, restored)]
    assert torch.equal(out[0].values, out[1].values)
    assert out[0].history == out[1].history
    assert json.dumps(before) == copy  # what went in is left as it was


def test_running_with_failures_and_flat_groups() -> None:
    spec = Advantages(**RUNNING | {"min_count": 1})
    first = spec({"r": torch.tensor([[1.0, 2.0]])}, prompts=["a"])
    out = spec({"r": torch.tensor([[3.0, 3.0], [math.nan, 1.0]])}, prompts=["a", "b"], history=first.history)
    assert out.flat.tolist() == [True, True]
    assert (out.values[0] > 0).all()  # a flat group that is better than before does teach
    assert out.kept.tolist() == [[True, True], [False, False]]
    assert out.history == {"a": [1.0, 2.0, 3.0, 3.0], "b": []}
    with pytest.raises(ConfigError, match="1 prompts for 2 groups"):
        spec({"r": torch.rand(2, 2)}, prompts=["a"])


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shaping": "hinge"}, "target"),
        ({"target": 2.0}, "target"),
        ({"aggregate": "gdpo", "baseline": "running"}, "choose one"),
        ({"min_count": 64, "baseline": "running"}, "never reached"),
        ({"min_count": 8}, "baseline: running alone"),
        ({"buffer_size": 64}, "baseline: running alone"),
        ({"keep": {"best": 0, "worst": 0}}, "nothing"),
        ({"floor": 0}, "greater than 0"),
        ({"std": "batch"}, "global"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Advantages(**settings)


def test_a_round_trip_and_fp32() -> None:
    spec = Advantages(keep={"best": 4, "worst": 4}, std="group", shaping="hinge", target=2.0)
    assert Advantages.model_validate(spec.model_dump()) == spec
    r = rewards()
    for settings in ({}, {"std": "group"}, {"aggregate": "gdpo"}, {"baseline": "leave_one_out"}):
        torch.testing.assert_close(values(r.float(), **settings).double(), values(r, **settings), rtol=1e-4, atol=1e-5)
        assert values(r.float() * 1e30, **settings).isfinite().all()
