"""The feed of the online methods into :func:`diffalign.train.loop.fit`: an epoch is one rollout and the steps that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.models import Cond, Model
from diffalign.objectives import Data, Need, StepTerms, Terms
from diffalign.pairs import Group
from diffalign.path import kl, log_ratio
from diffalign.rollout import conditions, replay
from diffalign.sampling import item_seed
from diffalign.timesteps import TimestepPolicy
from diffalign.train.collecting import Collector
from diffalign.train.coupling import Coupling, draw
from diffalign.train.online import AVERAGE, OLD
from diffalign.train.samples import Block, Example, StepBatch
from diffalign.train.terms import Batch, terms_of


class OnlineFeed:
    """Rolls out where an epoch begins and hands out micro-batches of what was sampled."""

    def __init__(
        self,
        collector: Collector,
        timesteps: TimestepPolicy,
        *,
        data: Data,
        batch_size: int,
        coupling: Coupling | None = None,
        log: Callable[[int, dict[str, float]], object] = lambda step, values: None,
    ) -> None:
        self.collector, self.timesteps, self.data = collector, timesteps, data
        self.model, self.prompts, self.spec, self.seed = collector.model, collector.prompts, collector.spec, collector.seed
        self.rewards = collector.rewards
        self.batch_size, self.coupling, self.log = batch_size, coupling or Coupling(), log
        self.blocks: list[Block] = []
        self._encoded: tuple[Block | None, Any, Any] = (None, None, None)
        self._said: dict[str, Cond] = {}
        """Prompts of the rollout that were read, encoded."""
        self.used_up = False
        """Whether the last step was the last one that the blocks are for."""

    # --- what the loop calls ------------------------------------------------------------------------------------------

    def batches(self, step: int) -> Iterator[Any]:
        """This process's micro-batches of one optimizer step; the first of an epoch samples."""
        inner, update = self._begin(step)
        yield from self._paths(inner, update) if self.data == "steps" else self._images(inner, update)

    def terms(self, model: Model, batch: Any, needs: frozenset[Need], reference: str = "reference") -> Terms:
        """Of stored steps or of re-noised images."""
        if isinstance(batch, StepBatch):
            found: Terms = self._step_terms(model, batch, needs, reference)
        else:
            if not model.trains_texts:
                batch = replace(batch, conds=tuple(self._conds(x, batch) if isinstance(x, tuple) else x for x in batch.conds))
            told = 1.0 if model.takes_negative else self.spec.rollout.guidance_scale  # a number it is conditioned on
            found = terms_of(model, batch, self.timesteps, needs, self.coupling, reference, OLD, AVERAGE, told)
        return replace(found, cost=found.cost + self.collector.charge())

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as tensors and plain values: images that are not used up are kept."""
        if self.used_up:
            self.blocks = []
        return self.collector.state() | {"blocks": [block.state() for block in self.blocks]}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`state` gave."""
        self.collector.restore(state)
        self.blocks = self.collector.blocks(state["blocks"], state.get("made_from"))

    def totals(self) -> dict[str, Any]:
        """What was spent beside denoiser passes."""
        return {"reward_calls": int(self.collector.gather(torch.tensor([self.rewards.calls])).sum().item())}

    # --- micro-batches ------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> tuple[int, int]:
        """(use of the images, update in it) of a step, before which an epoch may begin."""
        epoch, part = divmod(step, self.spec.steps_per_rollout)
        if epoch != self.collector.epoch:
            self.blocks, self._said, self._encoded = [], {}, (None, None, None)
            self.blocks, facts = self.collector(epoch)
            self.log(step + 1, facts)  # of the update that it is for, so that resuming before it forgets the line
        return divmod(part, self.spec.updates)

    def _chunk(self, what: list[Any], inner: int, update: int) -> list[Any]:
        """The share of one update, shuffled anew in every use; all processes shuffle alike."""
        self.used_up = (inner + 1, update + 1) == (self.spec.inner_epochs, self.spec.updates)
        g = torch.Generator().manual_seed(item_seed(self.seed, f"update {self.collector.epoch}", inner))
        order = torch.randperm(len(what), generator=g).tolist()
        return [what[i] for i in order[update :: self.spec.updates]]

    def _paths(self, inner: int, update: int) -> Iterator[StepBatch]:
        """Parts of blocks, step by step. Of extremes alone they are filled up with other rows, and blocks with other parts,
        that weigh nothing: kernels see the batches that the preflight saw, and processes agree on how many there are.
        """
        size, blocks = self.batch_size, self._chunk(self.blocks, inner, update)
        parts = list[tuple[Block, list[int], Tensor | None]]()
        if self.spec.advantages.keep is None:
            parts = [(b, list(range(i, i + size)), None) for b in blocks for i in range(0, len(b.items), size)]
        else:
            for block in blocks:
                counts = (block.advantages != 0).float()
                rows = counts.argsort(descending=True, stable=True)
                parts += [(block, some.tolist(), counts[some]) for some in rows.split(size) if counts[some].any()]
            most = int(self.collector.gather(torch.tensor([float(len(parts))])).max().item())
            total = self.collector.gather(torch.tensor([sum(w.sum().item() for *_, w in parts if w is not None)])).sum().item()
            parts += [(blocks[0], list(range(size)), torch.zeros(size))] * (most - len(parts))
            scale = size * most * self.collector.world / max(1.0, total)  # so that the mean is one over what counts
            parts = [(block, rows, None if w is None else w * scale) for block, rows, w in parts]
        for block, rows, weight in parts:
            for slot in range(block.paths.std.shape[1]):
                yield StepBatch(block, rows, slot, weight)

    def _images(self, inner: int, update: int) -> Iterator[Batch]:
        found = self._chunk(self._examples(), inner, update)
        mine = torch.tensor([float(len(found))])
        most = int(self.collector.gather(mine).max().item())  # pairs are as many as groups that are no ties: processes differ
        total = self.collector.gather(torch.tensor([float(sum(x.weight > 0 for x in found))])).sum().item()
        found += [replace(x, weight=0.0) for x in (self._examples(anything=True)[:1] * (most - len(found)))]
        parts = [found[start : start + self.batch_size] for start in range(0, most, self.batch_size)]
        for use in range(self.spec.repeats):
            for some in parts:
                # the loop takes means of means, the last part may be smaller, and the mean over what counts is wanted
                scale = len(some) * len(parts) * self.collector.world / max(1.0, total)
                yield self._batch([replace(x, weight=x.weight * scale) for x in some], (inner, use))

    def _examples(self, anything: bool = False) -> list[Example]:
        """What this process learns from: pairs by the rule, whole groups, or single images; ``anything`` of that shape."""
        k, out = self.spec.group_size, list[Example]()
        for block in self.blocks:
            for start in range(0, len(block.items), k):
                rewards = block.rewards[start : start + k].tolist()
                known = all(r == r for r in rewards)
                if self.data == "groups":
                    out += [Example(block, tuple(range(start, start + k)))] if known or anything else []
                elif self.data != "pairs":
                    out += [Example(block, (i,)) for i in range(start, start + k) if anything or block.advantages[i] != 0]
                elif anything:
                    out.append(Example(block, (start, start + 1)))
                elif known:
                    out += [Example(block, (start + p.chosen, start + p.rejected)) for p in self.spec.rule(Group(rewards))]
            if anything:
                break
        return out

    def _batch(self, some: Sequence[Example], use: tuple[int, int]) -> Batch:
        """Examples with noise and times of their own, which belong to (seed, epoch, use, images)."""
        x0 = torch.stack([x.block.paths.x0[list(x.rows)] for x in some])
        us, noises = [], []
        for x in some:
            first = x.block.items[x.rows[0]]
            g = torch.Generator().manual_seed(item_seed(self.seed, f"{first.prompt.id} {use} {x.rows}", first.k))
            u, eps = draw(self.coupling, self.timesteps, len(x.rows), x0.shape[2:], g)
            us.append(u)
            noises.append(eps)
        prompts = [x.block.items[x.rows[0]].prompt for x in some]
        height, width = self.model.resolution
        advantages = torch.stack([x.block.advantages[list(x.rows)] for x in some])
        facts = (
            {"scores": advantages} if len(some[0].rows) > 1 else {"advantage": advantages[:, 0], "good": advantages[:, 0] > 0}
        )
        return Batch(
            x0,
            torch.tensor([height, width, 0, 0, height, width]).expand(*x0.shape[:2], 6),
            torch.stack(noises),
            torch.stack(us),
            (tuple(p.text for p in prompts),),
            torch.tensor([x.weight for x in some]),
            self.data,
            facts,
        )

    def _conds(self, texts: Sequence[str | None], batch: Batch) -> Cond:
        """Prompts encoded when they are read and not before: with those of the first block that has them and in full
        precision, as when it was sampled, whatever was read before.
        """
        wanted, seen = {str(text) for text in texts}, set[str]()
        for block in self.blocks if wanted - self._said.keys() else ():
            said = list(dict.fromkeys(item.prompt.text for item in block.items))
            own = [text for text in said if text not in seen]
            if (wanted - self._said.keys()) & set(own):
                with torch.no_grad(), torch.autocast(batch.x0.device.type, enabled=False):
                    cond = self.model.encode_prompts(said)
                self._said |= {text: cond[[said.index(text)]] for text in own}
            seen |= set(said)
        return Cond.cat([self._said[str(text)] for text in texts])

    def _step_terms(self, model: Model, batch: StepBatch, needs: frozenset[Need], reference: str) -> StepTerms:
        """One step of stored trajectories under the policy, and under the reference if asked for."""
        rows, slot, settings = batch.rows, batch.slot, self.spec.rollout
        some, count = batch.block.paths[rows], len(rows)

        def mean() -> Tensor:
            cond, negative = self._read(batch.block, rows)
            return replay(model, some, slot, cond, settings, negative)

        std, old, arrived = some.std[:, slot], some.mean[:, slot], some.x_next[:, slot]
        kl_ref, passes = None, 3
        if "reference" in needs:
            with torch.no_grad(), model.weights(reference):
                there = mean()
            passes = 4
        here = mean()
        if "reference" in needs:
            kl_ref = kl(here, there, std)
        steps, travelled = settings.num_inference_steps, some.c.sigma[:, slot] - some.c_next.sigma[:, slot]
        return StepTerms(
            log_ratio=log_ratio(here, old, arrived, std),
            advantage=batch.block.advantages[rows],
            kl_old=kl(here, old, std),
            std=std,
            dt=travelled if model.kind == "flow" else torch.full_like(std, 1 / steps),
            kl_ref=kl_ref,
            t=1 - some.steps[:, slot].float() / steps,
            weight=None if batch.weight is None else batch.weight.to(std),
            images=0 if slot else count if batch.weight is None else int((batch.weight > 0).sum()),
            cost=count * passes * self.collector.branches,
        )

    def _read(self, block: Block, rows: list[int]) -> tuple[Cond, Cond | None]:
        """The block's prompts, encoded as when it was sampled: all together, once for all its steps, in full precision."""
        if self._encoded[0] is not block or self.model.trains_texts:
            self._encoded = (block, *conditions(self.model, block.items, self.spec.rollout))
        _, cond, negative = self._encoded
        return cond[rows], None if negative is None else negative[rows]
