"""The feed of the online methods into :func:`diffalign.train.loop.fit`.

An epoch is one rollout: ``prompts_per_rollout`` groups of ``group_size`` images, made in fixed blocks whose seeds belong to
the items, so that any number of processes sees the same trajectories. Its ``updates`` optimizer steps follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.advantages import History
from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.models import Cond, Model
from diffalign.objectives import Data, Need, StepTerms, Terms
from diffalign.oversample import Oversample, preselect
from diffalign.pairs import Group
from diffalign.path import kl, log_ratio
from diffalign.preflight import Preflight, preflight
from diffalign.rollout import Trajectories, conditions, evaluations, replay, rollout
from diffalign.sampling import Item, item_seed
from diffalign.timesteps import TimestepPolicy
from diffalign.train.coupling import Coupling, draw
from diffalign.train.online import OLD, STANDARDS, Online
from diffalign.train.rewards import Rewards
from diffalign.train.samples import Block, Example, StepBatch, follow, prompt_at, within_groups
from diffalign.train.terms import Batch, terms_of


class OnlineFeed:
    """Rolls out where an epoch begins and hands out micro-batches of what was sampled."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        spec: Online,
        rewards: Rewards,
        timesteps: TimestepPolicy,
        *,
        data: Data,
        needs: frozenset[Need] = frozenset(),
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        coupling: Coupling | None = None,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
        bare: Callable[[], AbstractContextManager[None]] = nullcontext,
        log: Callable[[int, dict[str, float]], object] = lambda step, values: None,
    ) -> None:
        self.model, self.prompts, self.spec, self.rewards, self.timesteps = model, list(prompts), spec, rewards, timesteps
        self.data, self.needs, self.batch_size, self.seed = data, needs, batch_size, seed
        self.rank, self.world, self.coupling = rank, world, coupling or Coupling()
        self.gather, self.bare, self.log = gather, bare, log
        self.epoch = -1
        self.blocks: list[Block] = []
        self.picked: list[list[int]] = []
        """The k of each item of the plan, where previews choose it."""
        self.history: History = {}
        """Past rewards of each prompt."""
        self.standards: dict[str, list[list[float]]] = {}
        """Rewards of the reference's own samples of each prompt: name by name."""
        self._encoded: tuple[Block | None, Any, Any] = (None, None, None)
        self._said: dict[str, Cond] = {}
        """Prompts of the rollout that were read, encoded."""
        self.used_up = False
        """Whether the last step was the last one that the blocks are for."""
        self.unpaid = 0
        """Denoiser passes of the last rollout that no terms have been charged with yet."""

    # --- what the loop calls ------------------------------------------------------------------------------------------

    def batches(self, step: int) -> Iterator[StepBatch | Batch]:
        """This process's micro-batches of one optimizer step; the first of an epoch samples."""
        epoch, part = divmod(step, self.spec.steps_per_rollout)
        if epoch != self.epoch:
            self._collect(epoch, step)
        inner, update = divmod(part, self.spec.updates)
        yield from self._paths(inner, update) if self.data == "steps" else self._images(inner, update)

    def terms(self, model: Model, batch: StepBatch | Batch, needs: frozenset[Need], reference: str = "reference") -> Terms:
        """Of stored steps or of re-noised images."""
        if isinstance(batch, StepBatch):
            found: Terms = self._step_terms(model, batch, needs, reference)
        else:
            if not model.trains_texts:
                batch = replace(batch, conds=tuple(self._conds(x, batch) if isinstance(x, tuple) else x for x in batch.conds))
            found = terms_of(model, batch, self.timesteps, needs, self.coupling, reference, OLD)
        found, self.unpaid = replace(found, cost=found.cost + self.unpaid), 0
        return found

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as tensors and plain values: images that are not used up are kept."""
        if self.used_up:
            self.blocks = []
        blocks = [{"paths": b.paths.state(), "advantages": b.advantages, "rewards": b.rewards} for b in self.blocks]
        kept = {
            "epoch": self.epoch,
            "picked": self.picked,
            "calls": self.rewards.calls,
            "history": self.history,
            "standards": self.standards,
            "unpaid": self.unpaid,
        }
        return kept | {"blocks": blocks}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`state` gave."""
        self.epoch, self.rewards.calls = state["epoch"], state["calls"]
        self.history, self.standards, self.picked = state["history"], state["standards"], state["picked"]
        self.unpaid = state.get("unpaid", 0)
        self.blocks = [
            Block(items, Trajectories.of(b["paths"]), b["advantages"], b["rewards"])
            for items, b in zip(self._chosen(self.epoch) if state["blocks"] else [], state["blocks"], strict=True)
        ]

    def totals(self) -> dict[str, Any]:
        """What was spent beside denoiser passes."""
        return {"reward_calls": self.rewards.calls * self.world}

    @property
    def replays(self) -> bool:
        """Whether steps of trajectories are trained on."""
        return self.data == "steps" or self.spec.credit != "image"

    def preflight(self, autocast: Callable[[], AbstractContextManager[Any]]) -> Preflight:
        """The first block of the first rollout, replayed as training will; the largest errors of all processes."""
        spec, items = self.spec.rollout, self._plan(0)[0]
        found = preflight(self.model, items, spec, self.seed, self.batch_size, autocast, bare=self.bare)
        names = ("ratio_error", "guard_error", "kl_error")
        worst = self.gather(torch.tensor([[getattr(found, name) for name in names]])).amax(0).tolist()
        return replace(found, **dict(zip(names, worst, strict=True)))

    # --- an epoch begins ----------------------------------------------------------------------------------------------

    def _plan(self, epoch: int) -> list[list[Item]]:
        """The items of this process's blocks: block n of all goes to process n mod world."""
        n, k = self.spec.prompts_per_rollout, self.spec.group_size
        turn = [(epoch * n + g) // len(self.prompts) for g in range(n)]  # in which a prompt comes once
        prompts = [self._prompt(epoch * n + g) for g in range(n)]
        items = [Item(prompts[g], turn[g] * k + j) for g in range(n) for j in range(k)]
        size = self.spec.rollout.batch_size
        return [items[i : i + size] for i in range(self.rank * size, len(items), self.world * size)]

    def _prompt(self, position: int) -> Prompt:
        return prompt_at(self.prompts, position, self.seed)

    @torch.no_grad()
    def _collect(self, epoch: int, step: int) -> None:
        """Sample, score and weigh the images of an epoch."""
        spec = self.spec
        self.blocks, self._said = [], {}
        self._follow(epoch)
        with self._sampling():
            self.picked = [] if spec.oversample is None else self._previewed(spec.oversample, epoch)
            plan = self._chosen(epoch)
            paths, values = self._sampled(plan, epoch)
        if spec.advantages.shaping == "par":
            with self._sampling("reference"):
                self._set_standards(plan)
        advantages, rewards, facts = self._weigh(plan, values, epoch)
        self.blocks = [Block(*parts) for parts in zip(plan, paths, advantages, rewards, strict=True)]
        self.epoch = epoch
        self.log(step + 1, facts)  # of the update that it is for, so that resuming before it forgets the line

    def _chosen(self, epoch: int) -> list[list[Item]]:
        """The plan of the last epoch that was begun, with the seeds that previews chose, if they do."""
        plan = self._plan(epoch)
        if not self.picked:
            return plan
        return [[Item(i.prompt, k) for i, k in zip(b, ks, strict=True)] for b, ks in zip(plan, self.picked, strict=True)]

    def _previewed(self, how: Oversample, epoch: int) -> list[list[int]]:
        """The k of each item of the plan: those candidates of its prompt whose previews stand out."""
        size, settings, out = self.spec.group_size, self.spec.rollout, []

        def reward(images: Tensor, items: Sequence[Item]) -> Tensor:
            return self.rewards.total(self.rewards(images, [item.prompt.text for item in items]).double())

        for items in self._plan(epoch):
            groups = items[::size]
            begin = [item.k // size * how.candidates for item in groups]
            more = {"candidates": how.candidates, "keep": size, "steps": how.steps, "by": how.by, "begin": begin}
            prompts = [item.prompt for item in groups]
            found = preselect(self.model, prompts, reward, settings, self.seed, epoch, **more)  # type: ignore[arg-type]
            out.append([k for row in found for k in row])
            self.unpaid += len(groups) * how.candidates * how.steps * self._branches
        return out

    def _follow(self, epoch: int) -> None:
        """Bring the policy that samples up to date, where it is not the trained one or is asked for."""
        if self.spec.old is not None or "old" in self.needs:
            follow(self.model.named_weights, 0.0 if self.spec.old is None else self.spec.old.decay(epoch))

    @contextmanager
    def _sampling(self, weights: str | None = None) -> Iterator[None]:
        """The bare network as it samples, by the weights of this name or those of the policy that samples."""
        name = weights or (OLD if self.spec.old else None)
        self.model.net.eval()
        with self.bare(), self.model.weights(name) if name else nullcontext():
            yield
        self.model.net.train()

    def _sampled(self, plan: Sequence[Sequence[Item]], epoch: int) -> tuple[list[Trajectories], Tensor]:
        """Trajectories of the blocks and their values (names, blocks, B): one block is scored while the next is sampled."""
        from tqdm import tqdm

        spec, model, made = self.spec.rollout, self.model, 0
        paths, scored = list[Trajectories](), list[Future[Tensor]]()
        quiet = True if self.rank > 0 or len(plan) < 2 else None  # None: where nobody looks, in a file
        scoring = ThreadPoolExecutor(1)
        try:
            for items in tqdm(plan, desc="rollout", unit="batch", leave=False, disable=quiet, dynamic_ncols=True):
                paths.append(rollout(model, items, spec, self.seed, epoch, steps_kept=self.replays))
                made += len(items) * evaluations(model, items, spec, self.seed, epoch)
                pixels = to_uint8(model.decode(paths[-1].x0)).cpu()
                scored.append(scoring.submit(self.rewards, pixels, [item.prompt.text for item in items]))
                for f in scored:
                    if f.done():
                        f.result()  # raises what the scorer did, before more is sampled
            values = torch.stack([f.result() for f in scored], 1)
        finally:
            scoring.shutdown(cancel_futures=True)
        self.unpaid += made * self._branches
        return paths, values

    def _set_standards(self, plan: Sequence[Sequence[Item]]) -> None:
        """Rewards of ``STANDARDS`` samples of the reference for prompts that have none yet; always the same ones."""
        new = {item.prompt.id: item.prompt for items in plan for item in items if item.prompt.id not in self.standards}
        for name, prompt in new.items():
            _, values = self._sampled([[Item(prompt, k) for k in range(STANDARDS)]], -1)
            self.standards[name] = values[:, 0].tolist()

    @property
    def _branches(self) -> int:
        """Passes of the network per prediction: two under classifier-free guidance."""
        return 2 if self.spec.rollout.guidance_scale > 1 and self.model.takes_negative else 1

    def _weigh(self, plan: Sequence[Sequence[Item]], values: Tensor, epoch: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Advantages and rewards, (blocks, B) of this process, from the values (names, blocks, B) of all."""
        spec, names = self.spec, self.rewards.names
        n, k, size = spec.prompts_per_rollout, spec.group_size, values.shape[2]

        def groups(mine: Tensor) -> Tensor:
            """(names, blocks, B, ...) of every process to (names, G, K, ...) in the order of the plan."""
            everyone = self.gather(mine.transpose(0, 1).contiguous())
            everyone = everyone.view(self.world, -1, *everyone.shape[1:])
            return (
                everyone.transpose(0, 1).flatten(0, 1).transpose(0, 1).flatten(1, 2).reshape(len(names), n, k, *mine.shape[3:])
            )

        def mine(of: Tensor) -> Tensor:
            """(G, K) to this process's (blocks, B)."""
            return of.reshape(-1, size)[self.rank :: self.world]

        grouped = groups(values).double()
        rewards = {name: grouped[i] for i, name in enumerate(names)}
        standard = None
        if spec.advantages.shaping == "par":
            own = torch.tensor([[self.standards[item.prompt.id] for item in items] for items in plan])
            each = groups(own.permute(2, 0, 1, 3))[:, :, 0].double()
            standard = {name: each[i] for i, name in enumerate(names)}
        prompts = [self._prompt(epoch * n + g).id for g in range(n)]
        found = spec.advantages(rewards, self.rewards.spec.weights, reference=standard, prompts=prompts, history=self.history)
        self.history = found.history
        advantages = found.values
        if (confidence := self.rewards.spec.confidence) is not None:
            advantages = advantages * torch.where(found.kept, rewards[confidence], 0)
        total = self.rewards.total(grouped)
        self.rewards.check_left(total)
        facts = {
            "rollout/reward": total.nanmean().item(),
            "rollout/reward_std": within_groups(total),
            "rollout/epoch": float(epoch),
        }
        facts |= {f"rollout/{name}": r.nanmean().item() for name, r in rewards.items()}
        return mine(advantages.float()), mine(total.float()), facts | found.metrics

    # --- micro-batches ------------------------------------------------------------------------------------------------

    def _chunk(self, what: list[Any], inner: int, update: int) -> list[Any]:
        """The share of one update, shuffled anew in every use; all processes shuffle alike."""
        self.used_up = (inner + 1, update + 1) == (self.spec.inner_epochs, self.spec.updates)
        g = torch.Generator().manual_seed(item_seed(self.seed, f"update {self.epoch}", inner))
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
            most = int(self.gather(torch.tensor([float(len(parts))])).max().item())
            total = self.gather(torch.tensor([sum(w.sum().item() for *_, w in parts if w is not None)])).sum().item()
            parts += [(blocks[0], list(range(size)), torch.zeros(size))] * (most - len(parts))
            scale = size * most * self.world / max(1.0, total)  # so that the mean is one over what counts
            parts = [(block, rows, None if w is None else w * scale) for block, rows, w in parts]
        for block, rows, weight in parts:
            for slot in range(block.paths.std.shape[1]):
                yield StepBatch(block, rows, slot, weight)

    def _images(self, inner: int, update: int) -> Iterator[Batch]:
        found = self._chunk(self._examples(), inner, update)
        mine = torch.tensor([float(len(found))])
        most = int(self.gather(mine).max().item())  # pairs are as many as groups that are no ties: processes differ
        total = self.gather(torch.tensor([float(sum(x.weight > 0 for x in found))])).sum().item()
        found += [replace(x, weight=0.0) for x in (self._examples(anything=True)[:1] * (most - len(found)))]
        parts = [found[start : start + self.batch_size] for start in range(0, most, self.batch_size)]
        for use in range(self.spec.repeats):
            for some in parts:
                # the loop takes means of means, the last part may be smaller, and the mean over what counts is wanted
                scale = len(some) * len(parts) * self.world / max(1.0, total)
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
            cost=count * passes * self._branches,
        )

    def _read(self, block: Block, rows: list[int]) -> tuple[Cond, Cond | None]:
        """The block's prompts, encoded as when it was sampled: all together, once for all its steps, in full precision."""
        if self._encoded[0] is not block or self.model.trains_texts:
            with torch.autocast(block.paths.x0.device.type, enabled=False):
                self._encoded = (block, *conditions(self.model, block.items, self.spec.rollout))
        _, cond, negative = self._encoded
        return cond[rows], None if negative is None else negative[rows]
