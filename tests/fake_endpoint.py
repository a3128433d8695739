"""An OpenAI-compatible endpoint of our own that answers as it is told."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class Fake(ThreadingHTTPServer):
    """``answer(pictures, text)`` gives a choice, or a status."""

    daemon_threads = True
    answer: Callable[[list[Image.Image], str], Any]

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), FakeHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class FakeHandler(BaseHTTPRequestHandler):
    server: Fake

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        *images, text = body["messages"][0]["content"]
        urls = [i["image_url"]["url"].partition("base64,")[2] for i in images]
        found = self.server.answer([Image.open(io.BytesIO(base64.b64decode(u))) for u in urls], text["text"])
        self.send_response(found if isinstance(found, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [] if isinstance(found, int) else [found]}).encode())

    def log_message(self, format: str, *args: Any) -> None: ...


def said(text: str) -> dict[str, Any]:
    return {"message": {"content": text}}
