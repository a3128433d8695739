"""What the loop asks for between its steps: held-out values, looks, and how far a moving reference has gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffalign.data.prompts import Prompt
from diffalign.evaluation import prompts_of
from diffalign.models import Model
from diffalign.objectives import metrics_of
from diffalign.scorers import Scorer
from diffalign.train.evaluate import evaluate, heldout_pairs
from diffalign.train.feeds import Feed, Offline
from diffalign.train.references import MOVING
from diffalign.train.state import TrainState

if TYPE_CHECKING:
    from diffalign.recipes import TrainConfig


@contextmanager
def unwrapped(state: TrainState) -> Iterator[None]:
    """The bare network in place of the distributed one, whose forward pass would wait for the other processes."""
    model = state.model
    wrapped, model.net = model.net, state.accelerator.unwrap_model(model.net)
    try:
        yield
    finally:
        model.net = wrapped


def final_weights(model: Model, name: str | None) -> Any:
    """Run with a snapshot, or with the weights as they are."""
    return nullcontext() if name is None else model.weights(name)


def select_prompts(c: TrainConfig) -> list[Prompt]:
    """Those that the best weights go by, where they go by them."""
    e = c.evaluate
    if c.train.metric_for_best != "select/score":
        return []
    return prompts_of("shapes:select", e.select_prompts, 0, e.split_salt, e.negative_prompt)


@dataclass
class Between:
    """Measures of a run, by the weights that would be exported now."""

    config: TrainConfig
    state: TrainState
    feed: Feed
    held: Offline | None
    scorers: Sequence[Scorer]
    watcher: Callable[[int], dict[str, float]] | None

    @contextmanager
    def _exported(self) -> Iterator[Model]:
        model = self.state.model
        with unwrapped(self.state), final_weights(model, "ema" if self.config.train.ema_decay else None):
            yield model

    def heldout(self) -> dict[str, float]:
        """Losses on the pairs held out, and the score on select prompts if the best weights go by it."""
        c, values = self.config, dict[str, float]()
        with self._exported() as model:
            if self.held is not None:
                values |= heldout_pairs(model, self.held, c.total, self.state.objective)
            if selected := select_prompts(c):
                e = c.evaluate
                model.stage("sample")
                result = evaluate(model, selected, self.scorers, e.sampling, per_prompt=e.images_per_prompt, seed=e.seed)
                model.stage(self.config.trains_at)
                values["select/score"] = result.score.mean().item()
        return values

    def watch(self) -> dict[str, float]:
        """One process looks, and all go by what it sees."""
        from accelerate.utils import broadcast_object_list

        if self.watcher is None:
            return {}
        seen: list[dict[str, float]] = [{}]
        if self.state.accelerator.is_main_process:
            with self._exported() as model:
                model.stage("sample")
                seen = [self.watcher(self.state.step)]
                model.stage(self.config.trains_at)
        return broadcast_object_list(seen)[0]

    @torch.no_grad()
    def drift(self) -> float:
        """|error under the moving reference - error under the base|, the mean over one fixed batch of winners."""
        assert isinstance(self.feed, Offline)
        model, batch = self.state.model, next(self.feed.fixed())
        with unwrapped(self.state), model.weights(MOVING):
            terms = self.feed.terms(model, batch, frozenset({"reference"}))
        gone = metrics_of(terms)["drift/winner"]
        return gone[gone.isfinite()].mean().abs().item()
