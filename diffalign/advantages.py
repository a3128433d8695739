r"""From the rewards of K samples of each of G prompts to advantages: how much better each is than what was to be expected.

Pure functions of (..., K) tensors, the samples of one prompt last, and :class:`Advantages`, which chains them:

    each reward shaped -> (``gdpo``: normalised in its group) -> weighted sum -> minus a baseline, over a deviation -> clip

A group with a reward that is not finite takes no part: the mean of the others is another baseline. Its samples have the
advantage 0 and are not kept. Deviations are the population's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.spec import Spec, read_with

# --- rewards of one group against each other -------------------------------------------------------------------------


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_n w_n v_n over the names of ``weights``."""
    return torch.stack([w * values[name] for name, w in weights.items()]).sum(0)


def zscore(values: Tensor) -> Tensor:
    """(v - mean) / std within the group, of the population; 0 where all are equal."""
    centred = values - values.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    tiny = std <= 1e-6 * values.abs().amax(-1, keepdim=True)  # rounding of equal values is no difference
    return torch.where(tiny, torch.zeros_like(centred), centred / std)


def beats(values: Tensor) -> Tensor:
    """(..., K, K): 1 where i is better than j, 0 where worse, one half where equal."""
    return (values[..., :, None] - values[..., None, :]).sign() / 2 + 0.5


def win_rate(wins: Tensor) -> Tensor:
    """Mean over the others of P(i beats j), (..., K, K) to (..., K). Ties and unread verdicts are one half (Pref-GRPO)."""
    k = wins.shape[-1]
    return (wins.sum(-1) - wins.diagonal(dim1=-2, dim2=-1)) / (k - 1)


def rank(values: Tensor) -> Tensor:
    """Rank within the group, 0 worst to 1 best, ties shared: the win rate of the values themselves."""
    return win_rate(beats(values))


def par(values: Tensor, reference: Tensor, k: float = 1.0) -> Tensor:
    """Preference as reward: mean_m sigmoid(k (r - r_m)), in (0, 1) (Fu et al. 2025).

    ``reference`` (..., M) are rewards of the reference model on the same prompt; at most 10 do, and those that are NaN do not
    count.
    """
    return torch.sigmoid(k * (values[..., :, None] - reference[..., None, :])).nanmean(-1)


def hinge(values: Tensor, target: float) -> Tensor:
    """-relu(target - v): no reward for going beyond the target (ReFL 2, DreamReward 4)."""
    return -(target - values).relu()


# --- advantages ------------------------------------------------------------------------------------------------------


def centred(rewards: Tensor, leave_one_out: bool = False) -> Tensor:
    """Rewards (..., K) minus the mean of their group; of the others in it, that is K / (K - 1) times as much. NaN stays."""
    out = rewards - rewards.nanmean(-1, keepdim=True)
    seen = (~rewards.isnan()).sum(-1, keepdim=True)
    return out * (seen / (seen - 1).clamp(min=1)) if leave_one_out else out


def deviation(rewards: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """Standard deviation of the population over ``dims``, which are kept, without regard to NaN."""
    return (rewards - rewards.nanmean(dims, keepdim=True)).square().nanmean(dims, keepdim=True).sqrt()


def flat(rewards: Tensor) -> Tensor:
    """(...,) bool: groups (..., K) whose rewards are equal but for rounding, or of which fewer than two are known."""
    known = rewards.nan_to_num(0)
    spread = deviation(rewards)[..., 0].nan_to_num(0)
    return (spread <= 1e-6 * known.abs().amax(-1)) | ((~rewards.isnan()).sum(-1) < 2)


def extremes(rewards: Tensor, best: int, worst: int) -> Tensor:
    """(..., K) bool: the ``best`` highest and the ``worst`` lowest of each group, of equal ones the first; never a NaN."""
    ascending = rewards.masked_fill(rewards.isnan(), float("inf")).argsort(dim=-1, stable=True).argsort(-1)
    descending = (-rewards).masked_fill(rewards.isnan(), float("inf")).argsort(dim=-1, stable=True).argsort(-1)
    return ((ascending < worst) | (descending < best)) & ~rewards.isnan()


def certainty(z: Tensor, inverse: Tensor, alpha: float = 0.05, offset: float = 0.7, most: float = 2.21) -> Tensor:
    """PrefPaint's weights of rewards, (...,): exp(offset - alpha |V^-1 z|) held in [1, most].

    z (..., D) are the last features of the reward model, and ``inverse`` (D, D) is V^-1, the inverse of sum z z^T over what it
    was trained on: far from that, rewards are guesses (Liu et al. 2024, arXiv 2410.21966, by its code).
    """
    return (offset - alpha * (z @ inverse).norm(dim=-1)).exp().clamp(1.0, most)


History = dict[str, list[float]]
"""The last rewards of each prompt, oldest first: plain JSON."""


def remember(history: History, prompts: Sequence[str], rewards: Tensor, size: int) -> History:
    """The history with the rewards (G, K) of ``prompts`` in it, at most ``size`` of each; a new object."""
    out = {prompt: list(seen) for prompt, seen in history.items()}
    for prompt, row in zip(prompts, rewards.double().tolist(), strict=True):
        out[prompt] = (out.get(prompt, []) + [r for r in row if r == r])[-size:]
    return out


class Keep(Spec):
    """Which samples of a group are trained on: DanceGRPO's 4 and 4 of 24, Sol-RL's 24 of 96."""

    best: int = Field(default=1, ge=0)
    worst: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.best + self.worst == 0:
            raise ValueError("best and worst are both 0: nothing would be trained on")
        return self


@dataclass(frozen=True)
class Advantage:
    """What :class:`Advantages` makes of the rewards of G groups of K."""

    values: Tensor
    """(G, K), 0 where not ``kept``."""
    kept: Tensor
    """(G, K) bool: samples of whole groups, the extremes of them where ``keep`` asks for these."""
    flat: Tensor
    """(G,) bool: groups without differences. Against the mean of their group they teach nothing."""
    history: History = field(default_factory=dict)
    """For the next call: of ``baseline: running``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Shares of flat groups, of failed rewards and the groups dropped for them, of clipped advantages and of samples that
    teach."""


class Advantages(Spec):
    """How rewards become advantages.

    The defaults are those of Flow-GRPO, DiffusionNFT and AWM; GRPO-Guard and DanceGRPO have ``std: group``.
    """

    baseline: Literal["mean", "leave_one_out", "running"] = "mean"
    """What is expected: the mean of the group; of the others in it (RLOO); of the prompt's last rewards, and of the batch
    while they are few (DDPO)."""
    std: Literal["global", "group", "none"] = "global"
    """What deviations are divided by: that of all rewards, which leaves groups without spread small (Flow-GRPO); that of the
    group, or of the prompt's last rewards (GRPO, DDPO); nothing (Dr. GRPO)."""
    floor: float = Field(default=1e-4, gt=0)
    """The smallest deviation that is divided by, in the unit of the rewards: less is noise, and not to be amplified."""
    aggregate: Literal["sum", "gdpo"] = "sum"
    """Several rewards: their weighted sum, in which the widest decides; or each normalised in its group,
    then summed, then normalised over the batch, whatever ``std`` (GDPO)."""
    shaping: Literal["win_rate", "par", "hinge"] | None = None
    """Of each reward before all else: the share of the group that it beats (Pref-GRPO); its preference over samples of the
    reference (PAR); no more beyond ``target``."""
    target: float | None = None
    """Of ``shaping: hinge``."""
    clip: float | None = Field(default=5.0, gt=0)
    """Largest size of an advantage."""
    keep: Keep | None = None
    """Train on the extremes of each group alone; advantages are against all of it."""
    buffer_size: int = Field(default=32, ge=1)
    """Of ``baseline: running``: how many rewards of a prompt are remembered; TRL has 16 where DDPO has 32."""
    min_count: int = Field(default=16, ge=1)
    """Of ``baseline: running``: how many it takes before they are relied on."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.shaping == "hinge") != (self.target is not None):
            raise ValueError("shaping: hinge and target belong together: set both or none")
        if self.aggregate == "gdpo" and self.baseline == "running":
            raise ValueError("aggregate: gdpo normalises in groups, baseline: running over time: choose one")
        read_with(self, "baseline", "running", "buffer_size", "min_count")
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count ({self.min_count}) is above buffer_size ({self.buffer_size}): it is never reached")
        return self

    def __call__(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float] | None = None,
        *,
        reference: Mapping[str, Tensor] | None = None,
        prompts: Sequence[str] = (),
        history: History | None = None,
    ) -> Advantage:
        """Advantages of rewards (G, K) by name, of all processes together: deviations over the batch are of all of it.

        ``weights`` are 1 unless given. ``shaping: par`` reads ``reference``, rewards (G, M) of the reference's samples;
        ``baseline: running`` reads ``prompts``, G keys, and the ``history`` that the last call gave back.

        Raises:
            ConfigError: groups of one against each other, or what a setting reads is missing.
        """
        known = {n: torch.where(r.isfinite(), r, float("nan")) for n, r in rewards.items()}
        known = {n: r if r.is_floating_point() else r.float() for n, r in known.items()}
        weights = dict.fromkeys(known, 1.0) if weights is None else weights
        if missing := [n for n in weights if n not in known]:
            raise ConfigError(f"no reward is called {missing[0]!r}", hint=f"there are: {', '.join(known)}")
        k = next(iter(known.values())).shape[-1]
        if k < 2 and (self.baseline != "running" or self.shaping == "win_rate"):
            raise ConfigError(
                "groups of one sample have nothing to be compared with", hint="draw 2 or more, or baseline: running"
            )
        failed = torch.stack([known[n].isnan() for n in weights]).any(0)
        lost = failed.any(-1)
        known = {n: known[n].masked_fill(lost[..., None], float("nan")) for n in weights}
        shaped = {n: self._shaped(known[n], (reference or {}).get(n)) for n in weights}
        total = weighted(shaped, weights)
        past: History = {}
        if self.aggregate == "gdpo":
            each = {n: self._over(self._centred(r), deviation(r), flat(r)[..., None]) for n, r in shaped.items()}
            summed = weighted(each, weights)
            still = torch.stack([flat(r) for r in shaped.values()]).all(0)
            values = self._over(summed - summed.nanmean(), deviation(summed, (-2, -1)), still[..., None])
        elif self.baseline == "running":
            if len(prompts) != len(total):
                raise ConfigError(
                    f"{len(prompts)} prompts for {len(total)} groups", hint="baseline: running needs each group's prompt"
                )
            past = remember(history or {}, prompts, total, self.buffer_size)
            values, still = self._against_past(total, prompts, past), flat(total)
        else:
            still = flat(total)
            spread = deviation(total, (-2, -1)) if self.std == "global" else deviation(total)
            values = self._over(self._centred(total), spread, still[..., None])
        size = values.abs()
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        kept = ~values.isnan()
        if self.keep is not None:
            kept = kept & extremes(total, self.keep.best, self.keep.worst)
        values = torch.where(kept, values, 0)
        shares = {
            "rewards_failed": failed,
            "groups_dropped": lost,
            "clipped": size > (self.clip or float("inf")),
            "samples_trained": values != 0,
        }
        if k > 1:  # one sample alone has no differences to lack
            shares["groups_flat"] = still & ~lost
        return Advantage(values, kept, still, past, {f"advantage/{n}": v.double().mean().item() for n, v in shares.items()})

    def _shaped(self, rewards: Tensor, reference: Tensor | None) -> Tensor:
        match self.shaping:
            case "win_rate":
                others = ~torch.eye(rewards.shape[-1], dtype=torch.bool, device=rewards.device)
                known = ~rewards.isnan()
                fought = others & known[..., :, None] & known[..., None, :]
                return torch.where(fought, beats(rewards), float("nan")).nanmean(-1)
            case "par":
                if reference is None:
                    raise ConfigError(
                        "shaping: par needs rewards of the reference's own samples", hint="draw up to 10 a prompt"
                    )
                return par(rewards, torch.where(reference.isfinite(), reference, float("nan")))
            case "hinge":
                return hinge(rewards, self.target or 0.0)
        return rewards

    def _centred(self, rewards: Tensor) -> Tensor:
        return centred(rewards, self.baseline == "leave_one_out")

    def _over(self, values: Tensor, spread: Tensor, still: Tensor) -> Tensor:
        """Divided by their spread, of at least the floor; 0 where there is none, NaN kept."""
        values = torch.where(still & ~values.isnan(), 0, values)
        return values if self.std == "none" and self.aggregate == "sum" else values / spread.clamp(min=self.floor)

    def _against_past(self, total: Tensor, prompts: Sequence[str], past: History) -> Tensor:
        """(G, K): against the prompt's last rewards, these among them; against the batch while there are too few."""
        batch = total.double()
        rows = []
        for row, prompt in zip(batch, prompts, strict=True):
            seen = torch.tensor(past[prompt], dtype=torch.double, device=row.device)
            against = seen if len(seen) >= self.min_count else batch.flatten()
            spread = deviation(against) if self.std == "group" else deviation(batch.flatten())
            values = row - against.nanmean()
            rows.append(values if self.std == "none" else values / spread.clamp(min=self.floor))
        return torch.stack(rows).to(total)
