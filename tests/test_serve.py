"""Scorers over HTTP: real sockets, lossless pictures, refusals, silence."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture

from diffalign.cells import ScoreConfig, score
from diffalign.data.scores import read_scored
from diffalign.errors import ConfigError, ModelError
from diffalign.scorers import ScoreInput
from diffalign.scorers.http import Address, HTTPScorer, malformed, png64
from diffalign.scoring import identify, make_scorer
from diffalign.serve import ScorerServer

PLUGS = """
import numpy as np
import torch
from diffalign.scorers import Card
from diffalign.scorers.base import scored

def pixels(images, prompts):
    arrays = [np.asarray(i, np.float64).ravel() for i in images]
    return [float((x * np.arange(x.size)).sum() % 9973) for x in arrays]

def picky(images, prompts):
    if "bad" in prompts:
        raise RuntimeError("no")
    return [1.0] * len(images)

class Short:
    name, card = "short", Card("short", "reads three words", "", "", "")

    def __call__(self, batch):
        return scored("short", torch.ones(len(batch)), [len(p.split()) > 3 for p in batch.prompts])

short = Short()

class Timed:
    name, card = "timed", Card("timed", "the time of a preview", "", "", "")

    def __call__(self, batch):
        return scored("timed", torch.zeros(len(batch)) if batch.times is None else batch.times)

timed = Timed()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScorerServer]:
    (tmp_path / "served.py").write_text(PLUGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFALIGN_TOKEN", "secret")
    with ScorerServer(
        ["served:pixels", "served:picky", "served:short", "served:timed", "shapes"], "secret", port=0, max_batch=4
    ) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def address(server: ScorerServer, name: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


BATCH = ScoreInput([picture(i) for i in range(6)], ["a red circle on a grey background"] * 6)


@pytest.mark.parametrize("name", ["served:pixels", "shapes"])
def test_a_served_scorer_gives_the_local_numbers(name: str, server: ScorerServer) -> None:
    """Six pictures in requests of four; one changed pixel would change the first scorer."""
    local, remote = make_scorer(name), make_scorer(f"http:{address(server, name.rpartition(':')[2])}")
    a, b = local(BATCH), remote(BATCH)
    assert a.values.keys() == b.values.keys()
    for key, value in a.values.items():
        torch.testing.assert_close(value, b.values[key], rtol=0, atol=0, equal_nan=True)
    assert a.partial == b.partial
    assert identify(name, local) == identify(f"http:{address(server, name)}", remote)


def test_cut_prompts_are_flagged_over_http_too(server: ScorerServer) -> None:
    remote = make_scorer(f"http:{address(server, 'short')}")
    batch = ScoreInput(BATCH.images[:5], ["a b c", "a b c d", "a", "b", "a b c d"])
    assert remote(batch).truncated == [False, True, False, False, True]


def test_times_of_previews_travel_along(server: ScorerServer) -> None:
    """In requests of four; a picture that cannot be read keeps the others at their own times."""
    remote = make_scorer(f"http:{address(server, 'timed')}")
    times = [0.0, 1.0, 2.5, 951.0, 4.0, 5.0]
    told = ScoreInput(BATCH.images, BATCH.prompts, times=torch.tensor(times))
    assert remote(told).values["timed"].tolist() == times
    assert remote(BATCH).values["timed"].tolist() == [0.0] * 6
    body = {"images": [png64(picture(0)), "!", png64(picture(1))], "prompts": ["p"] * 3, "times": [1.0, 2.0, 3]}
    assert server.score("timed", body)["values"] == {"timed": [1.0, None, 3.0]}


def test_an_address_alone_is_a_scorer(server: ScorerServer) -> None:
    assert make_scorer(address(server, "shapes")).name == "shapes"


def test_scores_of_a_served_scorer_fill_the_table(server: ScorerServer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, prompt in enumerate(["good", "bad", "good"]):
        picture(i).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(prompt)
    score(
        ScoreConfig(path=str(tmp_path / "in"), output_dir=str(tmp_path / "out"), scorers=[f"http:{address(server, 'picky')}"])
    )
    rows = read_scored(tmp_path / "out")
    assert [r.values["picky"] for r in rows] == [1, None, 1]
    assert rows[1].errors == {"picky": "RuntimeError: no"}


def ask(server: ScorerServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_what_is_wrong_is_refused_with_its_reason(server: ScorerServer) -> None:
    token = {"Authorization": "Bearer secret"}
    good = {"images": [png64(picture(0))], "prompts": ["p"]}

    def post(body: object, path: str = "/pixels") -> tuple[int, dict]:
        return ask(server, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **token)

    assert ask(server, "GET", "/health") == (200, {"status": "ok", "scorers": ["pixels", "picky", "short", "timed", "shapes"]})
    assert ask(server, "GET", "/pixels")[0] == 401
    assert ask(server, "POST", "/pixels", json.dumps(good).encode(), Authorization="Bearer other")[0] == 401
    assert post(good)[0] == 200
    assert post(good, "/other")[0] == 404
    assert post(b"{")[0] == 400
    assert post([1])[0] == 400
    assert post({**good, "prompts": []})[0] == 400
    assert post({**good, "prompts": [1]})[0] == 400
    for times in ([], [1.0, 2.0], ["1"], [None], 3.0):
        assert post({**good, "times": times}, "/timed")[0] == 400
    assert post({"images": good["images"] * 5, "prompts": ["p"] * 5})[0] == 413
    status, said = post({"images": ["!", good["images"][0], ""], "prompts": ["p"] * 3})
    assert status == 200
    assert [e is None for e in said["errors"]] == [False, True, False]
    assert [v is None for v in said["values"]["pixels"]] == [True, False, True]
    assert post({"images": ["!"], "prompts": ["p"]})[1]["values"] == {"pixels": [None]}
    raw = socket.create_connection(server.server_address[:2], timeout=20)
    raw.sendall(b"POST /pixels HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: 99999999999\r\n\r\n")
    assert b" 413 " in raw.recv(100)
    raw.close()


def test_a_wrong_token_or_nobody_is_one_clear_error(server: ScorerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_TOKEN", "other")
    with pytest.raises(ModelError, match=r"answered 401.*token"):
        HTTPScorer(Address(address(server, "pixels")))
    with pytest.raises(ModelError, match="no answer"):
        HTTPScorer(Address("http://127.0.0.1:9/x", attempts=1))
    with pytest.raises(ConfigError, match="is not an address"):
        HTTPScorer(Address("ftp://x"))


def test_silence_ends_after_the_timeout_with_nulls(server: ScorerServer) -> None:
    scorer = HTTPScorer(Address(address(server, "pixels"), timeout=0.3, attempts=2, pause=0))
    with server.device:  # somebody else keeps the device busy
        began = time.monotonic()
        found = scorer(BATCH)
    assert time.monotonic() - began < 10
    assert found.errors == ["no answer within 0.3 s"] * 6
    assert found.values["pixels"].isnan().all()


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"values": {}, "errors": [None]},
        {"values": {"a": [1, 2]}, "errors": [None]},
        {"values": {"a": ["1"]}, "errors": [None]},
        {"values": {"a": [1]}, "errors": [None], "truncated": [1]},
    ],
)
def test_answers_that_are_none_are_not_believed(said: object) -> None:
    assert malformed(said, 1) is not None
    assert malformed({"values": {"a": [1]}, "errors": [None]}, 1) is None


def test_png_is_lossless() -> None:
    import base64
    import io

    from PIL import Image

    back = Image.open(io.BytesIO(base64.b64decode(png64(picture(3)))))
    assert np.array_equal(np.asarray(back), np.asarray(picture(3)))
