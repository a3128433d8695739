"""From the ``online`` section to a feed: prompts, rewards, and the checks that come before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.advantages import Advantages
from diffalign.data.prompts import Prompt, normalised
from diffalign.errors import ConfigError
from diffalign.evaluation import SHAPES_PROMPTS, known_scorers, prompts_of
from diffalign.objectives import Data, Need
from diffalign.objectives.listwise import RankDPO
from diffalign.objectives.policy import FlowDPPO, GRPOGuard, Reinforce
from diffalign.pairs import Agreement, Angle, BestSigma, BestWorst, Confident, Pareto, RankThenSift
from diffalign.rollout import check
from diffalign.rules import noisy
from diffalign.scorers import Scorer
from diffalign.scorers.wins import comparing
from diffalign.scoring import make_scorers
from diffalign.timesteps import Uniform
from diffalign.train.collecting import Collector
from diffalign.train.coupling import Coupling
from diffalign.train.online import Online
from diffalign.train.online_feed import OnlineFeed
from diffalign.train.references import Periodic
from diffalign.train.rewards import Rewards
from diffalign.train.stepwise import NEEDS, ForkCollector, StateFeed, StepwiseFeed

if TYPE_CHECKING:
    from diffalign.recipes import TrainConfig
    from diffalign.train.direct import Direct
    from diffalign.train.state import TrainState

log = logging.getLogger(__name__)

CLIP_OVER_NOISE = 10.0
"""The clip range must be this many times the largest |ratio - 1| of an unchanged policy, or it gates on rounding."""


OWN: dict[Data, frozenset[Need]] = {
    "steps": frozenset({"reference"}),
    "images": frozenset({"reference", "old", "residual", "distance", "average"}),
    "labels": frozenset({"reference", "distance"}),
    "groups": frozenset({"reference", "scores"}),
    "pairs": frozenset({"loser", "reference", "scores", "distance", "overlap"}),
}
"""What is known of the model's own samples, by what an objective is about."""
DOMINATES = 0.5
"""A step with more than this share of the squared gradient is trained almost alone."""
EXCESS = 0.1
"""Noise beyond the schedule that is worth a warning: a tenth of what sampling starts from."""
POOL = 2000
"""Prompts of the built-in world, which has no end, where ``num_prompts`` does not say."""


@dataclass(frozen=True)
class InMemory:
    """What a caller from Python has at hand in place of names in the configuration."""

    prompts: Sequence[Prompt] | None = None
    scorers: Sequence[Scorer] | None = None


def consistent(c: TrainConfig) -> None:
    """Refuse what cannot work between objective and rollout, with the remedy."""
    total, online = c.total, c.online
    names = total.names
    if online is None:
        if total.data in ("steps", "images") or total.needs & {"old", "residual"}:
            raise ValueError(f"{names} learns from the model's own samples: add the section online")
        return
    without_data(c, "online")
    scorers_exist(online.reward.scorers, "online")
    if compared := comparing(online.reward.scorers):
        together(c, online, compared[0])
    if ("average" in total.needs) != (online.average is not None):
        raise ValueError("online.average and objective.near of awm belong together: set both or none")
    if c.train.gradient_accumulation_steps > 1:
        raise ValueError(
            "online.updates says how many optimizer steps a rollout makes: drop train.gradient_accumulation_steps"
        )
    if online.group_size < 2 and (total.data in ("pairs", "groups") or online.advantages.baseline != "running"):
        raise ValueError("online.group_size 1 leaves nothing to compare: raise it, or set online.advantages.baseline=running")
    if said := uneven(online, total.data):
        raise ValueError(said)
    if total.data in ("pairs", "groups") and online.rollout.batch_size % online.group_size:
        raise ValueError(f"{names} needs whole groups: make online.rollout.batch_size a multiple of online.group_size")
    if total.data in ("pairs", "groups") and online.advantages.keep is not None:
        raise ValueError(f"{names} needs whole groups: drop online.advantages.keep")
    if any(isinstance(part, RankDPO) for part in total.parts):
        raise ValueError(
            "rank_dpo weighs by scores in [0, 1], but online gives advantages: take infonca, plackett_luce or pro"
        )
    if online.group_size < 2 and online.advantages.shaping == "win_rate":
        raise ValueError("online.advantages.shaping: win_rate compares images of a prompt: raise online.group_size above 1")
    if any(isinstance(p, Reinforce) for p in total.parts) and online.steps_per_rollout > 1:
        raise ValueError(
            "reinforce has no ratio to a policy that has moved on: set online.updates=1 and online.inner_epochs=1, or use ppo"
        )
    ordered = total.data in ("pairs", "labels") and "scores" not in total.needs
    if online.reward.confidence is not None and (ordered or online.credit == "state"):
        raise ValueError(f"online.reward.confidence weighs advantages, and {names} goes by order alone: drop it")
    if online.credit != "image":
        stepwise(c, online, names)
    elif more := sorted(total.needs - OWN.get(total.data, frozenset())):
        raise ValueError(f"{names} needs {', '.join(more)}, which online samples do not have: use another objective")
    if "residual" in total.needs and c.coupling.draws > 1:
        raise ValueError(f"{names} compares predictions at one time: drop coupling.draws; online.repeats has several")
    if "residual" in total.needs and c.timesteps.weighting != "none":
        raise ValueError(f"{names} has a weight of its own and does not read timesteps.weighting: drop it")
    pairing(online, total.data, names)
    if total.data == "pairs" and "scores" not in total.needs and online.advantages != Advantages():
        raise ValueError(f"{names} learns from pairs by online.rule and reads no advantages: drop online.advantages")
    if replays(c):
        if not noisy(online.rollout.rule):
            raise ValueError(
                f"{names} needs steps with noise, which online.rollout.rule {online.rollout.rule.model_dump(mode='json')} "
                "has none of: use ddim with eta, or flow_sde, dance_sde or cps with noise, above 0"
            )
        if c.coupling != Coupling():
            raise ValueError(f"coupling is about images that are noised again, but {names} learns from steps: drop coupling")
        if online.rollout.batch_size % c.train.per_device_train_batch_size:
            raise ValueError(
                f"online.rollout.batch_size {online.rollout.batch_size} must be a multiple of "
                f"train.per_device_train_batch_size {c.train.per_device_train_batch_size}: steps are replayed in its parts"
            )
        if online.repeats > 1 or c.timesteps != Uniform():
            raise ValueError(f"repeats and timesteps re-noise images, but {names} learns from the steps themselves: drop them")


def uneven(online: Online, data: Data, world: int = 1) -> str | None:
    """What is wrong where processes and updates cannot have alike of a rollout's blocks."""
    if online.blocks % world == 0 and (data != "steps" or online.blocks // world % online.updates == 0):
        return None
    return (
        f"online: {online.blocks} x {online.rollout.batch_size} images of a rollout cannot be shared evenly by "
        f"{online.updates} updates on {world} process{'es' if world > 1 else ''}: change online.prompts_per_rollout, "
        "online.rollout.batch_size or online.updates"
    )


def replays(c: TrainConfig) -> bool:
    """Whether steps of trajectories are trained on, rather than images."""
    return c.online is not None and (c.total.data == "steps" or c.online.credit != "image")


def pairing(online: Online, data: Data, names: str) -> None:
    """Refuse a rule of pairs that is not asked, or that could find none."""
    rule = online.rule
    said = f"online.rule: {getattr(rule, 'type', type(rule).__name__)}"
    if data != "pairs" and rule != BestWorst():
        raise ValueError(f"{said} picks pairs, but {names} is about {data}: drop online.rule")
    if isinstance(rule, RankThenSift | Angle | Pareto | Agreement):
        raise ValueError(f"{said} compares single scores, and here only their weighted sum is kept: use best_worst or another")
    if isinstance(rule, Confident) and online.group_size < rule.min_images:
        raise ValueError(f"{said} asks for {rule.min_images} images: raise online.group_size, or lower online.rule.min_images")


def together(c: TrainConfig, online: Online, name: str) -> None:
    """Refuse what asks for the reward of images without their group, where it is a comparison with that."""
    if online.rollout.batch_size % online.group_size or online.group_size < 2:
        raise ValueError(f"{name} compares whole groups: make online.rollout.batch_size a multiple of a group_size above 1")
    wrong = {
        "online.oversample": online.oversample is not None,
        "online.advantages.shaping: par": online.advantages.shaping == "par",
        "online.reward.on_error: retry": online.reward.on_error == "retry",
        "watch.limits.reward": c.watch is not None and "reward" in c.watch.limits,
    }
    for said in [key for key, there in wrong.items() if there]:
        raise ValueError(f"{name} compares the images of a group, and {said} is about single ones: drop it")


def scorers_exist(names: list[str], section: str) -> None:
    """Refuse names of no scorer, with their key."""
    try:
        known_scorers(names)
    except ValueError as e:
        raise ValueError(f"{section}.reward.scorers: {e}") from e


def stepwise(c: TrainConfig, online: Online, names: str) -> None:
    """Refuse what pairs of steps cannot be or tell."""
    said = f"online.credit: {online.credit}"
    if c.total.data != "pairs":
        raise ValueError(f"{said} is for losses on pairs, but {names} is about {c.total.data}: drop online.credit")
    if more := sorted(c.total.needs - NEEDS):
        raise ValueError(f"{said} gives no {', '.join(more)}, which {names} needs: use online.credit=image or another loss")
    if online.credit == "state":
        if not isinstance(online.rule, BestWorst | BestSigma):
            raise ValueError(f"{said} keeps one pair of each state: use online.rule.type=best_worst or best_sigma")
        if online.oversample is not None:
            raise ValueError(f"{said} compares steps, and online.oversample chooses images: drop online.oversample")
        if online.advantages != Advantages():
            raise ValueError(f"{said} compares previews by their rewards alone: drop online.advantages")
    elif c.train.per_device_train_batch_size % online.group_size:
        raise ValueError(
            f"{said} needs whole groups of {online.group_size}: make train.per_device_train_batch_size a multiple of it"
        )


def without_data(c: TrainConfig, section: str) -> None:
    """Refuse what is about stored examples where a section samples its own."""
    if "data" in c.model_fields_set:
        raise ValueError(f"data is about stored examples, but {section} samples its own: drop data")
    stored = c.train.caption_dropout or c.train.balance_kinds is not None
    if stored or c.coupling.captions == "own" or c.coupling.noise in ("stored", "inverted", "replay"):
        raise ValueError(
            "caption_dropout, balance_kinds, coupling.captions: own, and stored, inverted or replayed noise are about stored "
            "examples: drop them"
        )
    if isinstance(c.reference, Periodic) and c.reference.max_drift is not None:
        raise ValueError(f"reference.max_drift is measured on stored winners, which {section} has none of: drop it")
    if c.train.metric_for_best.startswith("heldout/") and (c.train.early_stopping_patience or c.train.load_best):
        raise ValueError(f"{section} holds out no pairs: set train.metric_for_best=select/score or a value of watch")


def own_prompts(
    config: TrainConfig, spec: Online | Direct, asked: Sequence[Prompt], section: str, given: Sequence[Prompt] | None = None
) -> list[Prompt]:
    """The prompts of a section that samples its own: none that is evaluated on. Those ``given`` stand in for the source.

    Raises:
        ConfigError: there are no others.
    """
    said = {normalised(p.text) for p in asked}
    limit = spec.num_prompts or (POOL if SHAPES_PROMPTS.fullmatch(spec.prompts) else None)
    found = (
        given[: spec.num_prompts] if given else prompts_of(spec.prompts, limit, config.train.seed, config.evaluate.split_salt)
    )
    prompts = [p for p in found if normalised(p.text) not in said]
    if not prompts:
        raise ConfigError(f"{section}.prompts: all of them are evaluated on", hint="use other prompts")
    return prompts


def online_feed(
    config: TrainConfig,
    state: TrainState,
    asked: Sequence[Prompt],
    bare: Callable[[], AbstractContextManager[None]],
    write: Callable[[int, dict[str, float]], object],
    given: InMemory,
) -> OnlineFeed:
    """The feed of a run, whose prompts are none that are evaluated on.

    Raises:
        ConfigError: settings that do not fit the model or the number of processes.
    """
    spec, s, acc, model = config.online, config.train, state.accelerator, state.model
    assert spec is not None
    total, world = config.total, acc.num_processes
    if said := uneven(spec, total.data, world):
        raise ConfigError(said)
    prompts = own_prompts(config, spec, asked, "online", given.prompts)
    steps = check(model, spec.rollout, prompts)
    if replays(config) and steps == 0:
        raise ConfigError(
            f"online.rollout: none of the {spec.rollout.num_inference_steps} steps has a density to train",
            hint="raise online.rollout.num_inference_steps",
        )
    collector = (ForkCollector if spec.credit == "state" else Collector)(
        model,
        prompts,
        spec,
        Rewards(spec.reward, given.scorers or make_scorers(spec.reward.scorers, together=True), Path(config.output_dir)),
        replays=replays(config),
        # steps keep the means that they were drawn from
        follows=spec.old is not None or (spec.credit == "image" and "old" in total.needs),
        seed=s.seed,
        rank=acc.process_index,
        world=world,
        gather=lambda x: acc.gather(x.to(acc.device)).to(x.device),  # rewards are on the CPU, where no GPU backend gathers
        bare=bare,
    )
    kind = {"image": OnlineFeed, "state": StateFeed}.get(spec.credit, StepwiseFeed)
    batch_size, coupling = s.per_device_train_batch_size, config.coupling
    return kind(collector, config.timesteps, data=total.data, batch_size=batch_size, coupling=coupling, log=write)


def check_ratio(
    config: TrainConfig, feed: OnlineFeed, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, float]:
    """Replay one rollout as training will, say what was found, and refuse to train where rounding would fill the clip range.

    Raises:
        ConfigError: a clip range is below ``CLIP_OVER_NOISE`` times the largest |ratio - 1|, or Flow-DPPO's tau below as much
            of the largest KL.
    """
    import click

    found = feed.collector.preflight(feed.batch_size, autocast)
    guarded = any(isinstance(o, GRPOGuard) for o in config.total.parts)
    largest = max(found.share)
    if feed.collector.rank == 0:
        shares = ", ".join(f"{n}: {100 * share:.1f}" for n, share in zip(found.trained, found.share, strict=True))
        click.echo(f"preflight: the unchanged policy, replayed, has |ratio - 1| up to {found.ratio_error:.3g}", err=True)
        click.echo(f"preflight: trained steps, and each one's share of the squared gradient in %: {shares}", err=True)
        if largest > DOMINATES and len(found.trained) > 2 and not guarded:
            log.warning(
                "step %d has %.0f %% of the squared gradient: leave it out by online.rollout.window, or weigh steps alike by "
                "objective.type=grpo_guard",
                found.trained[found.share.index(largest)],
                100 * largest,
            )
        if found.excess > EXCESS:
            log.warning(
                "trained steps leave noise of %.2f beyond the schedule, which rewards see: lower the noise of "
                "online.rollout.rule, or use cps",
                found.excess,
            )
    for o in config.total.parts:
        ratio = found.guard_error if isinstance(o, GRPOGuard) else found.ratio_error
        held = {"clip_range": ratio, "clip_range_high": ratio} | ({"tau": found.kl_error} if isinstance(o, FlowDPPO) else {})
        for name, error in held.items():
            limit = getattr(o, name, None)
            if limit is not None and limit < CLIP_OVER_NOISE * error:
                said = "KL" if name == "tau" else "|ratio - 1|"
                raise ConfigError(
                    f"objective.{name} {limit:g} is below {CLIP_OVER_NOISE:g} times {error:.3g}, the largest {said} "
                    "of a policy that has not changed: it would gate on rounding",
                    hint="widen it, or replay as sampled: train.per_device_train_batch_size = online.rollout.batch_size, "
                    "mixed_precision no, guidance_scale 1",
                )
    return {"ratio_noise": found.ratio_error, "noise_excess": found.excess, "largest_step_share": largest}
