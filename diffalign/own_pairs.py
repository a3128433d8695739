"""Preference pairs, and groups, from a model's own samples, in one go: generated, scored and paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from diffalign.building import environment, ready_model
from diffalign.errors import ConfigError
from diffalign.evaluation import prompts_of
from diffalign.models import Model, ModelSpec
from diffalign.pairs import PAIR_RULES, BestWorst, Group, PairRule
from diffalign.sampling import Sampler
from diffalign.scoring import make_scorers
from diffalign.spec import Spec, dump

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.data.pairs import Picture
    from diffalign.data.prompts import Prompt
    from diffalign.scorers import Scorer


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


class Shard:
    """Rows of one shard of a dataset folder. An image stands there once, whatever pairs it is in."""

    def __init__(self, model: Model, spec: ModelSpec, adapter: str | None, seed: int, sampling: Sampler) -> None:
        self.seed, self.source = seed, spec.path
        self.rows: dict[str, list[dict[str, Any]]] = {"images": [], "scores": [], "groups": [], "pairs": []}
        self.known: set[str] = set()
        self.shared = {
            "seed": seed, "model": spec.path, "revision": spec.revision, "adapter": adapter,
            "sampler": type(model.scheduler).__name__, "versions": json.dumps(environment()["versions"]),
            "num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale,
        }  # fmt: skip

    def sampled(self, prompt: Prompt, k: int, image: Tensor, values: Mapping[str, float]) -> str:
        """The id of the k-th image (3, H, W) of a prompt; it and its scores are rows from now on."""
        from diffalign.data.images import encode_png, sha256, to_pil

        name = f"{prompt.id}-{self.seed}-{k}"
        if name in self.known:
            return name
        self.known.add(name)
        picture = to_pil(image[None])[0]
        data = encode_png(picture)
        digest = sha256(data)
        self.rows["images"].append({
            "image_id": name, "sha256": digest, "prompt_id": prompt.id, "prompt": prompt.text,
            "image": {"bytes": data, "path": None}, "k": k, "width": picture.width, "height": picture.height, **self.shared,
        })  # fmt: skip
        for scorer, value in values.items():
            self.rows["scores"].append({
                "image_sha256": digest, "prompt_sha256": sha256(prompt.text.encode()),
                "scorer": scorer, "version": "1", "preprocess_version": "1", "value": value,
            })  # fmt: skip
        return name

    def given(self, prompt: Prompt, picture: Picture) -> str:
        """The id of a picture of other data; its bytes are a row from now on."""
        from diffalign.data.images import sha256

        data = picture.data
        digest = sha256(data)
        name = f"{prompt.id}-{digest[:16]}"
        if name not in self.known:
            self.known.add(name)
            height, width = picture.shape
            self.rows["images"].append({
                "image_id": name, "sha256": digest, "prompt_id": prompt.id, "prompt": prompt.text,
                "image": {"bytes": data, "path": None}, "width": width, "height": height,
            })  # fmt: skip
        return name

    def pair(self, name: str, prompt: Prompt, chosen: str, rejected: str, **more: Any) -> None:
        """A pair of two ids."""
        self.rows["pairs"].append({
            "pair_id": name, "prompt_id": prompt.id, "prompt": prompt.text, "p_win": 1.0,
            "chosen_id": chosen, "rejected_id": rejected, "source": self.source, **more,
        })  # fmt: skip

    def group(self, prompt: Prompt, names: Sequence[str], rewards: Sequence[float], said: str) -> None:
        """A group of ids, best first."""
        self.rows["groups"].append({
            "group_id": f"{prompt.id}-{self.seed}", "prompt_id": prompt.id, "prompt": prompt.text, "scores": said,
            "image_ids": list(names), "rewards": list(rewards),
        })  # fmt: skip

    def write(self, folder: Path, index: int) -> list[dict[str, Any]]:
        """Write images, scores and groups, if there are any; the pairs are returned, to be written last."""
        from diffalign.data.tables import write_shard

        for table in ("images", "scores", *(["groups"] if self.rows["groups"] else [])):
            write_shard(folder, table, index, self.rows[table])
        return self.rows["pairs"]


def rewarded(
    scorers: Sequence[Scorer],
    weights: Mapping[str, float],
    prompts: Sequence[Prompt],
    images: Tensor,
    units: Literal["native", "rank"] = "native",
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores of (P, K, 3, H, W) images, and the reward that is weighed of them: name to (P, K), and (P, K).

    Raises:
        ConfigError: no scorer gives a value that the reward is made of, or some prompts do not ask for it.
    """
    from diffalign.scorers.combine import rank, weighted
    from diffalign.train.evaluate import score_images

    values = score_images(scorers, [p.text for p in prompts], images)
    if unknown := set(weights) - set(values):
        raise ConfigError(f"reward: no scorer gives {sorted(unknown)[0]!r}", hint=f"given: {', '.join(values)}")
    reward = weighted({n: rank(v) for n, v in values.items()} if units == "rank" else values, weights)
    if not reward.isfinite().all():
        raise ConfigError("reward: some prompts do not ask for one of its values", hint="weigh score, exact or cleanliness")
    return values, reward


def make_pairs(config: PairsConfig) -> Path:
    """Generate, score and pair; only images that stand in a pair are kept. Resumes shard by shard."""
    from tqdm import tqdm

    from diffalign.data.examples import evenly
    from diffalign.data.tables import run_shards
    from diffalign.sampling import generate

    folder = Path(config.output_dir)
    prompts = prompts_of(config.prompts, config.num_prompts, config.seed, config.split_salt)
    model = ready_model(config.model)
    if config.adapter is not None:
        model.restore(Path(config.adapter))
    scorers = make_scorers(config.scorers)
    said = " + ".join(f"{w:g} {name}" for name, w in config.reward.items())
    bar = tqdm(total=len(prompts) * config.images_per_prompt, desc="pairs", unit="image", dynamic_ncols=True)

    def shard(n: int) -> list[dict[str, Any]]:
        mine = prompts[n * config.shard_size : (n + 1) * config.shard_size]
        k = config.images_per_prompt
        images = generate(model, mine, config.sampling, per_prompt=k, seed=config.seed, on_batch=bar.update)
        values, reward = rewarded(scorers, config.reward, mine, images, config.units)
        out = Shard(model, config.model, config.adapter, config.seed, config.sampling)
        for i, prompt in enumerate(mine):
            group = Group(reward[i].tolist(), {n: v[i].tolist() for n, v in values.items()})

            def kept(some: Sequence[int], i: int = i, prompt: Prompt = prompt) -> list[str]:
                measured = [{n: values[n][i, j].item() for n in config.reward} for j in some]
                return [out.sampled(prompt, j, images[i, j], v) for j, v in zip(some, measured, strict=True)]

            for preference in config.rule(group):
                both = (preference.chosen, preference.rejected)
                ids = kept(both)
                out.pair(
                    f"{prompt.id}-{config.seed}-{both[0]}-{both[1]}", prompt, *ids, rule=dump(config.rule).strip(),
                    scores=said, margins=json.dumps({"reward": round(preference.margin, 6)}),
                )  # fmt: skip
            if config.group_size is not None:
                listed = evenly(group.order(), config.group_size)
                out.group(prompt, kept(listed), [group.reward[j] for j in listed], said)
        return out.write(folder, n)

    # what is at its default stays unsaid, so that a folder made before there was such a setting goes on
    unsaid = {"output_dir"} | {k for k in ("units", "group_size") if k not in config.model_fields_set}
    plan = config.model_dump(mode="json", exclude=unsaid)
    run_shards(folder, "pairs", plan, -(-len(prompts) // config.shard_size), shard)
    bar.close()
    return folder
