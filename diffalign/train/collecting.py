"""What an epoch of the online methods begins with: images that are sampled, scored and weighed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.advantages import History
from diffalign.data.images import to_uint8
from diffalign.data.prompts import Prompt
from diffalign.models import Model
from diffalign.oversample import Oversample, preselect
from diffalign.preflight import Preflight, preflight
from diffalign.rollout import Trajectories, evaluations, rollout
from diffalign.sampling import Item
from diffalign.train.online import AVERAGE, OLD, STANDARDS, Online
from diffalign.train.rewards import Rewards
from diffalign.train.samples import Block, follow, prompt_at, within_groups


class Collector:
    """One rollout an epoch: ``prompts_per_rollout`` groups of ``group_size`` images, made in fixed blocks whose seeds belong
    to the items, so that any number of processes sees the same trajectories.
    """

    made_of: ClassVar[type[Block]] = Block

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        spec: Online,
        rewards: Rewards,
        *,
        replays: bool,
        follows: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
        bare: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.prompts, self.spec, self.rewards = model, list(prompts), spec, rewards
        self.replays, self.follows, self.seed = replays, follows, seed
        self.rank, self.world, self.gather, self.bare = rank, world, gather, bare
        self.epoch = -1
        self.picked: list[list[int]] = []
        """The k of each item of the plan, where previews choose it."""
        self.history: History = {}
        """Past rewards of each prompt."""
        self.standards: dict[str, list[list[float]]] = {}
        """Rewards of the reference's own samples of each prompt: name by name."""
        self.unpaid = 0
        """Denoiser passes of the last rollout that no terms have been charged with yet."""

    @torch.no_grad()
    def __call__(self, epoch: int) -> tuple[list[Block], dict[str, float]]:
        """This process's blocks of an epoch, and what is written down of all of them."""
        spec = self.spec
        self._follow(epoch)
        with self._sampling():
            self.picked = [] if spec.oversample is None else self._previewed(spec.oversample, epoch)
            plan = self._chosen(epoch)
            paths, values = self._sampled(plan, epoch)
        if spec.advantages.shaping == "par":
            with self._sampling("reference"):
                self._set_standards(plan)
        advantages, rewards, facts = self._weigh(plan, values, epoch)
        self.epoch = epoch
        return [Block(*parts) for parts in zip(plan, paths, advantages, rewards, strict=True)], facts

    def state(self) -> dict[str, Any]:
        """All that the next epoch needs beside the policy."""
        names = ("epoch", "picked", "history", "standards", "unpaid")
        kept = {name: getattr(self, name) for name in names} | {"calls": self.rewards.calls}
        return kept | ({} if self.epoch < 0 else {"made_from": self._made_from()})

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`state` gave."""
        self.epoch, self.picked, self.rewards.calls = state["epoch"], state["picked"], state["calls"]
        self.history, self.standards, self.unpaid = state["history"], state["standards"], state.get("unpaid", 0)

    def blocks(self, saved: Sequence[dict[str, Any]], made_from: str | None = None) -> list[Block]:
        """Blocks of the last epoch that was begun, from their states and :meth:`state`'s word of what they were made from.

        Raises:
            ValueError: they were made for other prompts, or by other settings.
        """
        if saved and made_from not in (None, self._made_from()):
            raise ValueError(
                "images of a rollout are left that were made for other prompts, or with another online.rollout or number of "
                "updates"
            )
        plan = self._chosen(self.epoch) if saved else []
        return [self.made_of.of(items, state) for items, state in zip(plan, saved, strict=True)]

    def _made_from(self) -> str:
        """A digest of the items of the last epoch that was begun, and of what makes and divides them."""
        items = [(item.prompt.id, item.prompt.text, item.k) for block in self._chosen(self.epoch) for item in block]
        spec = self.spec
        said = (items, spec.rollout.model_dump_json(), spec.updates, spec.inner_epochs)
        return sha256(repr(said).encode()).hexdigest()[:16]

    def charge(self) -> int:
        """The passes that are not paid yet, once."""
        due, self.unpaid = self.unpaid, 0
        return due

    def preflight(self, batch_size: int, autocast: Callable[[], AbstractContextManager[Any]]) -> Preflight:
        """The first block of the first rollout, replayed as training will; the largest errors of all processes."""
        spec, items = self.spec.rollout, self._plan(0)[0]
        found = preflight(self.model, items, spec, self.seed, batch_size, autocast, bare=self.bare)
        names = ("ratio_error", "guard_error", "kl_error")
        worst = self.gather(torch.tensor([[getattr(found, name) for name in names]])).amax(0).tolist()
        return replace(found, **dict(zip(names, worst, strict=True)))

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
            self.unpaid += len(groups) * how.candidates * how.steps * self.branches
        return out

    def _follow(self, epoch: int) -> None:
        """Bring the policy that samples up to date, where it is not the trained one or is asked for, and the average."""
        spec, weights = self.spec, self.model.named_weights
        if self.follows:
            follow(weights, OLD, 0.0 if spec.old is None else spec.old.decay(epoch))
        if spec.average is not None:
            follow(weights, AVERAGE, spec.average.decay(epoch))

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
        self.unpaid += made * self.branches
        return paths, values

    def _set_standards(self, plan: Sequence[Sequence[Item]]) -> None:
        """Rewards of ``STANDARDS`` samples of the reference for prompts that have none yet; always the same ones."""
        new = {item.prompt.id: item.prompt for items in plan for item in items if item.prompt.id not in self.standards}
        for name, prompt in new.items():
            _, values = self._sampled([[Item(prompt, k) for k in range(STANDARDS)]], -1)
            self.standards[name] = values[:, 0].tolist()

    @property
    def branches(self) -> int:
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
        if self.rewards.spec.confidence is not None:  # without one a sample counts as one without a reward
            grouped = grouped.where(grouped[-1].isfinite(), torch.nan)
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
