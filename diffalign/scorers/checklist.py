"""Judges that ask many questions of one picture: a suite's (DPG-Bench, UniGenBench), or a weighted list (VisionReward)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require
from diffalign.scorers.vlm import Absolute, Endpoint, Judge, Unread, yes

ASK = "{question} Answer with one word, yes or no."


def answers(endpoint: Endpoint, image: Image.Image, questions: Sequence[Mapping[str, Any]]) -> list[float]:
    """P(yes) of each question, 0 where a parent is not yes. Parents stand before their children.

    Raises:
        Unread: no answer that can be read.
    """
    found: list[float] = []
    for q in questions:
        held = all(found[p] > 0.5 for p in q.get("parents", ()) if p < len(found))
        found.append(yes(endpoint.ask(ASK.replace("{question}", q["text"]), [image], tokens=1, top=20)) if held else 0.0)
    return found


class Questions(Judge):
    """Share of the questions in ``metadata[i]["questions"]`` that are answered yes, and the share of each ``dimension``.

    A question is ``{"text", "parents", "dimension"}``. One whose parents are not all yes counts as no, and is not asked.
    """

    card: ClassVar[Card] = Card(
        name="vlm-questions",
        summary="share of a suite's questions that a vision-language model answers with yes",
        unit="share; 0 to 1",
        citation="Hu et al. 2024 (DPG-Bench), arXiv 2403.05135; the template is ours",
        licence="of the model",
        needs=frozenset({"images", "prompts", "metadata"}),
        across_prompts=True,
    )
    default = "{prompt}"

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        rows = batch.metadata or ()
        shares: list[dict[str, float]] = [{} for _ in rows]

        def one(i: int) -> float:
            questions = rows[i].get("questions") or []
            if not questions:
                raise Unread("nothing says what to ask: no questions")
            held = [p > 0.5 for p in answers(self.endpoint, batch.images[i], questions)]
            of: dict[str, list[bool]] = defaultdict(list)
            for q, ok in zip(questions, held, strict=True):
                if q.get("dimension"):
                    of[q["dimension"]].append(ok)
            shares[i] = {name: sum(v) / len(v) for name, v in of.items()}
            return sum(held) / len(held)

        values, errors = self.endpoint.all(one, len(batch))
        names = sorted({name for s in shares for name in s})
        out = {name: torch.tensor([s.get(name, torch.nan) for s in shares]) for name in names}
        return ScoreBatch({self.name: values, **out}, errors, frozenset(names))


class Checklist(Absolute):
    """Sum of weight x (+1 for yes, -1 for no) over the questions of a JSON file; masked ones count 0.

    The file is a list of ``{"text", "weight", "parents", "probability"}``: a question whose parents are not all yes is
    masked, ``{prompt}`` in a text is the prompt, and one with ``probability`` counts weight x P(yes) instead.
    """

    card = Card(
        name="vlm-checklist",
        summary="weighted sum of yes (+1) and no (-1) to a list of questions, asked of a vision-language model",
        unit="of the weights",
        citation="Xu et al. 2024 (VisionReward), arXiv 2412.21059; the template is ours",
        licence="of the model",
        across_prompts=True,
    )

    def __init__(self, endpoint: Endpoint, questions: str | None = None) -> None:
        """``questions`` is the text of the file."""
        try:
            self.questions: list[dict[str, Any]] = json.loads(questions or "")
            if not all(isinstance(q["text"], str) and isinstance(q["weight"], int | float) for q in self.questions):
                raise TypeError("each must have a text and a weight")
        except (ValueError, TypeError, KeyError) as e:
            raise ConfigError(f"not a list of questions: {e}", hint='[{"text": "...", "weight": 1.0, "parents": [0]}]') from e
        super().__init__(endpoint, "{prompt}\n" + str(questions))

    def value(self, image: Image.Image, prompt: str) -> float:
        asked = [{**q, "text": q["text"].replace("{prompt}", prompt)} for q in self.questions]
        found = answers(self.endpoint, image, asked)
        total = 0.0
        for q, p in zip(asked, found, strict=True):
            masked = not all(found[i] > 0.5 for i in q.get("parents", ()))
            total += 0 if masked else q["weight"] * (p if q.get("probability") else 1 if p > 0.5 else -1)
        return total
