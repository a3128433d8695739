"""What is always logged about pairs, whatever the objective."""

from __future__ import annotations

from torch import Tensor

from diffalign.objectives.base import PairTerms

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
