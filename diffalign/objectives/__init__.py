"""Preference losses: pure functions of denoise errors.

To add one: a class with ``type``, ``needs`` and ``__call__``, and its line in the table below; out of the tree, only
the class, named in a config as ``type: pkg.mod:Class`` and checked by :mod:`diffalign.testing`.
"""

from __future__ import annotations

from diffalign.objectives.base import (
    Data,
    GroupTerms,
    ImageTerms,
    LabelTerms,
    LossOutput,
    Need,
    Objective,
    PairTerms,
    RewardTerms,
    StepTerms,
    Terms,
    Total,
)
from diffalign.objectives.direct import DRaFT, ReFL
from diffalign.objectives.forward import AWM, CRD, DGPO, NFT, RWR
from diffalign.objectives.listwise import NCA, PRO, InfoNCA, PlackettLuce, RankDPO
from diffalign.objectives.metrics import group_metrics, label_metrics, metrics_of, pair_metrics
from diffalign.objectives.pairwise import (
    AOT,
    CDPO,
    DMPO,
    DPOP,
    DSPO,
    FDPO,
    IPO,
    APODown,
    APOZero,
    BCOPair,
    DROHinge,
    ExoPair,
    Hinge,
    Linear,
    LoserScale,
    NCAPair,
    Robust,
    Sigmoid,
    SPPOHard,
)
from diffalign.objectives.policy import PPO, FlowDPPO, GRPOGuard, Reinforce
from diffalign.objectives.reference_free import CPO, ORPO, MaPO, RePO, SimPO
from diffalign.objectives.scored import MADPO, ODPO, RDP, MaPPO, Omni, SmPO, Soft
from diffalign.objectives.semi_policy import SePPO
from diffalign.objectives.stepwise import PRDP, SPO
from diffalign.objectives.supervised import KL, SFT
from diffalign.objectives.unpaired import BCO, DDO, KTO, NPO, PMPO
from diffalign.spec import Choice

CLASSES: tuple[type[Objective], ...] = (
    # pairs, by the difference of rewards
    Sigmoid, CDPO, Robust, IPO, Hinge, ExoPair, DMPO, FDPO, AOT, Linear, DROHinge,
    # pairs, by what is asked of each side
    NCAPair, BCOPair, APOZero, APODown, SPPOHard, DPOP, LoserScale, DSPO,
    # pairs of the data and a reference's own sample
    SePPO,
    # pairs with scores or soft labels
    Soft, SmPO, ODPO, RDP, MaPPO, Omni, MADPO,
    # pairs without a reference
    MaPO, SimPO, CPO, ORPO, RePO,
    # single images, good or bad
    KTO, BCO, NPO, DDO, PMPO,
    # K images of one prompt
    RankDPO, InfoNCA, NCA, PlackettLuce, PRO,
    # to imitate
    SFT, KL,
    # online: steps of trajectories, pairs of steps, own samples, groups of them, differentiable rewards
    Reinforce, PPO, GRPOGuard, FlowDPPO, SPO, PRDP, NFT, AWM, RWR, DGPO, CRD, DRaFT, ReFL,
)  # fmt: skip

OBJECTIVES = Choice(
    Objective,
    {cls.model_fields["type"].default: cls for cls in CLASSES},
    aliases={"dpo": "sigmoid", "spin": "sigmoid", "rebel": "rdp", "grpo": "ppo", "d3po": "spo"},
)

__all__ = [
    "CLASSES", "OBJECTIVES", "SFT", "Data", "GroupTerms", "ImageTerms", "LabelTerms", "LossOutput", "MaPO", "Need",
    "Objective", "PairTerms", "RewardTerms", "Sigmoid", "StepTerms", "Terms", "Total", "group_metrics", "label_metrics",
    "metrics_of", "pair_metrics",
]  # fmt: skip
