"""``diffalign serve``: scorers over HTTP for :mod:`diffalign.scorers.http`. Loopback and a token unless told otherwise."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from diffalign.data.images import decode
from diffalign.errors import DataError
from diffalign.scorers import ScoreBatch, ScoreInput, Scorer, isolated
from diffalign.scoring import Identity, identify, make_scorers

PICTURE_BYTES = 32 << 20  # of base64, for one picture of a batch
IDLE = 60.0  # seconds without a byte after which a client is gone


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


class ScorerServer(ThreadingHTTPServer):
    """Serves the named scorers, one request at a time on the device, many connections at once.

    ``GET /health`` needs no token. Port 0 takes a free one (``server_address`` says which).
    """

    daemon_threads = True

    def __init__(
        self, names: Sequence[str], token: str, host: str = "127.0.0.1", port: int = 8421, max_batch: int = 64
    ) -> None:
        scorers = make_scorers(names)
        self.scorers: dict[str, tuple[Scorer, Identity]] = {
            s.name: (s, identify(n, s)) for n, s in zip(names, scorers, strict=True)
        }
        self.token, self.max_batch, self.device = token, max_batch, threading.Lock()
        super().__init__((host, port), Handler)

    def info(self, name: str) -> dict[str, Any]:
        scorer, identity = self.scorers[name]
        card = getattr(scorer, "card", None)
        return {
            "name": name, "version": identity.version, "preprocess_version": identity.preprocess, "max_batch": self.max_batch,
            "needs": sorted(card.needs) if card else ["images", "prompts"],
        }  # fmt: skip

    def score(self, name: str, body: Any) -> dict[str, Any]:
        """The answer to a request; a picture that cannot be read is an error of that picture."""
        images, prompts, times = _parts(body, self.max_batch)
        pictures: list[Any] = []
        errors: list[str | None] = []
        for number, text in enumerate(images):
            try:
                pictures.append(decode(base64.b64decode(text, validate=True), f"picture {number}"))
                errors.append(None)
            except (DataError, binascii.Error, ValueError, TypeError) as e:
                errors.append(e.message if isinstance(e, DataError) else f"picture {number}: not base64: {e}")
        good = [i for i, e in enumerate(errors) if e is None]
        found = ScoreBatch({name: torch.empty(0)})
        if good:
            at = None if times is None else torch.tensor([times[i] for i in good])
            with self.device:
                found = isolated(self.scorers[name][0], ScoreInput(pictures, [prompts[i] for i in good], times=at))
        values: dict[str, list[float | None]] = {n: [None] * len(images) for n in found.values}
        for n, column in found.values.items():
            for i, v in zip(good, column.tolist(), strict=True):
                values[n][i] = v if v == v else None
        truncated = [False] * len(images)
        for i, error, cut in zip(good, found.errors, found.truncated, strict=True):
            errors[i], truncated[i] = error, cut
        return {"values": values, "errors": errors, "partial": sorted(found.partial), "truncated": truncated}


def _parts(body: Any, limit: int) -> tuple[list[Any], list[str], list[float] | None]:
    if not isinstance(body, dict) or not all(isinstance(body.get(k), list) for k in ("images", "prompts")):
        raise Refused(400, 'expected {"images": [...], "prompts": [...]}')
    images, prompts = body["images"], body["prompts"]
    if not images or len(images) != len(prompts) or not all(isinstance(p, str) for p in prompts):
        raise Refused(400, f"{len(images)} images, but {len(prompts)} prompts; one text for each")
    if len(images) > limit:
        raise Refused(413, f"{len(images)} images; at most {limit} a request")
    times = body.get("times")
    if times is not None and not (
        isinstance(times, list) and len(times) == len(images) and {type(t) for t in times} <= {int, float}
    ):
        raise Refused(400, f"times must be {len(images)} numbers, one for each image")
    return images, prompts, times


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ScorerServer
    timeout = IDLE

    def do_GET(self) -> None:
        self._answer(
            lambda: {"status": "ok", "scorers": list(self.server.scorers)} if self.path == "/health" else self._info()
        )

    def do_POST(self) -> None:
        self._answer(lambda: self.server.score(self._name(), self._body()))

    def _info(self) -> dict[str, Any]:
        return self.server.info(self._name())

    def _name(self) -> str:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(401, "wrong or missing token")
        name = self.path.strip("/")
        if name not in self.server.scorers:
            raise Refused(404, f"no scorer {name!r}; here: {', '.join(self.server.scorers)}")
        return name

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Refused(411, "say the length")
        if int(length) > self.server.max_batch * PICTURE_BYTES:
            raise Refused(413, "too large a request")
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError as e:
            raise Refused(400, f"not JSON: {e}") from e

    def _answer(self, make: Any) -> None:
        try:
            status, said = 200, make()
        except Refused as e:
            status, said = e.status, {"error": str(e)}
        except Exception as e:  # our mistake; the client must hear of it
            status, said = 500, {"error": f"{type(e).__name__}: {e}"[:300]}
        data = json.dumps(said, allow_nan=False).encode()
        with contextlib.suppress(ConnectionError):  # a client that did not wait
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the answers say what is wrong."""
