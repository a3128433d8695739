"""Preferences between steps of the model's own trajectories, for losses on pairs.

The error of a step is that of :mod:`diffalign.objectives.stepwise`, e = mean (x_next - mu)^2 / (2 std^2), so that e_ref - e is
the logarithm of the ratio of policies. Sums are in fp64: the differences that teach are a millionth of the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.branching import branch
from diffalign.data.images import to_uint8
from diffalign.models import Model
from diffalign.objectives import Need, PairTerms, Terms
from diffalign.pairs import Group
from diffalign.rollout import replay
from diffalign.sampling import Item
from diffalign.train.collecting import Collector
from diffalign.train.online_feed import OnlineFeed
from diffalign.train.samples import Block

NEEDS: frozenset[Need] = frozenset({"loser", "reference", "scores", "old"})
"""What pairs of steps can tell."""


@dataclass(frozen=True)
class Fork(Block):
    """Trajectories with two of the candidates at each trained step; neither need be the one that went on."""

    chosen: Tensor
    """(B, S, C, H, W), the better one."""
    rejected: Tensor
    """(B, S, C, H, W), the worse one."""
    scores: Tensor
    """(B, S, 2), rewards of the previews of both."""
    decided: Tensor
    """(B, S) bool, no tie."""


class ForkCollector(Collector):
    """Of ``online.credit: state``: at each trained step several candidates from one state, by what becomes of them.

    A trajectory takes the place of a group, and ``rollout.batch_size`` counts candidates.
    """

    made_of = Fork

    def _plan(self, epoch: int) -> list[list[Item]]:
        return [block[:: self.spec.group_size] for block in super()._plan(epoch)]

    @torch.no_grad()
    def __call__(self, epoch: int) -> tuple[list[Block], dict[str, float]]:
        self._follow(epoch)
        made = []
        with self._sampling(), ThreadPoolExecutor(1) as scoring:
            for items in self._plan(epoch):
                made.append((items, *self._forked(items, epoch, scoring)))
        forks = [self._fork(items, paths, candidates, values) for items, paths, candidates, values in made]
        self.epoch = epoch
        values = self.gather(torch.stack([v for *_, v in made], 1).transpose(0, 1).contiguous()).double()
        total = self.rewards.total(values.transpose(0, 1))
        self.rewards.check_left(total)
        decided = self.gather(torch.stack([b.decided.float() for b in forks]))
        within = (total - total.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
        facts = {"reward": total, "reward_std": within, "decided": decided, "epoch": torch.tensor(float(epoch))}
        facts |= {name: values[:, i] for i, name in enumerate(self.rewards.names)}
        return list(forks), {f"rollout/{name}": value.nanmean().item() for name, value in facts.items()}

    def _forked(self, items: Sequence[Item], epoch: int, scoring: ThreadPoolExecutor) -> tuple[Any, Tensor, Tensor]:
        """Paths, candidates (B, S, K, C, H, W) and rewards (names, B, S, K): a step is scored while others are made."""
        spec, asked = self.spec, list[tuple[list[int], list[int], Future[Tensor]]]()

        def see(rows: list[int], slots: list[int], x0: Tensor, time: float) -> None:
            texts = [items[row].prompt.text for row in rows for _ in range(spec.group_size)]
            pictures = to_uint8(self.model.decode(x0.flatten(0, 1))).cpu()
            asked.append((rows, slots, scoring.submit(self.rewards, pictures, texts, torch.full((len(texts),), time))))

        made = branch(self.model, items, spec.rollout, self.seed, epoch, spec.group_size, see)
        self.unpaid += made.passes * self.branches
        values = torch.empty(len(self.rewards.names), *made.candidates.shape[:3])
        for rows, slots, found in asked:
            values[:, rows, slots] = found.result().view(len(values), len(rows), spec.group_size)
        return made.paths, made.candidates, values

    def _fork(self, items: list[Item], paths: Any, candidates: Tensor, values: Tensor) -> Fork:
        """The two of each state's candidates that the rule picks; the first two, undecided, where it finds a tie."""
        total = self.rewards.total(values.double())
        b, s, _ = total.shape
        best, worst = torch.zeros(b, s, dtype=torch.long), torch.ones(b, s, dtype=torch.long)
        decided = torch.zeros(b, s, dtype=torch.bool)
        for row in range(b):
            for slot in range(s):
                rewards = total[row, slot].tolist()
                found = self.spec.rule(Group(rewards)) if all(r == r for r in rewards) else []
                if found:
                    best[row, slot], worst[row, slot], decided[row, slot] = found[0].chosen, found[0].rejected, True
        i, j = torch.arange(b)[:, None], torch.arange(s)
        scores = torch.stack([total[i, j, best], total[i, j, worst]], -1).nan_to_num(0).float()
        mean = total.flatten(1).nanmean(1).float()
        chosen, rejected = candidates[i, j, best], candidates[i, j, worst]
        return Fork(items, paths, torch.zeros(b), mean, chosen, rejected, scores, decided)


@dataclass(frozen=True)
class StepPairs:
    """P pairs of steps: of rows of a block, at the slots given, all of them together."""

    block: Block
    part: range
    """Rows of the block that its micro-batch has."""
    rows: list[int]
    """Those of them that pairs are made of: whose means are computed."""
    pairs: list[tuple[int, int]]
    """Winner and loser among ``rows``; the same row twice where both come from one state."""
    slots: list[int]
    weight: Tensor
    """(P,)"""
    fresh: int
    """Images that have not been seen in this use of the block."""

    def __len__(self) -> int:
        return len(self.pairs)


class StepwiseFeed(OnlineFeed):
    """``online.credit`` steps and trajectory: stored steps go by the preference between finished images of their group."""

    def batches(self, step: int) -> Iterator[StepPairs]:
        """This process's micro-batches of one optimizer step, as many in every process; the first of an epoch samples."""
        inner, update = self._begin(step)
        found = [x for block in self._chunk(self.blocks, inner, update) for x in self._of(block)]
        total = self.collector.gather(torch.tensor([sum(x.weight.sum().item() for x in found)])).sum().item()
        for x in found:  # the loop takes means of means; the mean of all pairs is wanted
            yield replace(x, weight=x.weight * len(x) * len(found) * self.collector.world / max(total, 1.0))

    def terms(self, model: Model, batch: Any, needs: frozenset[Need], reference: str = "reference") -> Terms:
        """Errors of steps, (P,) each; those of a trajectory are summed over its steps."""
        rows, settings = batch.rows, self.spec.rollout
        win, lose = (list(side) for side in zip(*batch.pairs, strict=True))
        if "old" in needs:  # stored means are compared with replays of as many rows as the preflight's: others round otherwise
            win, lose = ([batch.part.index(rows[n]) for n in side] for side in (win, lose))
            rows = list(batch.part)
        paths = batch.block.paths[rows]
        better, worse = paths.x_next, paths.x_next
        if isinstance(batch.block, Fork):
            better, worse = batch.block.chosen[rows], batch.block.rejected[rows]

        def means() -> list[Tensor]:
            cond, negative = self._read(batch.block, rows)
            return [replay(model, paths, slot, cond, settings, negative) for slot in batch.slots]

        def errors(of: Sequence[Tensor]) -> Tensor:
            """(S, 2, P) of winners and losers."""
            sides = [
                torch.stack([step_error(x[win], m[win], s[win]), step_error(y[lose], m[lose], s[lose])])
                for m, x, y, s in zip(of, arrived, missed, stds, strict=True)
            ]
            return torch.stack(sides)

        arrived, missed, stds = ([a[:, slot] for slot in batch.slots] for a in (better, worse, paths.std))
        found: dict[str, Tensor] = {}
        passes = 3
        if "reference" in needs:
            with torch.no_grad(), model.weights(reference):
                found["ref_winner"], found["ref_loser"] = errors(means()).sum(0)
            passes += 1
        if "old" in needs:
            before = errors([paths.mean[:, slot] for slot in batch.slots])
            found["old_winner"], found["old_loser"] = before.sum(0)
        if "scores" in needs:
            found["score_winner"], found["score_loser"] = self._scores(batch, rows, win, lose)
        here = errors(means())
        winner, loser = here.sum(0)
        if "old" in needs and len(batch.slots) > 1:
            found["log_ratios"] = (before - here).permute(2, 0, 1)
        when = 1 - paths.steps[:, batch.slots].double().mean(1) / settings.num_inference_steps
        cost = len(rows) * len(batch.slots) * passes * self.collector.branches + self.collector.charge()
        return PairTerms(winner, loser, **found, t=when[win], weight=batch.weight.to(winner), images=batch.fresh, cost=cost)

    def _of(self, block: Block) -> Iterator[StepPairs]:
        """The block in parts of whole groups, step by step; a part without a preference weighs nothing."""
        slots, k = list(range(block.paths.std.shape[1])), self.spec.group_size
        for start in range(0, len(block.items), self.batch_size):
            found = []
            for first in range(start, min(start + self.batch_size, len(block.items)), k):
                rewards = block.rewards[first : first + k].tolist()
                if all(r == r for r in rewards):
                    found += [(first + p.chosen, first + p.rejected) for p in self.spec.rule(Group(rewards))]
            part = range(start, min(start + self.batch_size, len(block.items)))
            weight = torch.full((len(found),), 1.0) if found else torch.zeros(1)
            found = found or [(start, start + 1)]
            rows = sorted({row for pair in found for row in pair})
            pairs = [(rows.index(w), rows.index(y)) for w, y in found]
            for n, some in enumerate([slots] if self.spec.credit == "trajectory" else [[s] for s in slots]):
                yield StepPairs(block, part, rows, pairs, some, weight, 0 if n else len(rows))

    def _scores(self, batch: StepPairs, rows: list[int], win: list[int], lose: list[int]) -> tuple[Tensor, Tensor]:
        """Advantages of the finished images, as for all losses that read scores."""
        mine = batch.block.advantages[rows].to(batch.block.paths.x0.device)
        return mine[win], mine[lose]


class StateFeed(StepwiseFeed):
    """``online.credit: state``: at each trained step the best candidate against the worst, from one state."""

    def _of(self, block: Block) -> Iterator[StepPairs]:
        """Step by step, what is decided; what is not costs nothing."""
        assert isinstance(block, Fork)
        for start in range(0, len(block.items), self.batch_size):
            for slot in range(block.paths.std.shape[1]):
                part = range(start, min(start + self.batch_size, len(block.items)))
                rows = [row for row in part if block.decided[row, slot]]
                weight = torch.ones(len(rows)) if rows else torch.zeros(1)
                rows = rows or [start]
                pairs = [(n, n) for n in range(len(rows))]
                yield StepPairs(block, part, rows, pairs, [slot], weight, 0 if slot else len(part))

    def _scores(self, batch: StepPairs, rows: list[int], win: list[int], lose: list[int]) -> tuple[Tensor, Tensor]:
        """Rewards of the two previews, as they are."""
        assert isinstance(batch.block, Fork)
        both = batch.block.scores[rows, batch.slots[0]].to(batch.block.paths.x0.device)
        return both[win, 0], both[lose, 1]


def step_error(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """mean (x_next - mu)^2 / (2 std^2), (B,) in fp64; minus it is the step's log-density up to what no policy changes."""
    return (x_next.double() - mean.double()).square().flatten(1).mean(1) / (2 * std.double().square())
