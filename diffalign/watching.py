"""From the ``watch`` section to a watcher: prompts, scorers, and which values there are to put limits on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from diffalign.data.prompts import Prompt
from diffalign.errors import ConfigError
from diffalign.evaluation import EvaluateSpec, asked_of, known_scorers
from diffalign.scorers import SCORERS
from diffalign.scorers.combine import COMBINED, members_of
from diffalign.scorers.vlm import judges
from diffalign.scoring import ShapesScorer, make_scorers
from diffalign.spec import Spec, did_you_mean
from diffalign.train.watch import PREFIX, STATISTICS, Judge, Limit, Watcher

if TYPE_CHECKING:
    from diffalign.models import Model
    from diffalign.recipes import TrainConfig
    from diffalign.scorers import Scorer
    from diffalign.train.rewards import RewardSpec

SEVERAL = ("geneval", "vlm-questions")
"""Scorers of the list that give more than a value of their own name."""


class Watch(Spec):
    """The ``watch`` section: what is looked at before the first step and every ``train.eval_steps``.

    Pictures are made as ``evaluate.sampling`` says, with ``evaluate.seed`` and the weights that would be exported.
    """

    prompts: str = "shapes:select"
    """A prompt file, a hub dataset, an evaluation suite, or a split of the built-in world; none of them is trained on."""
    num_prompts: int = Field(default=16, ge=1)
    images_per_prompt: int = Field(default=2, ge=1)
    """Two at least, or there is no diversity to see."""
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    """As ``evaluate.scorers``; other ones than the training reward, or there is nothing that the reward could be wrong by."""
    limits: dict[str, Limit] = {}
    """Value to ``{below: x}``, ``{above: x}`` or ``{drop: share}``, with ``action: warn`` or ``stop``."""

    _known = field_validator("scorers")(known_scorers)


def values_of(scorer: str) -> set[str] | None:
    """The values that a scorer gives; None of scorers that have to be asked."""
    kind, _, rest = scorer.partition(":")
    if scorer == "shapes":
        return {*ShapesScorer.summary, *ShapesScorer.kinds}
    if kind == "taste":
        return {f"taste_{rest}"}
    if kind in COMBINED:
        return set(COMBINED[kind])
    return {kind} if kind in {*SCORERS, *judges()} - {*SEVERAL} else None


def given_by(scorers: Sequence[str]) -> set[str] | None:
    """The values that scorers give together; None if one of them has to be asked."""
    found = [values_of(scorer) for scorer in scorers]
    return None if None in found else set().union(*(values for values in found if values is not None))


def consistent(c: TrainConfig) -> None:
    """Refuse rewards, limits and a best checkpoint by values that there are not, or that training itself pushes up."""
    if c.online is not None:
        _check_rewards(c.online.reward)
    best = c.train.metric_for_best
    if best.startswith(PREFIX) and c.watch is None:
        raise ValueError(f"train.metric_for_best is {best}, but nothing is watched: add the section watch")
    value: str | None
    if best.startswith(PREFIX) and c.watch is not None:
        value, among = best.removeprefix(PREFIX).removesuffix("_std"), c.watch.scorers
    else:
        value, among = _selected(c) if best == "select/score" else None, c.evaluate.scorers
    if value is not None and value in {"reward", *_trained(c, among)}:
        raise ValueError(
            f"train.metric_for_best is {best}, which training pushes up whatever it is worth: name watch/VALUE of a scorer "
            f"that is not in {_rewarded(c) or 'online'}.reward.scorers, and add it to watch.scorers"
        )
    if c.watch is None:
        return
    if (scored := given_by(c.watch.scorers)) is not None:
        _check_names(c, scored, _rewarded(c) is not None)


def _check_rewards(reward: RewardSpec) -> None:
    """Refuse names that none of the scorers gives."""
    given = given_by(reward.scorers)
    if given is None:
        return
    wanted = [("weights", name) for name in reward.weights]
    wanted += [("confidence", reward.confidence)] if reward.confidence is not None else []
    for key, name in wanted:
        if name not in given:
            near = f"{did_you_mean(name, given)}; given: {', '.join(sorted(given))} (null takes a name out)"
            raise ValueError(f"online.reward.{key}: no scorer gives {name!r}{near}")


def _rewarded(c: TrainConfig) -> str | None:
    """The section whose reward is trained on."""
    return next((section for section in ("online", "direct") if getattr(c, section, None) is not None), None)


def _trained(c: TrainConfig, scorers: Sequence[str]) -> set[str]:
    """Values of ``scorers`` that are parts of the training reward."""
    found, section = set[str](), _rewarded(c)
    if section is None:
        return found
    reward = getattr(c, section).reward
    for scorer in set(reward.scorers) & set(scorers):
        given = values_of(scorer)
        if section == "direct":  # where all that is scored counts, and weights are factors
            found |= given or set()
        else:
            found |= set(reward.weights) if given is None else given.intersection(reward.weights)
    joined = {member for scorer in reward.scorers for member in members_of(scorer)} - set(reward.scorers)
    return found.union(*(values_of(scorer) or set() for scorer in joined & set(scorers)))


def _selected(c: TrainConfig) -> str | None:
    """The value that select/score is: the judge's, or the first; None where the scorers have to be asked."""
    given = [values_of(scorer) for scorer in c.evaluate.scorers]
    if any(values is not None and "score" in values for values in given):
        return "score"
    first = given[0]
    return min(first) if first is not None and len(first) == 1 else None


def _check_names(c: TrainConfig, scored: set[str], rewarded: bool) -> None:
    """Refuse names in limits and ``metric_for_best`` that are neither statistics, nor of ``scored``, nor the reward."""
    assert c.watch is not None
    known = {*STATISTICS, *(n for s in (*scored, *("reward",) * rewarded) for n in (s, f"{s}_std"))}
    if c.watch.images_per_prompt < 2:
        known.discard("diversity")
    asked = {f"watch.limits.{name}": name for name in c.watch.limits}
    if c.train.metric_for_best.startswith(PREFIX):
        asked["train.metric_for_best"] = c.train.metric_for_best.removeprefix(PREFIX)
    for key, name in asked.items():
        if name == "diversity" and name not in known:
            raise ValueError(f"{key}: diversity needs watch.images_per_prompt of 2 or more")
        if name not in known:
            raise ValueError(
                f"{key}: nothing called {name!r} is watched{did_you_mean(name, known)}; {', '.join(sorted(known))}"
            )


def watched_prompts(c: TrainConfig, model: Model) -> list[Prompt]:
    """What the watcher asks for; none where nothing is watched.

    Raises:
        ConfigError: the model or a scorer cannot take them.
    """
    return [] if c.watch is None else asked_of(_as_evaluation(c), model, "watch")


def _as_evaluation(c: TrainConfig) -> EvaluateSpec:
    assert c.watch is not None
    own = c.watch.model_dump(include={"prompts", "num_prompts", "images_per_prompt", "scorers"})
    return c.evaluate.model_copy(update=own)


def make_watcher(
    c: TrainConfig, model: Model, prompts: Sequence[Prompt], reward: Judge | None, made: Mapping[str, Scorer]
) -> Callable[[int], dict[str, float]] | None:
    """A watcher; None where nothing is watched. ``made`` are scorers that there are already, ``reward`` that of training."""
    if c.watch is None:
        return None

    def check(values: Mapping[str, float]) -> None:
        scored = {n.removeprefix(PREFIX) for n in values} - {"reward", *STATISTICS}
        try:
            _check_names(c, {n for n in scored if not n.endswith("_std")}, f"{PREFIX}reward" in values)
        except ValueError as e:
            raise ConfigError(str(e)) from e

    return Watcher(
        model,
        prompts,
        make_scorers(c.watch.scorers, made=made),
        c.evaluate.sampling,
        Path(c.output_dir),
        per_prompt=c.watch.images_per_prompt,
        seed=c.evaluate.seed,
        reward=reward,
        check=check,
    )
