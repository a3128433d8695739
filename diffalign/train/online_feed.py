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
from diffalign.data.prompts import Prompt
from diffalign.models import Cond, Model
from diffalign.objectives import Data, Need, StepTerms, Terms
from diffalign.oversample import Oversample, preselect
from diffalign.pairs import Group
from diffalign.path import kl, log_ratio
from diffalign.preflight import Preflight, preflight
from diffalign.rollout import Trajectories, conditions, replay, rollout
from diffalign.sampling import Item, encode_once, item_seed
from diffalign.timesteps import TimestepPolicy
from diffalign.train.coupling import Coupling, draw
from diffalign.train.online import OLD, STANDARDS, Online
from diffalign.train.rewards import Rewards
from diffalign.train.samples import Block, Example, StepBatch, follow, places, prompt_at, within_groups
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
            found = terms_of(model, batch, self.timesteps, needs, self.coupling, reference, OLD)
        found, self.unpaid = replace(found, cost=found.cost + self.unpaid), 0
        return found

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as tensors and plain values: images are kept, not sampled again."""
        blocks = (
            [
                {"rows": places(b.items, whole), "paths": b.paths.state(), "advantages": b.advantages, "rewards": b.rewards}
                for b, whole in zip(self.blocks, self._chosen(self.epoch), strict=True)
            ]
            if self.blocks
            else []
        )
        kept = {
            "epoch": self.epoch,
            "picked": self.picked,
            "calls": self.rewards.calls,
            "history": self.history,
            "standards": self.standards,
        }
        return kept | {"blocks": blocks}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`state` gave."""
        self.epoch, self.rewards.calls = state["epoch"], state["calls"]
        self.history, self.standards, self.picked = state["history"], state["standards"], state["picked"]
        self.blocks = [
            Block([items[i] for i in b["rows"]], Trajectories.of(b["paths"]), b["advantages"], b["rewards"])
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
        """The first block of the next rollout, replayed as training will."""
        with self.bare():
            return preflight(self.model, self._plan(0)[0], self.spec.rollout, self.seed, self.batch_size, autocast)

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
        self._follow(epoch)
        with self._sampling():
            self.picked = [] if spec.oversample is None else self._previewed(spec.oversample, epoch)
            plan = self._chosen(epoch)
            paths, values = self._sampled(plan, epoch)
        if spec.advantages.shaping == "par":
            with self._sampling("reference"):
                self._set_standards(plan)
        advantages, rewards, kept, facts = self._weigh(plan, values, epoch)
        self.blocks = []
        for items, path, a, r, k in zip(plan, paths, advantages, rewards, kept, strict=True):
            rows = k.nonzero().flatten().tolist() if spec.advantages.keep is not None else list(range(len(items)))
            self.blocks.append(Block([items[i] for i in rows], path[rows], a[rows], r[rows]))
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
            return self.rewards.total(self.rewards(images / 255, [item.prompt.text for item in items]).double())

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

        spec, model = self.spec.rollout, self.model
        paths, scored = list[Trajectories](), list[Future[Tensor]]()
        quiet = self.rank > 0 or len(plan) < 2
        with ThreadPoolExecutor(1) as scoring:
            for items in tqdm(plan, desc="rollout", unit="batch", leave=False, disable=quiet, dynamic_ncols=True):
                paths.append(rollout(model, items, spec, self.seed, epoch))
                pixels = model.decode(paths[-1].x0)
                scored.append(scoring.submit(self.rewards, pixels, [item.prompt.text for item in items]))
            values = torch.stack([f.result() for f in scored], 1)
        self.unpaid += sum(map(len, plan)) * spec.num_inference_steps * self._branches
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

    def _weigh(
        self, plan: Sequence[Sequence[Item]], values: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """Advantages, rewards and what is kept, (blocks, B) of this process, from the values (names, blocks, B) of all."""
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
        total = self.rewards.total(grouped)
        facts = {
            "rollout/reward": total.nanmean().item(),
            "rollout/reward_std": within_groups(total),
            "rollout/epoch": float(epoch),
        }
        facts |= {f"rollout/{name}": r.nanmean().item() for name, r in rewards.items()}
        return mine(found.values.float()), mine(total.float()), mine(found.kept), facts | found.metrics

    # --- micro-batches ------------------------------------------------------------------------------------------------

    def _chunk(self, what: list[Any], inner: int, update: int) -> list[Any]:
        """The share of one update, shuffled anew in every use; all processes shuffle alike."""
        g = torch.Generator().manual_seed(item_seed(self.seed, f"update {self.epoch}", inner))
        order = torch.randperm(len(what), generator=g).tolist()
        return [what[i] for i in order[update :: self.spec.updates]]

    def _paths(self, inner: int, update: int) -> Iterator[StepBatch]:
        for block in self._chunk(self.blocks, inner, update):
            for start in range(0, len(block.items), self.batch_size):
                for slot in range(block.paths.std.shape[1]):
                    yield StepBatch(block, slice(start, start + self.batch_size), slot)

    def _images(self, inner: int, update: int) -> Iterator[Batch]:
        found = self._chunk(self._examples(), inner, update)
        mine = torch.tensor([float(len(found))])
        most = int(self.gather(mine).max().item())  # pairs are as many as groups that are no ties: processes differ
        total = self.gather(torch.tensor([float(sum(x.weight > 0 for x in found))])).sum().item()
        found += [replace(x, weight=0.0) for x in (self._examples(anything=True)[:1] * (most - len(found)))]
        for use in range(self.spec.repeats if most else 0):
            for start in range(0, most, self.batch_size):
                some = found[start : start + self.batch_size]
                scale = most * self.world / max(1.0, total)  # so that the mean is one over what counts
                yield self._batch([replace(x, weight=x.weight * scale) for x in some], (inner, use))

    def _examples(self, anything: bool = False) -> list[Example]:
        """What this process learns from: pairs by the rule, whole groups, or single images; ``anything`` of that shape."""
        k, out = self.spec.group_size, list[Example]()
        for block in self.blocks:
            for start in range(0, len(block.items), k):
                rewards = block.rewards[start : start + k].tolist()
                if self.data == "groups":
                    out.append(Example(block, tuple(range(start, start + k))))
                elif self.data != "pairs":
                    out += [Example(block, (i,)) for i in range(start, start + k) if anything or block.advantages[i] != 0]
                elif anything:
                    out.append(Example(block, (start, start + 1)))
                elif all(r == r for r in rewards):
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
            (
                tuple(p.text for p in prompts)
                if self.model.trains_texts
                else encode_once(self.model, [p.text for p in prompts]),
            ),
            torch.tensor([x.weight for x in some]),
            self.data,
            facts,
        )

    def _step_terms(self, model: Model, batch: StepBatch, needs: frozenset[Need], reference: str) -> StepTerms:
        """One step of stored trajectories under the policy, and under the reference if asked for."""
        rows, slot, settings = batch.rows, batch.slot, self.spec.rollout
        some, items = batch.block.paths[rows], batch.block.items[rows]

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
            images=len(items) if slot == 0 else 0,
            cost=len(items) * passes * self._branches,
        )

    def _read(self, block: Block, rows: slice | list[int]) -> tuple[Cond, Cond | None]:
        """The block's prompts, encoded as when it was sampled: all together, once for all its steps, in full precision."""
        if self._encoded[0] is not block or self.model.trains_texts:
            with torch.autocast(block.paths.x0.device.type, enabled=False):
                self._encoded = (block, *conditions(self.model, block.items, self.spec.rollout))
        _, cond, negative = self._encoded
        return cond[rows], None if negative is None else negative[rows]
