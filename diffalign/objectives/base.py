"""What an objective is given and what it returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from diffalign.spec import Spec

Data = Literal["pairs", "labels", "groups", "steps", "images", "rewards"]
Need = Literal["loser", "reference", "p_win", "scores", "distance", "overlap", "old", "residual", "average"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all kinds of terms hold. Errors are means over dimensions in fp32; the reference sees the same (t, eps)."""

    t: Tensor | None = None
    """(B,) times as fractions of the schedule, 0 clean and 1 noise."""
    weight: Tensor | None = None
    """(B,) weights, mean about 1; the loop multiplies the loss by them."""
    group: Tensor | None = None
    """(B,) int64 place of each row's group, where the rows are told apart by whom they come from."""
    distance: Tensor | None = None
    """(B,) mean square of f - f_ref on the winner, or on the image: twice the KL to the reference at t. With gradient."""
    images: int = 0
    """Images that were trained on."""
    cost: int = 0
    """Denoiser passes of one image: one per forward, two per backward, of every network."""


@dataclass(frozen=True)
class PairTerms(Terms):
    """Denoise errors of B pairs, each (B,). What the objective did not ask for is None."""

    winner: Tensor
    loser: Tensor | None = None
    ref_winner: Tensor | None = None
    ref_loser: Tensor | None = None
    p_win: Tensor | None = None
    """(B,) how likely a rater prefers the winner, 0.5 to 1."""
    score_winner: Tensor | None = None
    score_loser: Tensor | None = None
    """(B,) external rewards."""
    old_winner: Tensor | None = None
    old_loser: Tensor | None = None
    """(B,) errors under the policy that sampled the pair."""
    log_ratios: Tensor | None = None
    """(B, S, 2) log p - log p_old of each step, of winner and loser, where a row is the sum of S steps. With gradient."""
    overlap: Tensor | None = None
    """(B,) mean product of winner's and loser's residuals, detached."""
    kind: Tensor | None = None
    """(B,) which of two kinds of pairs each is, 0 or 1."""


@dataclass(frozen=True)
class LabelTerms(Terms):
    """Denoise errors of B single images, (B,) each, and which of them are good, (B,) bool."""

    error: Tensor
    good: Tensor
    ref: Tensor | None = None


@dataclass(frozen=True)
class GroupTerms(Terms):
    """Denoise errors and external rewards of K images for each of B prompts, (B, K) each."""

    error: Tensor
    scores: Tensor
    ref: Tensor | None = None


@dataclass(frozen=True)
class StepTerms(Terms):
    """B steps x_t to x_next of stochastic trajectories, (B,) each, under the policy, the one that sampled and the reference.

    A step is N(mu, std^2) around the policy's mean. Means over dimensions, in fp32, as everywhere else.
    """

    log_ratio: Tensor
    """log p(x_next) - log p_old(x_next) = mean[(mu - mu_old)(2 x_next - mu - mu_old)] / (2 std^2), exactly 0 where the policy
    is the one that sampled. With gradient."""
    advantage: Tensor
    kl_old: Tensor
    """KL of the step to the policy that sampled, mean (mu - mu_old)^2 / (2 std^2). With gradient."""
    std: Tensor
    dt: Tensor
    """Length of the step as a share of the path, above 0: |sigma_next - sigma| on a flow path."""
    kl_ref: Tensor | None = None
    """The same to the reference. With gradient."""


@dataclass(frozen=True)
class ImageTerms(Terms):
    """Denoise errors of B images that a policy made, noised again, and the advantage of each, (B,) each."""

    error: Tensor
    advantage: Tensor
    old: Tensor | None = None
    """Error under the policy that sampled, at the same (t, eps)."""
    ref: Tensor | None = None
    residual: Tensor | None = None
    residual_old: Tensor | None = None
    """(B, D) x0_hat - x0, of the policy (with gradient) and of the one that sampled."""
    distance_average: Tensor | None = None
    """(B,) as ``distance``, to the average of the policy. With gradient."""
    time: Tensor | None = None
    """(B,) what the network is told, 0 clean to 1 noise: sigma on a flow path, after the scheduler's shift; else ``t``."""


@dataclass(frozen=True)
class RewardTerms(Terms):
    """Differentiable rewards of B images, (B,), or (B, R) where several count each for itself. With gradient."""

    reward: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    """Name to (B,): the scorers' own numbers, to be logged."""


@dataclass(frozen=True)
class LossOutput:
    """``loss`` (B,), before the mean; ``metrics`` name to (B,), detached; ``state`` for the next call."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class Objective(Spec):
    """A loss over preference terms. The configuration is the object: frozen fields and a pure call."""

    data: ClassVar[Data] = "pairs"
    """What is trained on: pairs (:class:`PairTerms`), labels (:class:`LabelTerms`) or groups (:class:`GroupTerms`); of the
    policy's own samples, steps (:class:`StepTerms`), images (:class:`ImageTerms`) or rewards (:class:`RewardTerms`)."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    paper: ClassVar[str] = ""
    """Where the formula comes from."""
    checked: ClassVar[str] = ""
    """What the tests compare it with."""
    by_row: ClassVar[bool] = True
    """Whether each row's loss depends on that row alone."""
    held: ClassVar[bool] = False
    """Whether a factor of the loss is held constant, so that its gradient is not that of its value."""

    in_rewards: ClassVar[bool] = False
    """Whether of errors it reads e_ref - e alone, so that they may be signed (``data.maps: segments``)."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of this loss where several are summed."""

    @abstractmethod
    def __call__(self, terms: Any, state: dict[str, Tensor]) -> LossOutput:
        """Losses of the rows; what must survive the call goes in and out as ``state`` and is checkpointed by the loop."""


class Rewarded(Objective):
    """A loss in reward units: r = kappa beta (e_ref - e_policy), without further powers of beta."""

    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference; not comparable across resolutions, latent sizes or prediction types."""
    kappa: float = Field(default=0.5, gt=0)
    """1/2 in the authors' code and in diffusers' SDXL script, 1 in diffusers' SD script."""

    @property
    def scale(self) -> float:
        """Reward per unit of error."""
        return self.kappa * self.beta


def require(value: Tensor | None, name: str) -> Tensor:
    """An optional term that this objective needs; a missing one is a mistake in its ``needs``."""
    if value is None:
        raise ValueError(f"the objective uses '{name}' without naming it in its needs")
    return value


@dataclass(frozen=True)
class Total:
    """Several objectives as one: the sum of their losses times their weights.

    ``protect`` is the mu of :func:`diffalign.objectives.safeguards.protected`, which is done before; ``balance`` the decay of
    :func:`diffalign.objectives.safeguards.balanced`, done after.

    Raises:
        ValueError: they are about different kinds of data.
    """

    parts: tuple[Objective, ...]
    protect: float | None = None
    balance: float | None = None

    def __post_init__(self) -> None:
        if len({p.data for p in self.parts}) > 1:
            said = ", ".join(f"{getattr(p, 'type', type(p).__name__)} is about {p.data}" for p in self.parts)
            raise ValueError(f"objectives of different data cannot be summed: {said}; keep those of one kind")

    @property
    def names(self) -> str:
        return " + ".join(str(getattr(p, "type", type(p).__name__)) for p in self.parts)

    @property
    def data(self) -> Data:
        return self.parts[0].data

    @property
    def needs(self) -> frozenset[Need]:
        more: frozenset[Need] = frozenset() if self.protect is None else frozenset({"loser", "overlap"})
        return more.union(*(p.needs for p in self.parts))

    def __call__(self, terms: Terms, state: dict[str, Tensor]) -> LossOutput:
        if self.protect is not None and isinstance(terms, PairTerms):
            from diffalign.objectives.safeguards import protected

            terms = protected(terms, self.protect)
        outs = []
        for i, part in enumerate(self.parts):
            own = {k.removeprefix(f"{i}/"): v for k, v in state.items() if k.startswith(f"{i}/")}
            outs.append(part(terms, own))
        loss = sum((p.weight * o.loss for p, o in zip(self.parts, outs, strict=True)), start=0 * outs[0].loss)
        metrics = {k: v for o in outs for k, v in o.metrics.items()}
        after = {f"{i}/{k}": v for i, o in enumerate(outs) for k, v in o.state.items()}
        if self.balance is not None and isinstance(terms, PairTerms):
            from diffalign.objectives.safeguards import balanced

            loss, seen, kept = balanced(loss, require(terms.kind, "kind"), state.get("kinds"), self.balance)
            metrics, after = metrics | seen, after | {"kinds": kept}
        return LossOutput(loss, metrics, after)
