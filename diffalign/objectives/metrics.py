"""What is always logged about pairs, whatever the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.objectives.base import GroupTerms, ImageTerms, LabelTerms, PairTerms, RewardTerms, StepTerms, Terms

QUARTILES = ("q1", "q2", "q3", "q4")


def pair_metrics(terms: PairTerms) -> dict[str, Tensor]:
    """Drift of winner and loser, margin and accuracy, (B,) each, as far as the terms allow.

    Drift is e_policy - e_ref, so that a winner that gets worse shows above 0 (likelihood displacement). The margin is
    (e_ref - e)_w - (e_ref - e)_l in units of error, without beta; without a reference it is e_l - e_w. Accuracy counts
    ties one half. Margin and accuracy come again for each quarter of the timesteps, ``q1`` the least noisy.
    """
    out: dict[str, Tensor] = {"error/winner": terms.winner}
    margin: Tensor | None = None
    if terms.ref_winner is not None:
        out["drift/winner"] = terms.winner - terms.ref_winner
    if terms.loser is not None:
        out["error/loser"] = terms.loser
        margin = terms.loser - terms.winner
        if terms.ref_winner is not None and terms.ref_loser is not None:
            out["drift/loser"] = terms.loser - terms.ref_loser
            margin = out["drift/loser"] - out["drift/winner"]
    if margin is not None:
        out["margin"] = margin
        out["accuracy"] = (margin > 0).float() + 0.5 * (margin == 0).float()
        if terms.t is not None:
            quarter = (terms.t * 4).long().clamp(0, 3)
            for i, name in enumerate(QUARTILES):
                for key in ("margin", "accuracy"):
                    out[f"{key}/{name}"] = out[key].masked_fill(quarter != i, float("nan"))
    return {k: v.detach() for k, v in out.items()}


def label_metrics(terms: LabelTerms) -> dict[str, Tensor]:
    """Errors and drifts of good and bad images, NaN on the others, and accuracy: good ones must drift down."""
    good, bad = terms.good, ~terms.good
    nan = float("nan")
    out = {"error/good": terms.error.masked_fill(bad, nan), "error/bad": terms.error.masked_fill(good, nan)}
    if terms.ref is not None:
        drift = terms.error - terms.ref
        out |= {"drift/winner": drift.masked_fill(bad, nan), "drift/loser": drift.masked_fill(good, nan)}
        out["accuracy"] = ((drift < 0) == good).float().masked_fill(drift == 0, 0.5)
    return {k: v.detach() for k, v in out.items()}


def group_metrics(terms: GroupTerms) -> dict[str, Tensor]:
    """Drift of the best and the worst of each group, their margin, and the share of its pairs in the order of the scores."""
    best, worst = terms.scores.argmax(-1, keepdim=True), terms.scores.argmin(-1, keepdim=True)
    value = terms.error if terms.ref is None else terms.error - terms.ref
    kind = "error" if terms.ref is None else "drift"
    out = {f"{kind}/winner": value.gather(-1, best)[..., 0], f"{kind}/loser": value.gather(-1, worst)[..., 0]}
    out["margin"] = out[f"{kind}/loser"] - out[f"{kind}/winner"]
    above = terms.scores[..., :, None] > terms.scores[..., None, :]
    ahead = torch.sign(value[..., None, :] - value[..., :, None])
    out["accuracy"] = (0.5 * (1 + ahead) * above).sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)
    return {k: v.detach() for k, v in out.items()}


def step_metrics(terms: StepTerms) -> dict[str, Tensor]:
    """Ratio to the policy that sampled, its largest distance from 1 in the batch (one row, else NaN), and KLs, (B,)."""
    ratio = terms.log_ratio.exp()
    largest = torch.full_like(ratio, float("nan"))
    largest[:1] = (ratio - 1).abs().max()
    out = {"ratio": ratio, "ratio/largest_off_1": largest, "kl/old": terms.kl_old}
    if terms.kl_ref is not None:
        out["kl/ref"] = terms.kl_ref
    return {k: v.detach() for k, v in out.items()}


def image_metrics(terms: ImageTerms) -> dict[str, Tensor]:
    """Errors, drifts from the reference of images with an advantage above or below 0 (NaN on others), and ``deviation/old``.

    The deviation is the mean square of x0_hat - x0_hat_old, or e - e_old where residuals are not given: where it stays exactly
    0, the policy is never compared with an older one.
    """
    out = {"error": terms.error}
    if terms.residual is not None and terms.residual_old is not None:
        out["deviation/old"] = (terms.residual - terms.residual_old).flatten(1).square().mean(1)
    elif terms.old is not None:
        out["deviation/old"] = terms.error - terms.old
    if terms.ref is not None:
        drift = terms.error - terms.ref
        out["drift/winner"] = drift.masked_fill(terms.advantage <= 0, float("nan"))
        out["drift/loser"] = drift.masked_fill(terms.advantage >= 0, float("nan"))
    return {k: v.detach() for k, v in out.items()}


def reward_metrics(terms: RewardTerms) -> dict[str, Tensor]:
    """The reward, the mean of several, and ``reward/NAME`` of each scorer."""
    out = {"reward": terms.reward.reshape(len(terms.reward), -1).mean(1)}
    out |= {f"reward/{name}": value for name, value in terms.values.items()}
    return {k: v.detach() for k, v in out.items()}


def metrics_of(terms: Terms) -> dict[str, Tensor]:
    """What is logged of any terms."""
    match terms:
        case PairTerms():
            return pair_metrics(terms)
        case LabelTerms():
            return label_metrics(terms)
        case GroupTerms():
            return group_metrics(terms)
        case StepTerms():
            return step_metrics(terms)
        case ImageTerms():
            return image_metrics(terms)
        case RewardTerms():
            return reward_metrics(terms)
    raise TypeError(type(terms).__name__)
