"""Datasets of the hub, streamed: the real client in a process of its own, against a server on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from diffalign.data.images import encode_png, sha256
from diffalign.data.tables import read_table
from diffalign.importing import ImportConfig, import_pairs
from tests.test_import import IMAGE, PICKAPIC, pick, struct

COMMIT = "0" * 39 + "1"
ROOT = Path(__file__).parents[1]


class DatasetServer:
    """As much of the hub as streaming asks for: what a dataset holds, and ranges of its files."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.sent = 0
        self.fails = False
        """Whether files are refused."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = unquote(self.path.partition("?")[0])
                for name, files in repositories.items():
                    if path.startswith(f"/datasets/{name}/resolve/"):
                        return self.file(files, path.split("/", 6)[6])
                    if path.startswith(f"/api/datasets/{name}/tree/"):
                        below = (path.split("/", 7)[7:] or [""])[0]
                        return self.reply(200, json.dumps(tree(files, below)).encode())
                    if path.startswith(f"/api/datasets/{name}"):
                        about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                        return self.reply(200, json.dumps(about).encode())
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def file(self, files: dict[str, bytes], name: str) -> None:
                if name not in files:
                    return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                if server.fails and name.endswith(".parquet"):
                    return self.reply(403, b"{}")
                data, asked = files[name], self.headers.get("Range")
                if asked is None:
                    return self.reply(200, data, {"ETag": '"1"'})
                first, _, last = asked.removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1 if last else None]
                server.sent += len(part)
                said = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                return self.reply(206, part, {"ETag": '"1"', "Content-Range": said})

            def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT} | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(ConnectionError):  # the client wanted no more
                        self.wfile.write(data)

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def tree(files: dict[str, bytes], below: str) -> list[dict[str, object]]:
    """Files and folders right under a folder, as the hub lists them."""
    start = f"{below}/" if below else ""
    names = [f.removeprefix(start) for f in files if f.startswith(start)]
    found: list[dict[str, object]] = []
    for name in dict.fromkeys(n.partition("/")[0] for n in names):
        if name in names:
            found.append({"type": "file", "path": start + name, "size": len(files[start + name]), "oid": "1" * 40})
        else:
            found.append({"type": "directory", "path": start + name, "oid": "2" * 40})
    return found


def parquet(rows: list[dict[str, object]], schema: pa.Schema, group: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, row_group_size=group)
    return buffer.getvalue()


CARD = b"---\nlicense: mit\n---\n"
PICK = [pick(n, (1.0, 0.0, 0.5, None)[n % 4]) for n in range(12)]
PICK_FILES = {
    "README.md": CARD,
    "data/train-00000-of-00002.parquet": parquet(PICK[:8], PICKAPIC),
    "data/train-00001-of-00002.parquet": parquet(PICK[8:], PICKAPIC),
    "data/test-00000-of-00001.parquet": parquet([pick(20, 1.0)], PICKAPIC),
}
TRL = pa.schema([("prompt", pa.string()), ("chosen", IMAGE), ("rejected", IMAGE)])
NOISE = [encode_png(picture(n, 256)) for n in range(40)]
BIG = [{"prompt": f"p{n}", "chosen": struct(NOISE[n]), "rejected": struct(NOISE[n + 1])} for n in range(39)]
PAIRS = parquet(BIG * 2, TRL, 39)
LINES = [{"prompt": "p", "chosen": "pics/w.png", "rejected": "pics/l.png"}]
PATHS = {
    "README.md": b"---\nlicense: cc0-1.0\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n",
    "train.jsonl": "".join(json.dumps(x) + "\n" for x in LINES).encode(),
    "pics/w.png": NOISE[0],
    "pics/l.png": NOISE[1],
}
REPOSITORIES = {
    "some/pickapic": PICK_FILES,
    "some/pairs": {"data/train-00000-of-00001.parquet": PAIRS},
    "some/paths": PATHS,
}


@pytest.fixture
def server() -> Iterator[DatasetServer]:
    made = DatasetServer(REPOSITORIES)
    yield made
    made.http.shutdown()


def there(server: DatasetServer, cache: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a process that takes our server for the hub."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.http.server_port}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


@pytest.mark.slow
def test_a_streamed_dataset_is_imported_as_its_files_are(server: DatasetServer, tmp_path: Path) -> None:
    """The same tables as from the files, the card's licence from the first run on, and the same bytes after a break."""
    out = tmp_path / "out"
    words = ["-m", "diffalign", "import", "format=pickapic", "path=some/pickapic", "shard_size=3", f"output_dir={out}"]
    done = there(server, tmp_path / "cache", *words)
    assert done.returncode == 0, done.stderr
    assert "9 pairs of 12 rows, 18 images" in done.stdout
    for name, data in PICK_FILES.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
        if "test" in name:
            (tmp_path / "local" / name).unlink()
    said = {"path": str(tmp_path / "local" / "data"), "format": "pickapic", "source": "some/pickapic", "licence": "mit"}
    import_pairs(ImportConfig(**said, output_dir=str(tmp_path / "own")))
    for table in ("images", "pairs"):
        a, b = (read_table(f, table).to_pylist() for f in (out, tmp_path / "own"))
        assert [{**r, "pair_id": None} for r in a] == [{**r, "pair_id": None} for r in b]
    whole = files(out)
    (out / "pairs" / "00001.parquet").unlink()
    (out / "pairs" / "00003.parquet").unlink()
    server.fails = True
    broken = there(server, tmp_path / "cache", *words)
    assert (broken.returncode, "Traceback" in broken.stderr) == (2, False)
    assert "some/pickapic: cannot read the dataset" in broken.stderr
    server.fails = False
    assert there(server, tmp_path / "cache", *words).returncode == 0
    assert files(out) == whole
    test = there(server, tmp_path / "cache", *words[:-1], "split=test", f"output_dir={tmp_path / 'test'}")
    assert "1 pairs of 1 rows" in test.stdout


@pytest.mark.slow
def test_ids_alone_leave_the_pictures_where_they_are(server: DatasetServer, tmp_path: Path) -> None:
    words = ["-m", "diffalign", "import", "format=trl", "path=some/pairs", "pictures=false", f"output_dir={tmp_path / 'out'}"]
    done = there(server, tmp_path / "cache", *words)
    assert "78 pairs of 78 rows" in done.stdout, done.stderr
    assert server.sent < len(PAIRS) / 2  # the client reads 5 MB ahead in each row group
    some = there(server, tmp_path / "cache", *words[:-2], "limit=3", f"output_dir={tmp_path / 'some'}")
    assert some.returncode == 0, some.stderr
    assert "3 pairs of 3 rows" in some.stdout


@pytest.mark.slow
def test_training_and_scoring_stream_too_and_what_is_not_there_is_named(server: DatasetServer, tmp_path: Path) -> None:
    code = "from diffalign.data.pairs import read_pairs; from hashlib import sha256\n"
    code += "print([sha256(p.chosen.data).hexdigest() for p in read_pairs('some/pairs', 2)])\n"
    code += "try: read_pairs('no/where')\nexcept Exception as e: print(type(e).__name__, e)"
    done = there(server, tmp_path / "cache", "-c", code)
    lines = done.stdout.splitlines()
    assert lines[0] == str([sha256(NOISE[0]), sha256(NOISE[1])]), done.stderr
    assert re.match("DataError no/where: cannot read the dataset", lines[1])


@pytest.mark.slow
def test_paths_of_a_streamed_table_are_those_of_image_root_alone(server: DatasetServer, tmp_path: Path) -> None:
    """Never files of the folder that the command happens to run in."""
    (tmp_path / "pics").mkdir()
    for side in "wl":
        (tmp_path / "pics" / f"{side}.png").write_bytes(NOISE[9 + (side == "l")])
    words = ["-m", "diffalign", "import", "format=trl", "path=some/paths"]
    done = there(server, tmp_path / "cache", *words, f"output_dir={tmp_path / 'none'}", cwd=tmp_path)
    assert "nothing is left of 1 rows: 1 a picture is missing" in done.stderr, done.stdout
    root = "image_root=hf://datasets/some/paths"
    done = there(server, tmp_path / "cache", *words, root, f"output_dir={tmp_path / 'out'}", cwd=tmp_path)
    assert "1 pairs of 1 rows" in done.stdout, done.stdout + done.stderr
    images = read_table(tmp_path / "out", "images").to_pylist()
    assert [r["image"]["bytes"] for r in images] == NOISE[:2]
    assert {r["licence"] for r in images} == {"cc0-1.0"}
