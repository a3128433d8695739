"""Vision-language models as judges, over an OpenAI-compatible endpoint (vLLM, SGLang, and others).

``vlm:URL,MODEL[,TEMPLATE]`` is VQAScore, P("yes") from the log-probabilities of the first token (Lin et al. 2024, arXiv
2404.01291, for chat models). :class:`Pointwise` reads a number that the model writes, :class:`Pairwise` compares two
pictures in both orders. What cannot be read is null with its reason, never a middle value.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.scorers.base import Card, ScoreBatch, ScoreInput, require
from diffalign.scorers.http import Address, png64

KEY = "DIFFALIGN_VLM_KEY"
QUESTION = 'Does this picture show "{prompt}"? Answer with one word, yes or no.'
RATING = 'How well does this picture show "{prompt}"? Answer with one number alone, from 0 (not at all) to 10 (perfectly).'
FINAL = (
    'How well does this picture show "{prompt}", and how well is it made? Say why in a sentence, then write "Final Score: "'
    " and a number from 1 (worst) to 5 (best)."
)
CHOICE = 'Both pictures were made for "{prompt}". Which one is better? Answer with one word, first or second.'


class Unread(Exception):
    """An answer that says nothing that can be read, or none at all."""


class Endpoint:
    """Greedy answers of one model, ``parallel`` requests at once. ``address`` is that of the endpoint, as ``http://host/v1``."""

    def __init__(self, address: Address, model: str, parallel: int = 8) -> None:
        if not model:
            raise ConfigError(
                "a judge needs the address of an endpoint and a model", hint="vlm:http://127.0.0.1:8000/v1,MODEL"
            )
        self.address = replace(address, url=address.url.rstrip("/") + "/chat/completions")
        self.model, self.parallel = model, parallel

    def ask(self, text: str, images: Sequence[Image.Image], tokens: int, top: int = 0) -> dict[str, Any]:
        """The first choice of the answer, with ``top`` log-probabilities a token.

        Raises:
            Unread: nothing came, or something else; says why.
        """
        pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png64(i)}"}} for i in images]
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": tokens}
        body["messages"] = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
        if top:
            body |= {"logprobs": True, "top_logprobs": top}
        said, reason = self.address.ask("POST", body, os.environ.get(KEY, "none"))
        if reason is not None:
            raise Unread(reason)
        try:
            found: dict[str, Any] = said["choices"][0]
        except (KeyError, IndexError, TypeError) as e:
            raise Unread(f"not the answer of a chat model: {str(said)[:100]}") from e
        return found

    def all(self, ask: Callable[[int], float], count: int) -> tuple[torch.Tensor, list[str | None]]:
        """(count,) values of ``ask``, NaN with a reason where it raised :class:`Unread`."""

        def one(i: int) -> tuple[float, str | None]:
            try:
                return ask(i), None
            except Unread as e:
                return math.nan, str(e)

        with ThreadPoolExecutor(self.parallel) as pool:
            found = list(pool.map(one, range(count)))
        return torch.tensor([v for v, _ in found]), [e for _, e in found]


def yes(choice: dict[str, Any]) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token: case and spaces aside, all their spellings count.

    Raises:
        Unread: no log-probabilities, or neither word is among them.
    """
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        mass = {"yes": 0.0, "no": 0.0}
        for token in top:
            word = token["token"].strip().lower()
            if word in mass:
                mass[word] += math.exp(token["logprob"])
    except (KeyError, IndexError, TypeError) as e:
        raise Unread("the endpoint gave no log-probabilities") from e
    total = mass["yes"] + mass["no"]
    if total == 0:
        raise Unread(f"neither yes nor no among {[t['token'] for t in top]}")
    return mass["yes"] / total


def written(choice: dict[str, Any]) -> str:
    """The text of an answer."""
    message = choice.get("message")
    return str(message.get("content") or "") if isinstance(message, dict) else ""


class Judge(ABC):
    """A scorer that asks ``endpoint`` in the words of ``template``, which holds ``{prompt}``."""

    card: ClassVar[Card]
    default: ClassVar[str]

    def __init__(self, endpoint: Endpoint, template: str | None = None) -> None:
        self.endpoint, self.template = endpoint, template or self.default
        if "{prompt}" not in self.template:
            raise ConfigError("the template of a judge has no {prompt}")
        mark = sha256(f"{endpoint.model}\n{self.template}".encode()).hexdigest()[:8]
        self.name, self.version = self.card.name, f"{self.card.version}-{mark}"

    def text(self, prompt: str) -> str:
        return self.template.replace("{prompt}", prompt)

    @abstractmethod
    def __call__(self, batch: ScoreInput) -> ScoreBatch: ...


class Absolute(Judge):
    """A value of each picture by itself."""

    @abstractmethod
    def value(self, image: Image.Image, prompt: str) -> float:
        """Of one picture.

        Raises:
            Unread: no answer that can be read.
        """

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        values, errors = self.endpoint.all(lambda i: self.value(batch.images[i], batch.prompts[i]), len(batch))
        return ScoreBatch({self.name: values}, errors)


class VQAScore(Absolute):
    """P(yes) to whether the picture shows its prompt."""

    card = Card(
        name="vlm",
        summary="P(yes) to whether the picture shows the prompt, by log-probabilities of a vision-language model",
        unit="probability, 0 to 1",
        citation="Lin et al. 2024 (VQAScore), arXiv 2404.01291",
        licence="of the model",
        across_prompts=True,
    )
    default = QUESTION

    def value(self, image: Image.Image, prompt: str) -> float:
        return yes(self.endpoint.ask(self.text(prompt), [image], tokens=1, top=20))


class Pointwise(Absolute):
    """The number from 0 to 10 that the model writes, and nothing that merely contains one."""

    card = Card(
        name="vlm-rating",
        summary="a number from 0 to 10 that a vision-language model writes",
        unit="0 to 10",
        citation="none; the template is ours",
        licence="of the model",
        across_prompts=True,
    )
    default = RATING

    def value(self, image: Image.Image, prompt: str) -> float:
        answer = written(self.endpoint.ask(self.text(prompt), [image], tokens=16))
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(?: */ *10)?\.?", answer.strip())
        if match is None or float(match[1]) > 10:
            raise Unread(f"not a number from 0 to 10: {answer[:60]!r}")
        return float(match[1])


class UnifiedReward(Absolute):
    """The number behind "Final Score:" that UnifiedReward writes. Give the template that it was trained with."""

    card = Card(
        name="unifiedreward",
        summary='the number from 1 to 5 behind "Final Score:"',
        unit="1 to 5",
        citation="Wang et al. 2025 (UnifiedReward), arXiv 2503.05236; the default template is ours",
        licence="MIT (code); of the model",
        across_prompts=True,
    )
    default = FINAL

    def value(self, image: Image.Image, prompt: str) -> float:
        answer = written(self.endpoint.ask(self.text(prompt), [image], tokens=1024))
        found = re.findall(r"Final Score:\W*(\d+(?:\.\d+)?)", answer)
        if len(found) != 1 or not 1 <= float(found[0]) <= 5:
            raise Unread(f"no final score from 1 to 5: {answer[-60:]!r}")
        return float(found[0])


def first_or_second(answer: str) -> float:
    """1 or 0 of one word.

    Raises:
        Unread: another one.
    """
    word = answer.strip().strip(".").lower()
    if word not in ("first", "second"):
        raise Unread(f"neither first nor second: {answer[:60]!r}")
    return float(word == "first")


def image_1_or_2(answer: str) -> float:
    """1, 0 or 0.5 of the last verdict in UnifiedReward's words: image 1 or 2 is better, or both are equally good.

    Raises:
        Unread: none of them.
    """
    found = re.findall(r"image ([12]) is better|(both images are equally good)", answer, re.IGNORECASE)
    if not found:
        raise Unread(f"no verdict: {answer[-60:]!r}")
    return {"1": 1.0, "2": 0.0, "": 0.5}[found[-1][0]]


class Pairwise:
    """P(the first picture is better): both orders are asked and averaged, so a taste for a place cancels out.

    ``read`` gives the share of the first from an answer: :func:`first_or_second`, or :func:`image_1_or_2`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        template: str | None = None,
        read: Callable[[str], float] = first_or_second,
        tokens: int = 4,
    ) -> None:
        self.endpoint, self.template, self.read, self.tokens = endpoint, template or CHOICE, read, tokens

    def __call__(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[torch.Tensor, list[str | None]]:
        """(B,) of 1, 0.5 or 0, NaN with a reason where either order was not answered in one of two words."""

        def one(i: int) -> float:
            return (self._first(first[i], second[i], prompts[i]) + 1 - self._first(second[i], first[i], prompts[i])) / 2

        return self.endpoint.all(one, len(prompts))

    def _first(self, a: Image.Image, b: Image.Image, prompt: str) -> float:
        return self.read(written(self.endpoint.ask(self.template.replace("{prompt}", prompt), [a, b], self.tokens)))


def judges() -> dict[str, type[Judge]]:
    """By name."""
    from diffalign.scorers.checklist import Checklist, Questions
    from diffalign.scorers.wins import UnifiedRewardWins, Wins

    found = (VQAScore, Pointwise, UnifiedReward, Questions, Checklist, Wins, UnifiedRewardWins)
    return {cls.card.name: cls for cls in found}


def make_judge(kind: str, rest: str) -> Judge:
    """A judge by ``URL,MODEL`` or ``URL,MODEL,FILE``, a file with a template that holds ``{prompt}`` (or with questions).

    Raises:
        ConfigError: no endpoint, no model, no such file, or no ``{prompt}``.
    """
    url, model, file = [*rest.split(",", 2), "", ""][:3]
    try:
        template = Path(file).read_text(encoding="utf-8").strip() if file else None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{kind}: cannot read the template {file}: {e}") from e
    return judges()[kind](Endpoint(Address(url), model), template)
