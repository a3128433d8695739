"""What is fetched from the hub: its real client in its own process, against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffalign.errors import ModelError
from diffalign.hub import pipeline_files

COMMIT = "0" * 39 + "1"


class Server:
    """As much of the hub as a download asks for: who is there, what it holds, and the files."""

    def __init__(self, repositories: dict[str, dict[str, str]]) -> None:
        asked = self.asked = set()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                for name, files in repositories.items():
                    if path.startswith(f"/{name}/resolve/"):
                        file = path.split("/", 5)[5]
                        if file not in files:
                            return self.reply(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
                        if body:
                            asked.add(file)
                        return self.reply(200, files[file].encode(), body, {"ETag": f'"{abs(hash(file)):x}"'})
                    if path.startswith(f"/api/models/{name}/tree/"):
                        rows = [{"type": "file", "path": f, "size": len(t), "oid": "1"} for f, t in files.items()]
                        return self.reply(200, json.dumps(rows).encode(), body)
                    if path.startswith(f"/api/models/{name}"):
                        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                        return self.reply(200, json.dumps(info).encode(), body)
                return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

            def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                common = {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT}
                for key, value in (common | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"


INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NEEDED = {
    "model_index.json": json.dumps(INDEX),
    "README.md": "---\nlicense: other\nlicense_name: big-model-licence\n---\n",
    "scheduler/scheduler_config.json": "{}",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors": "text",
    "tokenizer/vocab.json": "{}",
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": "one",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": "two",
    "transformer/diffusion_pytorch_model.safetensors.index.json": "{}",
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "vae",
}
NOT_NEEDED = {
    "flux1-dev.safetensors": "24 GB",
    "ae.safetensors": "vae",
    "sd.ckpt": "all",
    "picture.png": "picture",
    "text_encoder/pytorch_model.bin": "text",
    "vae/diffusion_pytorch_model.bin": "vae",
    "other_folder/model.safetensors": "other",
}
HALF = {"text_encoder/model.fp16.safetensors": "t", "transformer/diffusion_pytorch_model.fp16.safetensors": "n"}
ADAPTER = {"README.md": "card", "lora.safetensors": "weights", "lora.bin": "weights", "example.png": "picture"}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server({"big/model": NEEDED | NOT_NEEDED | HALF, "some/adapter": ADAPTER})
    yield made
    made.http.shutdown()


def resolve(server: Server, cache: Path, *calls: str, offline: str = "0") -> list[str]:
    """What each expression over ``hub`` gives, in a process that takes our server for the hub."""
    code = "from diffalign import hub\nimport diffalign.errors\n"
    for call in calls:
        code += f"try: print({call})\nexcept diffalign.errors.DiffalignError as e: print(e)\n"
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": server.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_of_a_pipeline_only_what_loads_it_is_fetched(server: Server, tmp_path: Path) -> None:
    """Not the same weights once more in one file; no pickles beside safetensors; the licence; then offline from the cache."""
    folder, licence = resolve(server, tmp_path, "hub.resolve('big/model')", "hub.licence('big/model')")
    there = {str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file()}
    assert there == server.asked == NEEDED.keys()
    assert licence == "big-model-licence"
    assert resolve(server, tmp_path, "hub.resolve('big/model')", offline="1") == [folder]


def test_a_variant_is_fetched_alone(server: Server, tmp_path: Path) -> None:
    (folder,) = resolve(server, tmp_path, "hub.resolve('big/model', variant='fp16')")
    there = {str(f.relative_to(folder)) for f in Path(folder).rglob("*.safetensors")}
    assert there == HALF.keys() | {"vae/diffusion_pytorch_model.safetensors"}  # of which there is no fp16


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["m.bin", "m.safetensors", "m.fp16.safetensors"], None, ["m.safetensors"]),
        (["m.bin", "m.safetensors", "m.fp16.bin"], "fp16", ["m.safetensors"]),
        (["m.bin", "m.fp16.bin", "m.onnx"], "fp16", ["m.fp16.bin"]),
        (["m.bin", "m.non_ema.bin", "m.msgpack"], None, ["m.bin"]),
        (["m-1-of-2.safetensors", "m-2-of-2.safetensors"], None, ["m-1-of-2.safetensors", "m-2-of-2.safetensors"]),
        (["m.safetensors", "m.fp16-1-of-1.safetensors", "a.json"], "fp16", ["m.fp16-1-of-1.safetensors", "a.json"]),
        (["m.safetensors", "m-1-of-1.fp16.safetensors"], "fp16", ["m-1-of-1.fp16.safetensors"]),
    ],
)
def test_one_kind_of_weights_of_each_part(names: list[str], variant: str | None, chosen: list[str]) -> None:
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": [None, None]}
    repository = [f"{folder}/{name}" for folder in ("unet", "vae", "old") for name in names] + names
    found = pipeline_files(index, ["model_index.json", *repository], variant)
    assert sorted(found) == sorted(["model_index.json", *(f"unet/{c}" for c in chosen)])


def test_a_variant_that_no_part_has_is_named() -> None:
    with pytest.raises(ModelError, match="no weights of the variant 'fp8'"):
        pipeline_files({"unet": ["diffusers", "U"]}, ["unet/m.safetensors", "unet/m.fp16.safetensors"], "fp8")


def test_an_adapter_is_fetched_whole_and_what_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    adapter, wrong = resolve(server, tmp_path, "hub.resolve('some/adapter')", "hub.resolve('no/where')")
    assert {f.name for f in Path(adapter).iterdir()} == ADAPTER.keys() - {"lora.bin"}
    assert wrong.startswith("no/where: no such folder, and no such repository on the hub")
