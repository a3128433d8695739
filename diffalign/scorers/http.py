"""A scorer in another process or on another machine: JSON and PNG over HTTP, no pickle, nothing lossy.

``GET /NAME`` says what the scorer is; ``POST /NAME`` takes ``{"images": [base64 PNG], "prompts": [...]}``, and of previews the
``"times"`` of :class:`diffalign.scorers.ScoreInput`, and gives
``{"values": {name: [number or null]}, "errors": [text or null], "partial": [name], "truncated": [bool]}``; the last two
may be left out. ``diffalign serve`` is such a server.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from diffalign.errors import ConfigError, ModelError
from diffalign.scorers.base import ScoreBatch, ScoreInput

TOKEN = "DIFFALIGN_TOKEN"  # noqa: S105 - the name of a variable


@dataclass(frozen=True)
class Address:
    """Where JSON is sent, and for how long: ``timeout`` seconds for every answer, ``attempts`` where it is silent or busy.

    Redirects and proxies are not followed, since they would take the token elsewhere.
    """

    url: str
    timeout: float = 120
    attempts: int = 3
    pause: float = 1
    """Seconds before the second attempt; twice that before the third."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not an address", hint="http://127.0.0.1:8421/clip")

    def ask(self, method: str, body: Mapping[str, Any] | None, token: str) -> tuple[Any, str | None]:
        """(answer, None), or (None, reason)."""
        parts = urlsplit(self.url)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        reason = ""
        for attempt in range(self.attempts):
            time.sleep(self.pause * attempt)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
            try:
                connection.request(method, parts.path or "/", data, headers)
                answer = connection.getresponse()
                text = answer.read()
                if answer.status == 200:
                    return json.loads(text), None
                reason = f"it answered {answer.status} {text[:200].decode('utf-8', 'replace')}".strip()
                if answer.status < 500 and answer.status != 429:  # asking again would not help
                    break
            except TimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException, ValueError) as e:
                reason = f"no answer: {type(e).__name__}: {e}"
            finally:
                connection.close()
        return None, reason


class HTTPScorer:
    """The scorer at an address. Pictures whose request failed have no value and the reason as their error: never 0.

    Raises:
        ModelError: no scorer answers there.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        said, error = self._ask("GET", None)
        if error is not None:
            raise ModelError(f"{address.url}: {error}", hint=f"start `diffalign serve`; {TOKEN} holds its token")
        try:
            self.name, self.version, self.preprocess_version = (
                str(said[k]) for k in ("name", "version", "preprocess_version")
            )
            self.max_batch = int(said["max_batch"])
        except (KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{address.url}: not a scorer: {str(said)[:200]}") from e

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        values: dict[str, torch.Tensor] = {}
        errors: list[str | None] = []
        truncated: list[bool] = []
        partial: set[str] = set()
        for start in range(0, len(batch), self.max_batch):
            part = slice(start, start + self.max_batch)
            some = batch.part(part)
            count = len(some)
            body: dict[str, Any] = {"images": [png64(i) for i in some.images], "prompts": list(some.prompts)}
            if some.times is not None:
                body["times"] = some.times.tolist()
            said, error = self._ask("POST", body)
            if error is None and (error := malformed(said, count)) is None:
                for name, found in said["values"].items():
                    whole = values.setdefault(name, torch.full((len(batch),), torch.nan))
                    whole[part] = torch.tensor([torch.nan if v is None else float(v) for v in found])
                partial |= set(said.get("partial", ()))
            errors += [error] * count if error is not None else said["errors"]
            truncated += said.get("truncated", [False] * count) if error is None else [False] * count
        values = values or {self.name: torch.full((len(batch),), torch.nan)}
        return ScoreBatch(values, errors, frozenset(partial), truncated)

    def _ask(self, method: str, body: Mapping[str, Any] | None) -> tuple[Any, str | None]:
        return self.address.ask(method, body, os.environ.get(TOKEN, ""))


def malformed(said: Any, count: int) -> str | None:
    """What is wrong with the answer for ``count`` pictures, or None."""
    try:
        columns: Sequence[Any] = [*said["values"].values(), said["errors"]]
        truncated = said.get("truncated", [False] * count)
    except (KeyError, TypeError, AttributeError):
        return f"not the answer of a scorer: {str(said)[:100]}"
    if not said["values"] or any(not isinstance(c, list) or len(c) != count for c in columns):
        return f"not {count} values and errors: {str(said)[:100]}"
    if any(not isinstance(v, int | float | None) for c in columns[:-1] for v in c):
        return "its values are not numbers"
    if not isinstance(truncated, list) or [type(v) for v in truncated] != [bool] * count:
        return f"its truncated are not {count} truth values"
    return None


def png64(image: Image.Image) -> str:
    """Lossless, as text."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
