"""Preference pairs, and groups, from a model's own samples, in one go: generated, scored and paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from diffalign.building import environment, ready_model
from diffalign.errors import ConfigError
from diffalign.evaluation import prompts_of
from diffalign.models import ModelSpec
from diffalign.pairs import PAIR_RULES, BestWorst, Group, PairRule
from diffalign.sampling import Sampler
from diffalign.scoring import make_scorers
from diffalign.spec import Spec, dump


class PairsConfig(Spec):
    """Preference pairs from a model's own samples: K images a prompt, scored, and a rule that picks two."""

    version: Literal[1] = 1
    model: ModelSpec = ModelSpec(path="shapes-unet")
    adapter: str | None = None
    """A finished run whose trained weights make the images."""
    prompts: str = "shapes:train"
    num_prompts: int = Field(default=1000, ge=1)
    images_per_prompt: int = Field(default=8, ge=2)
    seed: int = Field(default=0, ge=0)
    sampling: Sampler = Sampler()
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    reward: dict[str, float] = Field(default={"score": 0.8, "cleanliness": 0.2}, min_length=1)
    """Weights of the scorers' values."""
    units: Literal["native", "rank"] = "native"
    """``rank``: of each value its rank within the prompt, 0 worst to 1 best: an ensemble whose scales differ."""
    rule: Annotated[PairRule, PAIR_RULES] = BestWorst()
    group_size: int | None = Field(default=None, ge=2)
    """Also keep groups/, for losses on groups: this many images of each prompt, evenly from the best to the worst."""
    shard_size: int = Field(default=100, ge=1)
    """Prompts per shard; a killed run goes on at the first missing shard."""
    split_salt: str = ""
    output_dir: str


def make_pairs(config: PairsConfig) -> Path:
    """Generate, score and pair; only images that stand in a pair are kept. Resumes shard by shard."""
    from tqdm import tqdm

    from diffalign.data.examples import evenly
    from diffalign.data.images import encode_png, sha256, to_pil
    from diffalign.data.tables import run_shards, write_shard
    from diffalign.sampling import generate
    from diffalign.scorers.combine import rank, weighted
    from diffalign.train.evaluate import score_images

    folder = Path(config.output_dir)
    prompts = prompts_of(config.prompts, config.num_prompts, config.seed, config.split_salt)
    model = ready_model(config.model)
    if config.adapter is not None:
        model.restore(Path(config.adapter))
    scorers = make_scorers(config.scorers)
    said = " + ".join(f"{w:g} {name}" for name, w in config.reward.items())
    versions = json.dumps(environment()["versions"])
    bar = tqdm(total=len(prompts) * config.images_per_prompt, desc="pairs", unit="image", dynamic_ncols=True)

    def shard(n: int) -> list[dict[str, Any]]:
        mine = prompts[n * config.shard_size : (n + 1) * config.shard_size]
        k = config.images_per_prompt
        images = generate(model, mine, config.sampling, per_prompt=k, seed=config.seed, on_batch=bar.update)
        values = score_images(scorers, [p.text for p in mine], images)
        unknown = set(config.reward) - set(values)
        if unknown:
            raise ConfigError(f"reward: no scorer gives {sorted(unknown)[0]!r}", hint=f"given: {', '.join(values)}")
        reward = weighted({n: rank(v) for n, v in values.items()} if config.units == "rank" else values, config.reward)
        if not reward.isfinite().all():
            raise ConfigError(
                "reward: some prompts do not ask for one of its values", hint="weigh score, exact or cleanliness"
            )
        rows: dict[str, list[dict[str, Any]]] = {"images": [], "scores": [], "groups": [], "pairs": []}
        for i, prompt in enumerate(mine):
            group = Group(reward[i].tolist(), {n: v[i].tolist() for n, v in values.items()})
            preferences = config.rule(group)
            listed = evenly(group.order(), config.group_size) if config.group_size else []
            ids = {j: f"{prompt.id}-{config.seed}-{j}" for p in preferences for j in (p.chosen, p.rejected)}
            ids |= {j: f"{prompt.id}-{config.seed}-{j}" for j in listed}
            for j, image_id in ids.items():
                picture = to_pil(images[i, j][None])[0]
                data = encode_png(picture)
                digest = sha256(data)
                rows["images"].append({
                    "image_id": image_id, "sha256": digest, "prompt_id": prompt.id, "prompt": prompt.text,
                    "image": {"bytes": data, "path": None}, "k": j, "seed": config.seed,
                    "model": config.model.path, "revision": config.model.revision, "adapter": config.adapter,
                    "sampler": type(model.scheduler).__name__, "versions": versions,
                    "num_inference_steps": config.sampling.num_inference_steps,
                    "guidance_scale": config.sampling.guidance_scale,
                    "width": picture.width, "height": picture.height,
                })  # fmt: skip
                for name in config.reward:
                    rows["scores"].append({
                        "image_sha256": digest, "prompt_sha256": sha256(prompt.text.encode()),
                        "scorer": name, "version": "1", "preprocess_version": "1", "value": values[name][i, j].item(),
                    })  # fmt: skip
            if listed:
                rows["groups"].append({
                    "group_id": f"{prompt.id}-{config.seed}", "prompt_id": prompt.id, "prompt": prompt.text, "scores": said,
                    "image_ids": [ids[j] for j in listed], "rewards": [group.reward[j] for j in listed],
                })  # fmt: skip
            for preference in preferences:
                rows["pairs"].append({
                    "pair_id": f"{prompt.id}-{config.seed}-{preference.chosen}-{preference.rejected}",
                    "prompt_id": prompt.id, "prompt": prompt.text, "p_win": 1.0,
                    "chosen_id": ids[preference.chosen], "rejected_id": ids[preference.rejected],
                    "margins": json.dumps({"reward": round(preference.margin, 6)}),
                    "rule": dump(config.rule).strip(), "scores": said, "source": config.model.path,
                })  # fmt: skip
        for table in ("images", "scores", *(["groups"] if config.group_size else [])):
            write_shard(folder, table, n, rows[table])
        return rows["pairs"]

    # what is at its default stays unsaid, so that a folder made before there was such a setting goes on
    unsaid = {"output_dir"} | {k for k in ("units", "group_size") if k not in config.model_fields_set}
    plan = config.model_dump(mode="json", exclude=unsaid)
    run_shards(folder, "pairs", plan, -(-len(prompts) // config.shard_size), shard)
    bar.close()
    return folder
