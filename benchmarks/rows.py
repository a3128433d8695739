"""What stands on the leaderboard: the rows of both worlds. The protocol is in ``leaderboard.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SCORERS = ("shapes", "taste:size", "diffalign.shapes.second:second_score")


@dataclass(frozen=True)
class Row:
    """A frozen configuration: the main job's file and what differs from it."""

    what: str
    overrides: tuple[str, ...] = ()
    pairs: dict[str, Any] = field(default_factory=dict)
    """Settings of :class:`diffalign.own_pairs.PairsConfig` for pairs of its own; the shipped ones if empty."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Settings of ``diffalign pairs``, which then writes the shipped pairs anew, with what they lack."""
    rounds: int = 1
    """Rounds of training, each on fresh pairs from the round before."""
    scorers: tuple[str, ...] = SCORERS
    sampled_again: tuple[str, float] | None = None
    """Another row whose weights are sampled at this guidance; nothing is trained."""
    guided_away: bool = False
    """The base is sampled, guided away from what was trained (Diffusion-NPO)."""
    config: str | None = None
    """A worked example of ``configs/`` in place of the world's main job: of methods that sample as they train."""
    seeds: tuple[int, ...] = (0, 1, 2)


# the best of its own trials on select; DPO was best with times drawn from the whole path
SFT = ("objective.type=sft", "timesteps.type=uniform", "timesteps.low=0.4")
ANY = {"type": "best_worst"}  # no least margin: values of another scale
# sampled as the main job samples; to imitate them is to distil the guidance
GUIDED = {"sampling": {"num_inference_steps": 10, "guidance_scale": 1.6, "batch_size": 100}}
ROWS: dict[str, Row] = {
    "dpo-lora": Row("Diffusion-DPO, LoRA, judge's labels"),
    "sft-winners": Row("SFT on the winners (control)", SFT),
    "dpo-shuffled": Row("Diffusion-DPO, labels shuffled (control)", ("data.shuffle_labels=true",)),
    "dpo-full": Row("Diffusion-DPO, all weights", ("model.lora=null", "train.learning_rate=5e-5")),
    "mapo-lora": Row("MaPO, LoRA", ("objective.type=mapo",)),
    "dpo-clip": Row(
        "Diffusion-DPO, LoRA, labelled by the learned CLIP",
        pairs={"scorers": ["clip:shapes-clip"], "reward": {"clip": 1.0}, "rule": ANY},
    ),
    "dpo-taste": Row(
        "Diffusion-DPO, LoRA, a taste for size",
        pairs={"scorers": ["taste:size"], "reward": {"taste_size": 1.0}, "num_prompts": 500, "rule": ANY},
    ),
    "dpo-more": Row("Diffusion-DPO, LoRA, twice the pairs and steps", ("train.max_steps=800",), pairs={"num_prompts": 3200}),
    "dpo-rounds": Row(
        "Diffusion-DPO, LoRA, three rounds of fresh pairs, 133 steps each", ("train.max_steps=133",),
        pairs={"num_prompts": 530}, rounds=3,
    ),
    "dpo-flipped": Row("Diffusion-DPO, LoRA, 20 % of labels flipped", ("data.flip_labels=0.2",)),
    "robust-flipped": Row(
        "Robust DPO, LoRA, 20 % of labels flipped",
        ("objective={type: robust, beta: 2000, label_smoothing: 0.2}", "data.flip_labels=0.2"),
    ),
    "ipo-lora": Row("IPO, LoRA", ("objective={type: ipo, beta: 100}",)),
    "kto-lora": Row("Diffusion-KTO, LoRA", ("objective={type: kto, beta: 500}", "train.per_device_train_batch_size=64")),
    "curriculum-lora": Row("Curriculum-DPO, LoRA", ("data.curriculum={chunks: 2, every: 134}",)),
    "smpo-lora": Row(
        "SmPO, LoRA",
        (
            "objective={type: smpo, beta: 2000, gamma: 2}", "data.p_win_scale=10",
            "coupling={noise: inverted, inversion_steps: 5, renoise: 1}", "train.learning_rate=2e-4",
        ),
    ),
    "dspo-lora": Row("DSPO, LoRA", ("objective={type: dspo, beta: 0.5}", "timesteps.type=uniform", "timesteps.low=0.4")),
    "linear-lora": Row(
        "Linear-DPO, LoRA", ("objective={type: linear, beta: 1000, kappa: 1}", "reference={type: ema, decay: 0.99}")
    ),
    "safeguard-lora": Row("Diffusion-SDPO's safeguard on DPO, LoRA", ("train.protect_winner=0.5",)),
    "rdp-lora": Row("RDP, LoRA", ("objective={type: rdp, beta: 100}", "data.standardize_scores=true")),
    "sft-guided": Row("SFT on the winners of guided pairs", SFT, pairs=GUIDED),
    "dpo-guided": Row("Diffusion-DPO, LoRA, on the same guided pairs", pairs=GUIDED),
    "dpo-rounds-at-4": Row("the weights of dpo-rounds, sampled at guidance 4", sampled_again=("dpo-rounds", 4.0)),
}  # fmt: skip
ROWS |= {
    "online-dpo": Row("Online DPO, LoRA: pairs of its own samples as it goes", config="shapes-online-dpo.yaml"),
    "grpo": Row("GRPO, LoRA, noise in the first four steps", config="shapes-grpo.yaml"),
    "mixgrpo": Row(
        "MixGRPO, LoRA: the four steps with noise move on, by one every seven rollouts",
        (
            "online.rollout={num_inference_steps: 10, batch_size: 64, rule: {type: ddim, eta: 1.0}, same_noise: true,"
            " window: {type: progressive, size: 4, iterations: 7}}",
        ),
        config="shapes-grpo.yaml",
    ),
    "nft": Row("DiffusionNFT, LoRA", config="shapes-nft.yaml"),
    "draft": Row("DRaFT of the learned CLIP, LoRA, through the last two steps", config="shapes-draft.yaml"),
}  # fmt: skip
GROUPS = {"group_size": 4}
LISTS = ("data.group_size=4", "train.per_device_train_batch_size=16")  # as many images a step as in 32 pairs
NPO = Row("Diffusion-NPO: DPO on swapped labels, the base guided away from it", ("data.swap_labels=true",), guided_away=True)
ROWS |= {
    "infonca-lora": Row("InfoNCA on four of each prompt's images, LoRA",
                        ("objective={type: infonca, beta: 500, alpha: 0.1}", *LISTS), GROUPS),
    "rank-dpo-lora": Row("RankDPO on the same groups, LoRA", ("objective={type: rank_dpo, beta: 500}", *LISTS), GROUPS),
    "npo-lora": replace(NPO, overrides=(*NPO.overrides, "objective.beta=500")),
    "dro-lora": Row(
        "Diffusion-DRO, LoRA: winners against states of the policy of 16 steps ago",
        ("objective={type: dro_hinge, mu: 0.001}", "coupling={noise: replay, replay_steps: 10, replay_every: 16}",
         "train.learning_rate=2e-4"),
    ),
    "region-lora": Row("Diffusion-DPO, LoRA, where the judge sees a wrong object", ("data.maps=judged_region",), seeds=(0,)),
    "segments-lora": Row("Diffusion-DPO, LoRA, the judge's label for each object", ("data.maps=judged_segments",), seeds=(0,)),
    "dpo-ensemble": Row(
        "Diffusion-DPO, LoRA, labelled by two learned judges (CLIP and the second judge)",
        pairs={"scorers": ["clip:shapes-clip", "diffalign.shapes.second:second_score"], "units": "rank",
               "reward": {"clip": 1.0, "second_score": 1.0}, "rule": ANY},
    ),
}  # fmt: skip
ONCE = {
    "inversion-lora": (
        "DDIM-Inversion PO, LoRA", ("coupling={noise: inverted, inversion_steps: 5}", "train.learning_rate=2e-4"),
    ),
    "rethinking-lora": (
        "Rethinking DPO, LoRA",
        ("reference={type: periodic, every: 32, max_drift: 0.005}",
         "timesteps={type: skewed, gamma_rank: 0.9, weighting: low_snr}"),
    ),
    "dmpo-lora": ("DMPO, LoRA", ("objective={type: dmpo, beta: 2000, alpha: 0.01}", "train.learning_rate=5e-4")),
    "apo-lora": ("APO-zero, LoRA", ("objective={type: apo_zero, beta: 2000}",)),
    "simpo-lora": ("SimPO with SFT, LoRA", ("objective=[{type: simpo, beta: 500}, {type: sft}]",)),
    "cpo-lora": ("CPO, LoRA", ("objective={type: cpo, beta: 500}",)),
    "orpo-lora": ("ORPO, LoRA", ("objective={type: orpo}",)),
    "vrpo-lora": ("VRPO: DPO on 4 times of each pair, LoRA, a quarter of the pairs a step",
                  ("coupling={draws: 4}", "train.per_device_train_batch_size=8")),
    "pso-lora": (
        "PSO: a tenth of the loser, at four times of a sampler alone, LoRA",
        ("objective={type: loser_scale, beta: 2000, kappa: 1, alpha: 0.1}",
         "timesteps={type: steps, times: [0.249, 0.499, 0.749, 0.999]}"),
    ),
    "spin-lora": (
        "SPIN: the winners against the last round's own images, LoRA, three rounds of 133 steps",
        ("objective={type: spin, beta: 2000}", "train.max_steps=133",
         "rounds={count: 3, source: {type: self_play}, num_prompts: 530,"
         " sampling: {num_inference_steps: 10, guidance_scale: 1.0, batch_size: 100}}"),
    ),
}  # fmt: skip
"""Presets whose mathematics the tests verify, one run each."""
ROWS |= {name: Row(what, overrides, seeds=(0,)) for name, (what, overrides) in ONCE.items()}
ROWS["best-of-ten-lora"] = Row(
    "UnifiedReward's pairs: Diffusion-DPO, LoRA, on the best and worst of ten, as many images in all",
    pairs={"images_per_prompt": 10, "num_prompts": 960}, seeds=(0,),
)  # fmt: skip
ROWS["videodpo-lora"] = Row(
    "VideoDPO's weights on DPO, LoRA: rare scores count more", chosen={"density": {"bin_width": 0.05}}, seeds=(0,)
)
ROWS["dcpo-lora"] = Row(
    "DCPO: the loser has the caption with one word exchanged, LoRA", ("coupling={captions: own}",),
    chosen={"captions": {"type": "edits", "of": "losers"}}, seeds=(0,),
)  # fmt: skip
ROWS["nca-lora"] = Row(
    "NCA on the same groups, LoRA", ("objective={type: nca, beta: 500, alpha: 0.1}", *LISTS), GROUPS, seeds=(0,)
)
SHARED = ("dpo-lora", "dpo-shuffled", "mapo-lora", "dpo-flipped", "safeguard-lora", "dspo-lora")
DIT_ROWS = {name: ROWS[name] for name in SHARED} | {
    "sft-winners": Row("SFT on the winners (control)", ("objective.type=sft",)),
    "robust-flipped": Row(
        ROWS["robust-flipped"].what, ("objective={type: robust, beta: 100, label_smoothing: 0.2}", "data.flip_labels=0.2")
    ),
    "ipo-lora": Row("IPO, LoRA", ("objective={type: ipo, beta: 5}",)),
    "kto-lora": Row("Diffusion-KTO, LoRA", ("objective={type: kto, beta: 100}", "train.per_device_train_batch_size=64")),
    "curriculum-lora": Row("Curriculum-DPO, LoRA", ("data.curriculum={chunks: 2, every: 67}",)),
    "smpo-lora": Row(
        "SmPO, LoRA",
        (
            "objective={type: smpo, beta: 100, gamma: 2}", "data.p_win_scale=10",
            "coupling={noise: inverted, inversion_steps: 5, renoise: 1}", "train.learning_rate=2e-4",
        ),
    ),
    "linear-lora": Row(
        "Linear-DPO, LoRA", ("objective={type: linear, beta: 50, kappa: 1}", "reference={type: ema, decay: 0.99}")
    ),
    "rdp-lora": Row("RDP, LoRA", ("objective={type: rdp, beta: 100}", "data.standardize_scores=true")),
    "infonca-lora": Row(ROWS["infonca-lora"].what, ("objective={type: infonca, beta: 25, alpha: 0.1}", *LISTS), GROUPS),
    "rank-dpo-lora": Row(ROWS["rank-dpo-lora"].what, ("objective={type: rank_dpo, beta: 100}", *LISTS), GROUPS),
    "npo-lora": NPO,
    "dro-lora": ROWS["dro-lora"],
}  # fmt: skip
DIT_ROWS |= {
    "online-dpo": Row(ROWS["online-dpo"].what, config="shapes-dit-online-dpo.yaml"),
    "grpo": Row("GRPO with GRPO-Guard's ratio, LoRA, Flow-SDE noise in the first six steps", config="shapes-dit-grpo.yaml"),
    "nft": Row("DiffusionNFT, LoRA", config="shapes-dit-nft.yaml"),
    "draft": Row(ROWS["draft"].what, config="shapes-dit-draft.yaml"),
}
LABELLED = {
    "dpo-lora": "the exact judge",
    "dpo-ensemble": "two learned judges, ranks summed: CLIP and the second judge, which therefore guards this row no more",
    "dpo-clip": "the learned CLIP",
    "dpo-flipped": "the exact judge, 20 % flipped",
    "robust-flipped": "the same flipped labels, robust DPO",
    "dpo-shuffled": "a coin",
}
"""DPO by who labelled the pairs: rows of a table of their own."""
