"""Combining values: pure functions of (..., K) tensors, K images of one prompt last. NaN stays NaN.

Raw sums of different scorers are sums of different units: standardise within the prompt (``zscore``, ``rank``) first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffalign.advantages import beats, hinge, par, rank, weighted, win_rate, zscore
from diffalign.errors import ConfigError
from diffalign.scorers.base import ScoreBatch, ScoreInput, Scorer, isolated

__all__ = [
    "COMBINED", "Combined", "beats", "ensemble", "gate", "hinge", "minimum", "par", "rank", "weighted", "win_rate",
    "worst_off", "zscore",
]  # fmt: skip


def minimum(values: Mapping[str, Tensor]) -> Tensor:
    """The smallest of the scorers, image by image: no scorer can be traded for another."""
    return torch.stack(list(values.values())).amin(0)


def worst_off(values: Mapping[str, Tensor]) -> Tensor:
    """Max-min: the values of the scorer (or user group) that is worst off in the mean over all images.

    Its mean is min_u E[r_u], so an ascent on it is one on the worst (Chakraborty et al. 2024, MaxMin-RLHF).
    """
    return min(values.values(), key=lambda v: v.mean().item())


def gate(values: Tensor, margin: Tensor, blocked: float) -> Tensor:
    """``values`` where the margin is above 0 (safe), ``blocked`` elsewhere; NaN where the margin is."""
    return torch.where(margin > 0, values, torch.where(margin.isnan(), margin, torch.full_like(values, blocked)))


def ensemble(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the members and their disagreement (population deviation), of values in one unit."""
    stacked = torch.stack(list(values.values()))
    return stacked.mean(0), stacked.std(0, correction=0)


def _gated(values: Mapping[str, Tensor], blocked: float) -> dict[str, Tensor]:
    kept, margin = values.values()
    return {"gate": gate(kept, margin, blocked)}


def _together(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mean, spread = ensemble(values)
    return {"ensemble": mean, "ensemble_spread": spread}


COMBINED: dict[str, tuple[str, ...]] = {
    "minimum": ("minimum",),
    "ensemble": ("ensemble", "ensemble_spread"),
    "gate": ("gate",),
}
"""Combinators that judge a picture by itself, and so are scorers: the values that each gives."""


def members_of(name: str) -> list[str]:
    """The names of the scorers that a scorer's name is made of: itself, unless it joins others."""
    kind, _, rest = name.partition(":")
    if kind not in COMBINED:
        return [name]
    parts = [part for part in rest.split("|") if part]
    return parts[:-1] if kind == "gate" else parts


class Combined:
    """Scorers that are one: ``minimum:A|B``, ``ensemble:A|B``, or ``gate:A|B|BLOCKED``, A where B is above 0.

    Raises:
        ConfigError: too few members, or a number that is none.
    """

    def __init__(self, kind: str, members: Sequence[Scorer], blocked: float | None = None, version: str = "1") -> None:
        wanted = "gate:SCORER|SCORER|NUMBER" if kind == "gate" else f"{kind}:SCORER|SCORER, or more"
        if len(members) < 2 or (kind == "gate") != (blocked is not None) or (kind == "gate" and len(members) > 2):
            raise ConfigError(f"the scorer {kind} joins other scorers", hint=f"write {wanted}")
        self.name, self.members, self.version = kind, list(members), version
        self._joined: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = {
            "minimum": lambda values: {"minimum": minimum(values)},
            "ensemble": _together,
            "gate": lambda values: _gated(values, blocked or 0.0),
        }[kind]

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        found = [isolated(member, batch) for member in self.members]  # one that fails tears no other's batch apart
        values = {f"{n} {m.name}": _one(m, b) for n, (m, b) in enumerate(zip(self.members, found, strict=True))}
        errors: list[str | None] = [None] * len(batch)
        for member, b in zip(self.members, found, strict=True):
            new = [e and f"{member.name}: {e}" for e in b.errors] or errors
            errors = [a or b for a, b in zip(errors, new, strict=True)]
        cut = [any(x) for x in zip(*(b.truncated for b in found if b.truncated), strict=True)]
        return ScoreBatch(self._joined(values), errors if any(errors) else [], truncated=cut)


def _one(scorer: Scorer, found: ScoreBatch) -> Tensor:
    """The value that a scorer is known by: its own name's, ``score``, or the only one."""
    for name in (scorer.name, "score"):
        if name in found.values:
            return found.values[name].float().cpu()
    if len(found.values) == 1:
        return next(iter(found.values.values())).float().cpu()
    raise ConfigError(f"the scorer {scorer.name} gives {', '.join(found.values)}: none of them is its one value")
