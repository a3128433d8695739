"""A gate on pictures that are imported or made: what a safety scorer puts too low is flagged, or left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from diffalign.data.scores import prompt_key
from diffalign.scoring import identify, make_scorer
from diffalign.spec import Spec

if TYPE_CHECKING:
    from PIL import Image


class Safety(Spec):
    """A gate on pictures: what a safety scorer puts below ``floor`` is flagged, or dropped with its pairs."""

    action: Literal["flag", "drop"] = "drop"
    scorer: str = "safety"
    """``safety``, ``nsfw``, ``q16``, each with or without ``:PATHS``, or any other scorer; higher is safer."""
    floor: float = 0.0
    """0 for ``safety``; minus the highest probability for ``nsfw`` and ``q16``."""


class Gate:
    """The scorer of a gate, loaded once."""

    def __init__(self, spec: Safety) -> None:
        self.spec = spec
        self.scorer = make_scorer(spec.scorer)
        self.identity = identify(spec.scorer, self.scorer)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], hashes: Sequence[str]
    ) -> tuple[list[bool], list[dict[str, Any]]]:
        """Whether each picture is below the floor, and rows of the scores table; what cannot be judged counts as below."""
        from diffalign.scorers import ScoreInput, isolated

        shown: Any = list(images)
        found = isolated(self.scorer, ScoreInput(shown, list(prompts))) if shown else None
        values = next(iter(found.values.values())).tolist() if found is not None else []
        rows = [
            {
                "image_sha256": digest, "prompt_sha256": prompt_key(prompt), "scorer": self.identity.scorer,
                "version": self.identity.version, "preprocess_version": self.identity.preprocess,
                "value": value if value == value else None,
                "error": None if value == value else "the safety scorer failed",
            }
            for value, prompt, digest in zip(values, prompts, hashes, strict=True)
        ]  # fmt: skip
        return [not value >= self.spec.floor for value in values], rows
