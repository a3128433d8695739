"""Losses of groups of people: the worse a group fares, the more it counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DataError
from diffalign.objectives.base import Data, LossOutput, Need, Terms, Total

LOG_WEIGHTS = "groups/log_weights"
NAMED = 16
"""So many groups at most are logged one by one."""


@dataclass(frozen=True)
class GroupRobust:
    """Group DRO around a loss: sum_g q_g L_g, where each batch multiplies q_g by exp(step_size L_g).

    Sagawa et al. 2020, algorithm 1 (arXiv 1911.08731); with a loss on pairs it is group-robust preference optimisation
    (Ramesh et al. 2024, arXiv 2405.20304). q is uniform at first. A row of group g counts q_g / p_g, where p_g is how often
    the group is drawn, and L_g is estimated by sum of g's losses / (p_g B): both are unbiased in batches of any size, and both
    are linear in the rows, so that the mean of the log weights over processes is that of one process with all rows.

    The weights are those of the batches before, as the loop makes the states of all processes equal after the loss; the papers
    take those of the same batch. Rows' own weights count in both.
    """

    total: Total
    names: tuple[str, ...]
    shares: tuple[float, ...]
    """p_g: how often each group is drawn, positive and summing to 1."""
    step_size: float

    @property
    def data(self) -> Data:
        return self.total.data

    @property
    def needs(self) -> frozenset[Need]:
        return self.total.needs

    def __call__(self, terms: Terms, state: dict[str, Tensor]) -> LossOutput:
        out = self.total(terms, state)
        group = terms.group
        if group is None:
            raise ValueError("the terms name no group")
        shares = torch.tensor(self.shares, dtype=torch.float32, device=out.loss.device)
        before = state.get(LOG_WEIGHTS, torch.zeros_like(shares))
        if before.shape != shares.shape:
            raise DataError(
                f"the checkpoint weighs {len(before)} groups, the pairs have {len(shares)}", hint="resume with the same pairs"
            )
        q = before.to(shares).softmax(0)
        losses = out.loss.detach().float() if terms.weight is None else out.loss.detach().float() * terms.weight
        found = torch.zeros_like(shares).index_add(0, group, losses) / (shares * len(group))
        after = before.to(shares) + self.step_size * found
        metrics = out.metrics | {"group_weight/largest": q.max()[None]}
        if len(self.names) <= NAMED:
            metrics |= {f"group_weight/{name}": q[i][None] for i, name in enumerate(self.names)}
            metrics |= {f"loss/{name}": losses.masked_fill(group != i, torch.nan) for i, name in enumerate(self.names)}
        return LossOutput(out.loss * (q / shares)[group], metrics, out.state | {LOG_WEIGHTS: after})
