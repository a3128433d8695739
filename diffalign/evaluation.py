"""What is measured of a model, base against trained, and on which prompts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from diffalign.data.files import atomic, write_json
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import ConfigError, DataError
from diffalign.models import Model
from diffalign.sampling import Sampler
from diffalign.scorers import table
from diffalign.spec import Spec, did_you_mean
from diffalign.suites import is_suite, suite_prompts

if TYPE_CHECKING:
    from diffalign.scorers import Scorer
    from diffalign.train.evaluate import Evaluation


SHAPES_PROMPTS = re.compile(r"shapes:(train|select|test)")


def known_scorers(names: list[str]) -> list[str]:
    """The names, if there may be such scorers."""
    for name in names:
        if name != "shapes" and ":" not in name and name not in table():
            near = did_you_mean(name, ["shapes", *table()])
            raise ValueError(f"unknown scorer {name!r}{near}; use shapes, taste:KIND, {', '.join(table())} or pkg.mod:obj")
    return names


class EvaluateSpec(Spec):
    """The ``evaluate`` section: what is measured after training, for the base and the trained model alike."""

    enabled: bool = True
    prompts: str = "shapes:test"
    """A prompt file, a hub dataset id, an evaluation suite (``geneval:PATH``), or a split of the built-in world: shapes:test,
    shapes:select, shapes:train."""
    num_prompts: int = Field(default=256, ge=1)
    negative_prompt: str | None = None
    """For prompts that bring none of their own; it counts with ``guidance_scale`` above 1."""
    images_per_prompt: int = Field(default=2, ge=1)
    seed: int = Field(default=1000, ge=0)
    scorers: list[str] = Field(default=["shapes"], min_length=1)
    """``shapes`` (the exact judge), ``taste:KIND``, a reward model of ``diffalign list scorers`` with or without the paths
    of its weights (``pickscore``, ``clip:MODEL``), a served one ``http:URL``, or a callable ``pkg.mod:obj``."""
    sampling: Sampler = Sampler()
    select_prompts: int = Field(default=64, ge=1)
    """Prompts of the select split that ``train.metric_for_best: select/score`` looks at."""
    split_salt: str = ""
    """Another salt makes another split of the built-in world."""

    _known = field_validator("scorers")(known_scorers)


def prompts_of(source: str, limit: int | None, seed: int = 0, salt: str = "", negative: str | None = None) -> list[Prompt]:
    """Prompts of a file, a hub dataset, a suite ``NAME:PATH``, or a split of the built-in world (``limit``, 256 if None)."""
    if match := SHAPES_PROMPTS.fullmatch(source):
        from diffalign.shapes.scene import sample_prompts

        found = [Prompt(text) for text in sample_prompts(limit or 256, match[1], seed, salt)]  # type: ignore[arg-type]
    elif is_suite(source):
        found = [Prompt(text) for text in suite_prompts(source)[:limit]]
    else:
        found = read_prompts(source, limit)
    return [Prompt(p.text, p.negative or negative) for p in found]


def asked_of(spec: EvaluateSpec, model: Model, section: str = "evaluate") -> list[Prompt]:
    """The prompts of an evaluation; ``section`` is where errors say that they stand.

    Raises:
        ConfigError: some are negative, and the model does not take them; or they are not what the exact judge can read.
    """
    prompts = prompts_of(spec.prompts, spec.num_prompts, spec.seed, spec.split_salt, spec.negative_prompt)
    if spec.sampling.guidance_scale > 1 and not model.takes_negative and any(p.negative for p in prompts):
        raise ConfigError(f"{section}: {model.path} takes no negative prompts", hint="its guidance is distilled; drop them")
    if "shapes" in spec.scorers:
        from diffalign.shapes.scene import parse_caption

        for prompt in prompts:
            try:
                parse_caption(prompt.text)
            except DataError as e:
                raise ConfigError(f"{section}.scorers: shapes: {e.message}", hint="see diffalign list scorers") from e
    return prompts


def measure(model: Model, spec: EvaluateSpec, scorers: Sequence[Scorer], folder: Path) -> dict[str, Any]:
    """Base against trained on the same prompts and seeds; writes ``samples/`` and returns the comparison."""
    from tqdm import tqdm

    from diffalign.train.evaluate import compare, evaluate

    prompts = asked_of(spec, model)
    total = 2 * len(prompts) * spec.images_per_prompt
    began = time.monotonic()
    with tqdm(total=total, desc="evaluate", unit="image", dynamic_ncols=True) as bar:
        kwargs: dict[str, Any] = {"per_prompt": spec.images_per_prompt, "seed": spec.seed, "on_batch": bar.update}
        with model.weights("reference"):
            base = evaluate(model, prompts, scorers, spec.sampling, **kwargs)
        aligned = evaluate(model, prompts, scorers, spec.sampling, **kwargs)
    out = compare(base, aligned, ceiling(model, base, scorers) if spec.prompts.startswith("shapes:") else None)
    out["evaluate_seconds"] = round(time.monotonic() - began, 1)
    write_samples(folder / "samples", base, aligned)
    return out


def ceiling(model: Model, like: Evaluation, scorers: Sequence[Scorer]) -> Evaluation:
    """Perfect drawings of the same prompts, through the model's own autoencoder: the best that its latents allow."""
    import numpy as np
    import torch

    from diffalign.data.images import to_uint8
    from diffalign.shapes.render import draw
    from diffalign.shapes.scene import parse_caption
    from diffalign.train.evaluate import Evaluation, score_images

    per_prompt = like.images.shape[1]
    scenes = [parse_caption(p) for p in like.prompts for _ in range(per_prompt)]
    pixels = torch.from_numpy(draw(scenes, np.random.default_rng(0))).permute(0, 3, 1, 2).float() / 255
    parts = [to_uint8(model.decode(model.encode_images(p))).cpu() for p in torch.split(pixels, 128)]
    images = torch.cat(parts).view(len(like.prompts), per_prompt, *parts[0].shape[1:])
    return Evaluation(like.prompts, score_images(scorers, like.prompts, images), images)


def write_samples(folder: Path, base: Evaluation, aligned: Evaluation, limit: int = 32) -> None:
    """The first prompts' images before and after, with each image's values, for people and for the report."""
    from diffalign.data.images import to_pil

    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(base.prompts[:limit]):
        row: dict[str, Any] = {"prompt": prompt}
        for name, e in (("base", base), ("aligned", aligned)):
            file = f"{i:03d}-{name}.png"
            atomic(folder / file, partial(to_pil(e.images[i, :1])[0].save, format="PNG"))
            row[name] = {
                "file": file,
                "values": {k: round(v[i, 0].item(), 4) for k, v in e.values.items() if v[i, 0].isfinite()},
            }
        rows.append(row)
    facts = [{k: _listed(v) for k, v in e.values.items()} for e in (base, aligned)]
    write_json(folder / "samples.json", rows)
    write_json(folder / "values.json", {"prompts": list(base.prompts), "base": facts[0], "aligned": facts[1]})


def _listed(value: Any) -> list[list[float | None]]:
    """(P, K) as JSON can say it: null where the prompt does not ask."""
    return [[x if x == x else None for x in row] for row in value.tolist()]
