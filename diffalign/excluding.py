"""Prompts that will be evaluated on and must not become training data: refused, left out, or kept knowingly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from diffalign.data.prompts import normalised
from diffalign.errors import DataError
from diffalign.spec import Spec


class Excluding(Spec):
    """What ``generate``, ``import`` and ``pairs`` share: which prompts are not to become training data."""

    exclude: list[str] = []
    """Prompt files, suites ``NAME:PATH`` or splits of the built-in world that you will evaluate on; they match whatever their
    case, punctuation and spaces."""
    evaluation_prompts: Literal["refuse", "drop", "keep"] = "refuse"
    """What becomes of prompts that stand in ``exclude``."""

    def plan(self) -> dict[str, Any]:
        """What fixes the rows of a dataset folder: refusing and dropping leave the same ones."""
        kept = self.evaluation_prompts if self.evaluation_prompts == "keep" else None
        return self.model_dump(mode="json", exclude={"output_dir"}) | {"evaluation_prompts": kept}


class Barrier:
    """The prompts of ``exclude``, read once."""

    def __init__(self, spec: Excluding) -> None:
        self.action = spec.evaluation_prompts
        self.source: dict[str, str] = {}
        for source in spec.exclude if self.action != "keep" else ():
            for prompt in excluded_prompts([source]):
                self.source.setdefault(prompt, source)

    def __contains__(self, prompt: str | None) -> bool:
        return bool(self.source) and prompt is not None and normalised(prompt) in self.source

    def left_out(self, prompts: Sequence[str], where: str) -> list[bool]:
        """Which of the prompts do not become training data.

        Raises:
            DataError: some are evaluated on, and they are refused; names their sources and the first.
        """
        barred = [p in self for p in prompts]
        if self.action == "refuse" and any(barred):
            found = [p for p, bad in zip(prompts, barred, strict=True) if bad]
            sources = Counter(self.source[normalised(p)] for p in found)
            said = ", ".join(f"{source}: {n}" for source, n in sources.most_common())
            raise DataError(
                f"{where}: {len(found)} of {len(prompts)} prompts are evaluated on ({said}), first {found[0]!r}",
                hint="evaluation_prompts=drop leaves them out, =keep takes them",
            )
        return barred


def excluded_prompts(sources: Sequence[str]) -> set[str]:
    """Prompts of files, suites ``NAME:PATH`` and splits of the built-in world, normalised for matching."""
    from diffalign.evaluation import SHAPES_PROMPTS, prompts_of  # torch: seconds that only those pay who exclude

    found: set[str] = set()
    for source in sources:
        if match := SHAPES_PROMPTS.fullmatch(source):
            found |= shapes_captions(match[1])
        else:
            found |= {normalised(p.text) for p in prompts_of(source, None)}
    return found


def shapes_captions(split: str) -> set[str]:
    """Every caption of a split of the built-in world, normalised."""
    from diffalign.shapes.scene import PHRASINGS, RELATIONS, all_scenes

    out = set()
    for scene in all_scenes(split):  # type: ignore[arg-type]
        stated = [replace(scene, relation=r) for r in RELATIONS] if scene.relation else [scene]
        both = [s for one in stated for s in (one, replace(one, things=one.things[::-1]))]
        out |= {normalised(s.caption(n)) for s in both for n in range(PHRASINGS)}
    return out
