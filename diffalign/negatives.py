"""Pairs that differ in their text: captions edited until they are false, and similar prompts crossed with their pictures."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

from pydantic import Field, field_validator

from diffalign.data.edits import Edit, Kind, edits
from diffalign.data.prompts import normalised
from diffalign.data.wording import Similar, may_show
from diffalign.errors import DataError, ModelError
from diffalign.spec import Choice, Spec

Refusal = Callable[[str, str], str | None]
"""(prompt, edited caption) -> why it cannot be used."""
EVERY_KIND: list[Kind] = ["attribute", "count", "relation"]
ASK = (
    'A picture shows exactly this: "{prompt}". Change one {kind} in that sentence, and nothing else, so that it is no longer'
    ' true of the picture. Answer with JSON alone: {"caption": "the changed sentence"}'
)

SILENT = "the endpoint gave no answer"


class Captions(Spec):
    """How captions that are false of a picture are made from its prompt."""

    of: Literal["images", "losers"] = "images"
    """``images``: every usable image against itself, with its prompt and an edited one (TDPO, TKTO); ``losers``: the loser of
    every pair of the rule gets an edited caption (DCPO)."""
    kinds: list[Kind] = Field(default=EVERY_KIND, min_length=1)
    per_image: int = Field(default=1, ge=1)
    """Edited captions an image, or a pair."""

    @abstractmethod
    def made(self, prompts: Sequence[str], refused: Refusal, dropped: Counter[str]) -> list[list[Edit]]:
        """For each prompt at most ``per_image`` different edits; what could not be edited is counted by reason."""


class Edits(Captions):
    """Rules for English (:mod:`diffalign.data.edits`): an order of edits for each (seed, prompt), of which the first count."""

    type: Literal["edits"] = "edits"
    seed: int = Field(default=0, ge=0)

    def made(self, prompts: Sequence[str], refused: Refusal, dropped: Counter[str]) -> list[list[Edit]]:
        return [self._of(prompt, refused, dropped) for prompt in prompts]

    def _of(self, prompt: str, refused: Refusal, dropped: Counter[str]) -> list[Edit]:
        reasons: Counter[str] = Counter()

        def keep(text: str) -> bool:
            why = refused(prompt, text)
            reasons.update([f"edits: {why}"] if why else [])
            return not why

        out = list(islice(edits(prompt, self.kinds, self.seed, keep), self.per_image))
        if len(out) < self.per_image:
            few = f"prompts with fewer than {self.per_image} edits that can be used"
            dropped[few if out or reasons else f"prompts without {', '.join(self.kinds)} to edit"] += 1
        dropped.update(reasons)
        return out


class Asked(Captions):
    """A language model behind an OpenAI-compatible endpoint, asked for JSON; what cannot be used is asked again, then dropped.

    The key is read from DIFFALIGN_VLM_KEY. Answers stay in the pairs that are written: what is there is not asked again.
    """

    type: Literal["endpoint"] = "endpoint"
    url: str
    """As ``http://127.0.0.1:8000/v1``."""
    model: str
    template: str = ASK
    """What is asked; ``{prompt}`` and ``{kind}`` stand for theirs."""
    attempts: int = Field(default=3, ge=1)
    """Of one edit: each says what was wrong with the answer before. An endpoint that is silent is tried so often, too."""
    timeout: float = Field(default=120, gt=0)
    parallel: int = Field(default=8, ge=1)

    @field_validator("template")
    @classmethod
    def _asks(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("the template has no {prompt}")
        return template

    def made(self, prompts: Sequence[str], refused: Refusal, dropped: Counter[str]) -> list[list[Edit]]:
        from diffalign.scorers.http import Address
        from diffalign.scorers.vlm import Endpoint, Unread, written

        endpoint = Endpoint(Address(self.url, self.timeout, self.attempts), self.model, self.parallel)
        silent: list[str] = []

        def edit(prompt: str, kind: Kind, before: Sequence[Edit]) -> Edit | str:
            """Or why there is none."""
            question, why = self.template.replace("{prompt}", prompt).replace("{kind}", kind), ""
            for _ in range(self.attempts):
                again = f"\nThe last answer could not be used: {why}." if why else ""
                try:
                    caption = _caption(written(endpoint.ask(question + again, [], tokens=512)))
                except Unread as e:  # it was tried as often already
                    silent.append(str(e))
                    return SILENT
                why = "not JSON with a caption" if caption is None else _unusable(prompt, caption, before) or ""
                why = why or refused(prompt, str(caption)) or ""
                if not why:
                    return Edit(kind, str(caption), prompt, str(caption))
            return why

        def all_of(prompt: str) -> tuple[list[Edit], list[str]]:
            out, failed = list[Edit](), list[str]()
            for n in range(self.per_image):
                found = edit(prompt, self.kinds[n % len(self.kinds)], out)
                (failed if isinstance(found, str) else out).append(found)  # type: ignore[arg-type]
            return out, failed

        with ThreadPoolExecutor(self.parallel) as pool:
            answered = list(pool.map(all_of, prompts))
        reasons = Counter(why for _, failed in answered for why in failed)
        if prompts and reasons[SILENT] == len(prompts) * self.per_image:  # a shard without pairs would count as done
            raise ModelError(f"{self.url}: none of {len(silent)} requests was answered: {silent[0]}", hint="run again then")
        dropped.update({f"edits by {self.model}: {why}": n for why, n in reasons.items()})
        return [out for out, _ in answered]


CAPTIONS = Choice(Captions, {"edits": Edits, "endpoint": Asked})


def _caption(answer: str) -> str | None:
    """Of the one JSON object in an answer; models like to fence it."""
    match = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        found = json.loads(match[0])["caption"] if match else None
    except (ValueError, KeyError):
        return None
    return " ".join(found.split()) or None if isinstance(found, str) else None


def _unusable(prompt: str, caption: str, before: Sequence[Edit]) -> str | None:
    if normalised(caption) in ("", normalised(prompt)) or may_show(prompt, caption):
        return "it may be true of the picture as well"
    return "it was given before" if caption in [e.text for e in before] else None


def leaves_world(prompt: str, caption: str) -> str | None:
    """Why an edited caption of the built-in world is none: the judge cannot read it, or its scene is in another split."""
    from diffalign.shapes.scene import parse_caption

    try:
        scene = parse_caption(prompt)
    except DataError:
        return None
    try:
        other = parse_caption(caption)
    except DataError:
        return "no caption of the built-in world"
    if other in (scene, scene.turned()):
        return "the same scene of the built-in world"
    return None if other.split() == scene.split() else "a scene of another split of the built-in world"


class Crossed(Spec):
    """Two similar prompts c and c' with an image each, x and x': x beats x' under c, and c beats c' for x (InstructEngine).

    Similar is a matter of words: |A and B| / |A or B| of those that are not mere glue. Prompts of which one says all that the
    other says are left out, for the picture of one may be right for the other.
    """

    pairs: list[Literal["images", "captions"]] = Field(default=["images", "captions"], min_length=1)
    least: float = Field(default=0.5, gt=0, lt=1)
    """Least similarity."""
    neighbours: int = Field(default=1, ge=1)
    """Most similar prompts that each prompt is crossed with."""
    take: Literal["best", "worst"] = "best"
    """Which image of the other prompt loses, by the reward; without a reward its first or last."""

    def neighbours_of(
        self, row: int, prompts: Sequence[str], similar: Similar, usable: Callable[[int], bool], dropped: Counter[str]
    ) -> list[int]:
        """The prompts that prompt ``row`` is crossed with, the most similar first."""
        out: list[int] = []
        for other, _ in similar.to(row):
            if len(out) == self.neighbours:
                break
            if not usable(other):
                dropped["crossings: the other prompt has no usable image"] += 1
            elif may_show(prompts[row], prompts[other]) or may_show(prompts[other], prompts[row]):
                dropped["crossings: one prompt says all that the other says"] += 1
            else:
                out.append(other)
        if not out:
            dropped["prompts without a similar one to cross with"] += 1
        return out
