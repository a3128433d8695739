"""Scoring sets of pictures: every source, every kind of damage, missing cells, shards, kills."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.cells import Filled, ScoreConfig, score
from diffalign.cli import main
from diffalign.data.duplicates import near
from diffalign.data.images import encode_png, fingerprint
from diffalign.data.scores import Scored, prompt_key, read_scored
from diffalign.data.sources import Row, open_source
from diffalign.data.tables import read_table, write_shard
from diffalign.errors import ConfigError, DataError
from diffalign.gallery import spearman, write_gallery
from diffalign.scorers import Callback, Card, ScoreBatch, ScoreInput, isolated
from diffalign.scoring import make_scorer
from diffalign.spread import distances, diversity
from diffalign.tally import summary
from diffalign.versus import compare
from tests.test_generate import launch

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle on a grey background"

PLUGS = """
import os, time
import numpy as np

calls, pictures = [], []

def brightness(images, prompts):
    calls.append(len(images))
    pictures.append([id(i) for i in images])
    return [float(np.asarray(i).mean()) for i in images]

def width(images, prompts):
    pictures.append([id(i) for i in images])
    return [i.width for i in images]

def picky(images, prompts):
    if any(i.size == (24, 24) for i in images):
        raise RuntimeError("I do not like 24")
    return [1.0] * len(images)

def flaky(images, prompts):
    if os.environ.get("DOWN"):
        raise TimeoutError("no answer")
    return [2.0] * len(images)

def letters(images, prompts):
    return [len(p) for p in prompts]

def slow(images, prompts):
    out = []
    for i in images:
        value = float(np.asarray(i, np.float64).sum())
        with open(os.environ["SCORE_LOG"], "a") as f:
            f.write(f"{value}\\n")
        time.sleep(0.01)
        out.append(value)
    return out
"""

RANKED = """
import os
import torch

def rank(images, prompts):
    assert os.environ["WORLD_SIZE"] == "2"
    assert not torch.distributed.is_initialized()
    return [int(os.environ["RANK"])] * len(images)
"""


@pytest.fixture
def plugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plugs.py").write_text(PLUGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plugs", raising=False)
    import plugs

    return plugs


def cli(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def run(path: Path | str, out: Path, *scorers: str, rank: int = 0, world: int = 1, **more: object) -> Filled:
    return score(ScoreConfig(path=str(path), output_dir=str(out), scorers=list(scorers), **more), rank, world)


def folder_of(folder: Path, count: int, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"prompt {i}")
    return folder


def values(out: Path, name: str) -> dict[str, float | None]:
    return {r.image_id: r.values.get(name) for r in read_scored(out)}


def mean(seed: int) -> float:
    return pytest.approx(float(np.asarray(picture(seed)).mean()), rel=1e-6)


# --- sources --------------------------------------------------------------------------------------------------------


def seen(rows: list[Row]) -> list[tuple[str | None, float]]:
    return [(r.prompt, float(np.asarray(Image.open(io.BytesIO(r.open()))).mean())) for r in rows]


EXPECTED = [(f"prompt {i}", float(np.asarray(picture(i)).mean())) for i in range(3)]


def as_files(tmp_path: Path) -> str:
    return str(folder_of(tmp_path / "files", 3))


def as_glob(tmp_path: Path) -> str:
    folder_of(tmp_path / "files", 3)
    return str(tmp_path / "files" / "*.png")


def as_metadata(tmp_path: Path) -> str:
    for i in range(3):
        (tmp_path / "meta" / "deep").mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "meta" / "deep" / f"{i}.png")
    lines = [json.dumps({"file_name": f"deep/{i}.png", "text": f"prompt {i}"}) for i in range(3)]
    (tmp_path / "meta" / "metadata.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "meta")


def as_csv(tmp_path: Path) -> str:
    folder_of(tmp_path / "csv", 3)
    lines = ["file_name,prompt", *(f"{i:03d}.png,prompt {i}" for i in range(3))]
    (tmp_path / "csv" / "table.csv").write_text("\n".join(lines))
    return str(tmp_path / "csv" / "table.csv")


def as_jsonl(tmp_path: Path) -> str:
    folder_of(tmp_path / "jsonl", 3)
    rows = [{"image": f"{i:03d}.png", "caption": f"prompt {i}"} for i in range(3)]
    (tmp_path / "jsonl" / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "jsonl" / "table.jsonl")


def as_parquet(tmp_path: Path) -> str:
    rows = [{"image": {"bytes": encode_png(picture(i)), "path": None}, "prompt": f"prompt {i}"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    return str(tmp_path / "t.parquet")


def as_ours(tmp_path: Path) -> str:
    image = [{"bytes": encode_png(picture(i)), "path": None} for i in range(3)]
    write_shard(
        tmp_path / "ours", "images", 0, [{"image_id": str(i), "image": image[i], "prompt": f"prompt {i}"} for i in range(3)]
    )
    return str(tmp_path / "ours")


def as_tar(tmp_path: Path) -> str:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for i in range(3):
            parts = {"png": encode_png(picture(i)), "txt" if i else "json": f"prompt {i}".encode()}
            if not i:
                parts["json"] = json.dumps({"caption": "prompt 0"}).encode()
            for kind, data in parts.items():
                info = tarfile.TarInfo(f"some/{i:03d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("some/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return str(tmp_path / "w.tar")


def as_memory(tmp_path: Path) -> str:
    fs = fsspec.filesystem("memory")
    for i in range(3):
        fs.pipe_file(f"/{tmp_path.name}/{i}.png", encode_png(picture(i)))
        fs.pipe_file(f"/{tmp_path.name}/{i}.txt", f"prompt {i}".encode())
    return f"memory://{tmp_path.name}"


def as_file_url(tmp_path: Path) -> str:
    return f"file://{as_files(tmp_path)}"


def as_saved(tmp_path: Path) -> str:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    data = {"image": [picture(i) for i in range(3)], "text": [f"prompt {i}" for i in range(3)]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


SOURCES = [as_files, as_glob, as_metadata, as_csv, as_jsonl, as_parquet, as_ours, as_tar, as_memory, as_file_url, as_saved]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_rows_twice(make, tmp_path: Path) -> None:
    path = make(tmp_path)
    source = open_source(path)
    first, again = list(source.rows()), list(source.rows())
    assert seen(first) == EXPECTED
    assert [r.id for r in first] == [r.id for r in again]
    assert len({r.id for r in first}) == 3
    assert open_source(path).fingerprint == source.fingerprint


def test_a_hub_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"image": encode_png(picture(i)), "prompt": f"prompt {i}"} for i in range(3)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, streaming: datasets.Dataset.from_list(rows).to_iterable_dataset()
    )
    assert seen(list(open_source("owner/name").rows())) == EXPECTED


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "file:///etc/hostname", "memory://x.png", "a/../../secret.png", "link.png"]
)
def test_paths_in_data_never_leave_their_folder(name: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "secret.png")
    inside = folder_of(tmp_path / "in", 1)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "t.jsonl").write_text(json.dumps({"image": name, "prompt": "x"}))
    (row,) = open_source(str(inside / "t.jsonl")).rows()
    assert row.uri is None
    with pytest.raises(DataError, match="leads out of"):
        row.open()


def test_image_root_names_another_folder(tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures", 1)
    (tmp_path / "t.csv").write_text(f"image,prompt\nfile://{tmp_path}/pictures/000.png,prompt 0\n000.png,prompt 0\n")
    rows = list(open_source(str(tmp_path / "t.csv"), f"file://{tmp_path}/pictures").rows())
    assert seen(rows) == [EXPECTED[0]] * 2


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.jsonl").write_text("{}\n[1]\n")
    for path, said in {
        "./nothing": "no such file or folder",
        str(tmp_path / "empty"): "no pictures, tars or tables",
        str(tmp_path / "no.csv"): "no image column; found a, b",
        str(tmp_path / "bad.jsonl"): "no image column",
        "nosuch://x": "nosuch",
    }.items():
        with pytest.raises(DataError, match=said):
            list(open_source(path).rows())


def test_a_cut_tar_keeps_what_comes_before_and_after(tmp_path: Path) -> None:
    whole = Path(as_tar(tmp_path)).read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "a.tar").write_bytes(whole[:6000])
    (folder / "b.tar").write_bytes(b"x" * 700)
    (folder / "c.tar").write_bytes(whole)
    rows = list(open_source(str(folder)).rows())
    assert [r.id for r in rows] == ["a.tar/some/000", "a.tar", "b.tar", *(f"c.tar/some/00{i}" for i in range(3))]
    for row in rows[1:3]:
        with pytest.raises(DataError, match="the tar is damaged"):
            row.open()


def test_text_that_no_table_takes_is_mended(plugs, tmp_path: Path) -> None:
    odd = os.fsdecode(b"n\xff.png")
    picture(0).save(tmp_path / "n.png")
    (tmp_path / "n.png").rename(tmp_path / odd)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x", "prompt": "y"}))
    run(tmp_path, tmp_path.parent / "mended", "plugs:brightness", prompt="a \ud800 b".encode("utf-8", "replace").decode())
    (row,) = read_scored(tmp_path.parent / "mended")
    assert row.values == {"brightness": mean(0)}
    (tmp_path / "t.jsonl").write_text('{"image": "n.png", "prompt": "a \\ud800 b"}\n{"prompt": "no picture"}\n')
    first, second = open_source(str(tmp_path / "t.jsonl")).rows()
    assert first.prompt == "a ? b"
    with pytest.raises(DataError, match="names no picture"):
        second.open()


def bomb(side: int) -> bytes:
    """A small PNG that claims to be of ``side`` squared."""
    data = encode_png(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


# --- damage ---------------------------------------------------------------------------------------------------------


def test_whatever_single_pictures_do_the_run_goes_on(plugs, tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    red = Image.new("RGB", (40, 30), (200, 30, 40))
    noise = picture(1, 64)
    valid = {
        "cmyk.jpg": red.convert("CMYK"),
        "alpha.png": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
        "deep.png": Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)),
        "palette.gif": red.convert("P"),
        "grey.png": red.convert("L"),
        "one.png": Image.new("RGB", (1, 1), (7, 7, 7)),
    }
    for name, image in valid.items():
        image.save(folder / name)
    noise.save(folder / "animated.gif", save_all=True, append_images=[red.resize((64, 64))])
    Image.new("1", (12000, 9000)).save(folder / "huge.png")
    (folder / "bomb.png").write_bytes(bomb(20_000))
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404</html>")
    data = encode_png(noise)
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "flipped.png").write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:])
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    done = run(folder, tmp_path / "out", "plugs:brightness", prompt=PROMPT, batch_size=3)
    got = {r.image_id: r for r in read_scored(tmp_path / "out")}
    for name in (*valid, "animated.gif", "huge.png"):
        assert got[name].values["brightness"] is not None, got[name].errors
        assert not got[name].errors
    assert got["alpha.png"].values["brightness"] == 255
    assert got["deep.png"].values["brightness"] == 100
    bad = {"zero.png": "empty", "text.jpg": "cannot identify", "cut.png": "cannot read", "bomb.png": "DecompressionBomb"}
    for name, why in bad.items():
        assert got[name].values["brightness"] is None
        assert why in got[name].errors["brightness"], got[name].errors
    assert got["flipped.png"].values["brightness"] is None
    # the last has no content, and so no key: its reason stands in the images table
    assert done.images == len(got) + ("gone.png" not in got)
    assert sum(done.errors.values()) >= 5
    assert summary(list(got.values()))["unreadable"] >= 5


def test_missing_files_and_prompts_are_null_with_a_reason(plugs, tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image,prompt\n000.png,p\nnone.png,p\n000.png,\n,p\n")
    done = run(tmp_path / "t.csv", tmp_path / "out", "plugs:brightness", "compressibility")
    rows = read_scored(tmp_path / "out")
    assert [r.values.get("brightness") is None for r in rows] == [False, True, True, True]
    assert rows[2].values["compressibility"] is not None  # needs no prompt
    assert rows[2].errors == {"brightness": "it has no prompt"}
    assert [r.error for r in rows] == [None, "no such file", None, "the row names no picture"]
    table = read_table(tmp_path / "out", "scores").to_pylist()
    assert all((row["value"] is None) == (row["error"] is not None) for row in table)
    assert done.cells == len(table) == 8


def test_a_scorer_that_fails_on_one_picture_loses_only_that_one(plugs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 7)
    picture(9, 24).save(folder / "003.png")
    run(folder, tmp_path / "out", "plugs:picky", "plugs:brightness")
    rows = {r.image_id: r for r in read_scored(tmp_path / "out")}
    assert [r.values["picky"] for r in rows.values()] == [1, 1, 1, None, 1, 1, 1]
    assert rows["003.png"].errors == {"picky": "RuntimeError: I do not like 24"}
    assert rows["003.png"].values["brightness"] is not None


def test_a_failure_is_no_error_of_the_other_pictures(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        name, card = "two", Card("two", "", "", "", "")

        def __call__(self, batch: ScoreInput) -> ScoreBatch:
            if any(i.size == (24, 24) for i in batch.images):
                raise RuntimeError("24")
            return ScoreBatch({"x": torch.ones(len(batch)), "y": torch.zeros(len(batch))})

    monkeypatch.setattr(plugs, "two", Two(), raising=False)
    folder = folder_of(tmp_path / "in", 5)
    picture(9, 24).save(folder / "003.png")
    run(folder, tmp_path / "out", "plugs:two")
    rows = {r.image_id: r for r in read_scored(tmp_path / "out")}
    bad = rows.pop("003.png")
    assert set(bad.errors.values()) == {"RuntimeError: 24"}
    assert set(bad.values.values()) == {None}
    assert all(not r.errors and r.values == {"two/x": 1, "two/y": 0} for r in rows.values())


def test_failures_of_a_scorer_of_several_values_are_missing_in_each() -> None:
    good = Scored("a", "1", "p", values={"s/x": 1.0, "s/y": 2.0})
    bad = Scored("b", "2", "p", values={"s": None}, errors={"s": "no"})
    said = summary([good, bad])["scorers"]
    assert {name: (s["values"], s["missing"]) for name, s in said.items()} == {"s/x": (1, 1), "s/y": (1, 1)}


def test_the_same_failure_has_the_same_reason(plugs, tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_text(f"no picture {n}")
    assert list(run(tmp_path, tmp_path / "out", "plugs:brightness", prompt="p").errors.values()) == [3]


@given(st.sets(st.integers(0, 12)), st.integers(1, 13))
def test_isolation_by_halves_keeps_the_order(bad: set[int], count: int) -> None:
    def f(images, prompts):
        if any(int(p) in bad for p in prompts):
            raise ValueError("bad")
        return [float(p) for p in prompts]

    batch = ScoreInput([picture(0)] * count, [str(i) for i in range(count)])
    found = isolated(Callback(f), batch)
    assert [e is None for e in found.errors] == [i not in bad for i in range(count)]
    if "f" in found.values:
        got = found.values["f"].tolist()
        assert all(v == i if i not in bad else v != v for i, v in enumerate(got))


# --- the table ------------------------------------------------------------------------------------------------------


def test_one_decode_and_one_picture_object_for_all_scorers(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign import cells

    decoded: list[str] = []
    real = cells.decode
    monkeypatch.setattr(cells, "decode", lambda data, where: decoded.append(where) or real(data, where))
    run(folder_of(tmp_path / "in", 5), tmp_path / "out", "plugs:brightness", "plugs:width", batch_size=2)
    assert sorted(decoded) == [f"{i:03d}.png" for i in range(5)]
    assert plugs.pictures[0] == plugs.pictures[1]  # the same objects: a shared encoder passes once
    assert values(tmp_path / "out", "brightness") == {f"{i:03d}.png": mean(i) for i in range(5)}


def test_the_same_command_again_does_nothing(plugs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 5)
    first = run(folder, tmp_path / "out", "plugs:brightness", shard_size=2)
    assert (first.images, first.cells, first.shards, first.finished) == (5, 5, 3, True)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    again = run(folder, tmp_path / "out", "plugs:brightness", shard_size=2)
    assert (again.images, again.cells, again.finished) == (0, 0, True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert sum(plugs.calls) == 5


def test_a_run_fills_the_missing_cells(plugs, tmp_path: Path) -> None:
    """A new scorer and new pictures: only what is new is scored."""
    folder = folder_of(tmp_path / "in", 4)
    run(folder, tmp_path / "out", "plugs:brightness")
    folder_of(folder, 2, start=4)
    done = run(folder, tmp_path / "out", "plugs:brightness", "plugs:width", shard_size=4)
    assert done.cells == 2 + 6
    assert sum(plugs.calls) == 6
    assert values(tmp_path / "out", "brightness") == {f"{i:03d}.png": mean(i) for i in range(6)}
    assert set(values(tmp_path / "out", "width").values()) == {32}


def test_the_same_picture_twice_is_scored_once(plugs, tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    (tmp_path / "t.csv").write_text("image,prompt\n" + "000.png,p\n001.png,p\n" * 6)
    done = run(tmp_path / "t.csv", tmp_path / "out", "plugs:brightness", batch_size=2, shard_size=5)
    assert (done.images, done.cells) == (12, 2)
    assert list(values(tmp_path / "out", "brightness").values()) == [mean(0), mean(1)] * 6


def test_errors_stay_until_they_are_retried_and_the_latest_attempt_wins(
    plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", 2)
    monkeypatch.setenv("DOWN", "1")
    assert run(folder, tmp_path / "out", "plugs:flaky").errors == {"TimeoutError: no answer": 2}
    monkeypatch.delenv("DOWN")
    assert run(folder, tmp_path / "out", "plugs:flaky").cells == 0
    assert set(values(tmp_path / "out", "flaky").values()) == {None}
    assert run(folder, tmp_path / "out", "plugs:flaky", attempt=2).cells == 2
    rows = read_scored(tmp_path / "out")
    assert [r.values["flaky"] for r in rows] == [2, 2]
    assert not any(r.errors for r in rows)
    assert len(read_table(tmp_path / "out", "scores")) == 4  # append-only
    assert run(folder, tmp_path / "out", "plugs:flaky", attempt=2).cells == 0


def test_another_set_of_pictures_is_refused(plugs, tmp_path: Path) -> None:
    """Their ids might be the same."""
    run(folder_of(tmp_path / "a", 1), tmp_path / "out", "plugs:brightness")
    with pytest.raises(DataError, match="holds the scores of"):
        run(folder_of(tmp_path / "b", 1), tmp_path / "out", "plugs:brightness")


def test_scorers_of_one_encoder_share_its_passes_and_prompts_are_embedded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.scorers.encoders import TransformersCLIP

    where = small_clip(tmp_path / "clip")
    looks: list[int] = []
    reads: list[str] = []
    features, encode = TransformersCLIP.features, TransformersCLIP.encode
    monkeypatch.setattr(TransformersCLIP, "features", lambda self, x: looks.append(len(x)) or features(self, x))
    monkeypatch.setattr(TransformersCLIP, "encode", lambda self, prompts: reads.extend(prompts) or encode(self, prompts))
    folder = folder_of(tmp_path / "in", 6)
    for i in range(6):
        (folder / f"{i:03d}.txt").write_text(["a red circle", "a blue cross"][i % 2])
    run(folder, tmp_path / "out", f"clip:{where}", f"clip100:{where}", batch_size=2, shard_size=3)
    assert sum(looks) == 6
    assert sorted(reads) == ["a blue cross", "a red circle"]
    assert all(r.values["clip100"] == pytest.approx(max(100 * r.values["clip"], 0)) for r in read_scored(tmp_path / "out"))


def test_cut_prompts_are_flagged_in_the_table_and_counted(tmp_path: Path) -> None:
    name = f"clip:{small_clip(tmp_path / 'clip')}"
    folder = folder_of(tmp_path / "in", 3)
    (folder / "001.txt").write_text("red " * 200)
    run(folder, tmp_path / "out", name, "compressibility")
    assert [r.truncated for r in read_scored(tmp_path / "out")] == [set(), {"clip"}, set()]
    text = cli("score", f"path={folder}", f"output_dir={tmp_path / 'out'}", f"scorers=[{name},compressibility]", "gallery=0")
    assert re.search(r"^clip: .*, 1 with cut prompts$", text.output, re.M), text.output
    assert text.output.count("with cut prompts") == 1


def small_clip(where: Path) -> Path:
    from diffalign.shapes import build

    tok = build.tokenizer(where / "made-from")
    build.clip(len(tok), hidden=16, layers=1).save_pretrained(where)
    build.clip_processor(tok).save_pretrained(where)
    return where


def test_later_heads_need_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings stand beside the scores; what is new is looked at, and nothing twice."""
    from diffalign import cells
    from diffalign.scorers.encoders import TransformersCLIP

    clip = small_clip(tmp_path / "clip")
    folder = folder_of(tmp_path / "in", 6)
    run(folder, tmp_path / "out", f"clip:{clip}", batch_size=4, shard_size=3)
    rows = read_table(tmp_path / "out", "embeddings").to_pylist()
    assert len({r["image_sha256"] for r in rows}) == len(rows) == 6
    decoded: list[str] = []
    looks: list[int] = []
    real, features = cells.decode, TransformersCLIP.features
    monkeypatch.setattr(cells, "decode", lambda data, where: decoded.append(where) or real(data, where))
    monkeypatch.setattr(TransformersCLIP, "features", lambda self, x: looks.append(len(x)) or features(self, x))
    run(folder, tmp_path / "out", f"clip100:{clip}", batch_size=4, shard_size=3)
    assert (decoded, looks) == ([], [])
    folder_of(folder, 2, start=6)
    run(folder, tmp_path / "out", f"clipscore:{clip}", f"clip:{clip}", batch_size=4)
    assert sum(looks) == 2  # all are decoded again for the new table of pictures
    whole = tmp_path / "whole"
    run(folder, whole, f"clipscore:{clip}", f"clip:{clip}", embeddings=False)
    assert not (whole / "embeddings").exists()
    for name in ("clipscore", "clip"):
        assert values(tmp_path / "out", name) == pytest.approx(
            values(whole, name), abs=1e-6
        )  # other batches, other kernels: rounding
    got = read_scored(tmp_path / "out")
    assert [r.values["clip100"] for r in got[:6]] == [pytest.approx(max(100 * r.values["clip"], 0)) for r in got[:6]]


def test_other_weights_are_another_version(tmp_path: Path) -> None:
    from diffalign.scoring import identify, make_scorer

    marks = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        where = small_clip(tmp_path / str(seed))
        name = f"clip:{where}"
        found = identify(name, make_scorer(name))
        assert found == identify(name, make_scorer(name))
        marks.add(found.version)
    assert len(marks) == 2


def test_a_dataset_folder_of_ours_is_scored_in_place(plugs, tmp_path: Path) -> None:
    path = Path(as_ours(tmp_path))
    image = {"bytes": encode_png(picture(7)), "path": None}
    from diffalign.data.images import sha256

    rows = [{"image_id": "a", "sha256": sha256(image["bytes"]), "image": image, "prompt": "p", "category": "c", "k": 3}]
    write_shard(path, "images", 0, rows)
    run(path, path, "plugs:brightness")
    (row,) = read_scored(path)
    assert (row.image_id, row.category, row.k, row.values) == ("a", "c", 3, {"brightness": mean(7)})


def test_shards_of_several_processes_make_one_whole(plugs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 7)
    parts = [run(folder, tmp_path / "out", "plugs:brightness", shard_size=2, rank=r, world=3) for r in range(3)]
    assert [p.images for p in parts] == [3, 2, 2]  # shards of 2, 2, 2 and 1
    assert [p.finished for p in parts] == [False, False, True]
    assert values(tmp_path / "out", "brightness") == {f"{i:03d}.png": mean(i) for i in range(7)}


def test_references_are_refused_before_anything_is_scored(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Subject:
        name = "subject"
        card = Card("subject", "", "", "", "", needs=frozenset({"images", "references"}))

    monkeypatch.setattr(plugs, "subject", Subject(), raising=False)
    with pytest.raises(ConfigError, match="subject needs reference pictures"):
        run(folder_of(tmp_path / "in", 1), tmp_path / "out", "plugs:brightness", "plugs:subject")
    assert not plugs.calls


def test_references_are_part_of_the_number(tmp_path: Path) -> None:
    """All pictures are compared with those of a folder; with other references it is another measurement."""
    name = f"clip-i:{small_clip(tmp_path / 'clip')}"
    folder, subject = folder_of(tmp_path / "in", 3), folder_of(tmp_path / "subject", 2, start=50)
    run(folder, tmp_path / "out", name, references=str(subject), batch_size=2)
    expected = make_scorer(name)(ScoreInput([picture(i) for i in range(3)], [""] * 3, [[picture(50), picture(51)]] * 3))
    assert list(values(tmp_path / "out", "clip-i").values()) == pytest.approx(expected.values["clip-i"].tolist(), abs=1e-6)
    assert run(folder, tmp_path / "out", name, references=str(subject)).cells == 0
    assert run(folder, tmp_path / "out", name, references=str(folder_of(subject, 1, start=60))).cells == 3
    assert len({r["version"] for r in read_table(tmp_path / "out", "scores").to_pylist()}) == 2


def test_memory_stays_flat_over_many_rows_of_few_files(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains is a hash for each cell: some hundred bytes a row, where a picture kept would be 12 kB."""
    import gc
    import tracemalloc

    folder_of(tmp_path, 10)
    (tmp_path / "t.csv").write_text("image,prompt\n" + "".join(f"{i % 10:03d}.png,prompt {i}\n" for i in range(1200)))
    held: list[int] = []

    def watch(images, prompts):
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return [0.0] * len(images)

    monkeypatch.setattr(plugs, "brightness", watch)
    gc.freeze()  # what is loaded already need not be looked through each time
    tracemalloc.start()
    try:
        done = run(tmp_path / "t.csv", tmp_path / "out", "plugs:brightness", batch_size=40, shard_size=40)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert done.cells == 1200
    assert (held[-1] - held[5]) / 960 < 1000


def test_one_encoder_on_the_device_at_a_time(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers of one encoder work one after the other, so that it moves once a batch."""
    moves: list[str] = []

    class Heavy:
        here = True

        def __init__(self, name: str) -> None:
            self.name = name

        def move(self, away: bool) -> None:
            if self.here == away:
                self.here = not away
                moves.append(f"{self.name} {'out' if away else 'in'}")

    class Head:
        def __init__(self, name: str, encoder: Heavy) -> None:
            self.name, self.encoder = name, encoder
            self.card = Card(name, "", "", "", "")

        def __call__(self, batch: ScoreInput) -> ScoreBatch:
            assert self.encoder.here
            return ScoreBatch({self.name: torch.ones(len(batch))})

    a, b = Heavy("A"), Heavy("B")
    for name, encoder in (("a1", a), ("b1", b), ("a2", a)):
        monkeypatch.setattr(plugs, name, Head(name, encoder), raising=False)
    names = ["plugs:a1", "plugs:b1", "plugs:a2"]
    run(folder_of(tmp_path / "in", 4), tmp_path / "out", *names, batch_size=2, offload=True)
    assert moves == ["A out", "B out", "A in", "A out", "B in", "B out", "A in", "A out", "B in"]
    assert read_scored(tmp_path / "out")[0].values == {"a1": 1, "a2": 1, "b1": 1}


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_and_blanks_are_reported(plugs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 4)
    smooth = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 6, 3), np.uint8)).resize(
        (96, 96), Image.Resampling.BICUBIC
    )
    smooth.save(folder / "a.png")
    smooth.resize((64, 64)).save(folder / "b.jpg", quality=90)
    (folder / "c.png").write_bytes((folder / "000.png").read_bytes())
    Image.new("RGB", (16, 16), (3, 3, 3)).save(folder / "d.png")
    run(folder, tmp_path / "out", "compressibility")
    said = summary(read_scored(tmp_path / "out"))
    assert said["duplicates"] == [["000.png", "c.png"]]
    assert said["near_duplicates"] == [["a.png", "b.jpg"]]
    assert said["blank"] == ["d.png"]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8), st.sets(st.integers(0, 63), max_size=3))
def test_no_near_copy_is_missed(numbers: list[int], bits: set[int]) -> None:
    other = numbers[0]
    for b in bits:
        other ^= 1 << b
    hashes = {str(i): f"{n:016x}" for i, n in enumerate(numbers)} | {"copy": f"{other:016x}"}
    assert any({"0", "copy"} <= set(g) for g in near(hashes))


def test_a_fingerprint_is_the_sign_of_neighbours() -> None:
    ramp = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))).convert("RGB")
    assert fingerprint(ramp) == "0" * 16
    assert fingerprint(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == "f" * 16


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_command_reports_and_exports(kind: str, plugs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 3)
    (folder / "002.png").write_bytes(b"")
    args = [f"path={folder}", "scorers=[plugs:brightness,shapes]", f"prompt={PROMPT}", f"output_dir={tmp_path / 'out'}"]
    for i in range(3):
        (folder / f"{i:03d}.txt").write_text(PROMPT)
    result = cli("score", *args, f"export={kind}", "gallery=0")
    assert result.exit_code == 0, result.output
    assert "brightness: mean" in result.output
    assert "1 of 3 pictures could not be read" in result.output
    assert "1 x the file is empty" in result.output
    path = tmp_path / "out" / f"scores.{kind}"
    if kind == "csv":
        rows = list(csv.DictReader(path.open()))
        assert float(rows[1]["brightness"]) == mean(1)
        assert rows[2]["brightness"] == ""
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[1]["brightness"] == mean(1)
        assert rows[2]["brightness"] is None
    assert rows[2]["error"] == "the file is empty"
    said = json.loads(cli("score", *args, "gallery=0", "--json").stdout)
    assert (said["cells"], said["images"], said["unreadable"]) == (0, 3, 1)


def test_the_command_fails_clearly(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "in", 2)
    base = ["score", f"path={folder}", f"output_dir={tmp_path / 'out'}", "gallery=0"]
    for extra, said in {
        "--shard=2/2": "i below n",
        "--shard=x": "expected i/n",
        "path=./none": "no such file",
        "scorer=[a]": "did you mean",
    }.items():
        result = cli(*base, "scorers=[plugs:brightness]", extra)
        assert result.exit_code == 2, result.output
        assert said in result.output
    monkeypatch.setenv("DOWN", "1")
    result = cli(*base, "scorers=[plugs:flaky]")
    assert result.exit_code == 1
    assert "no cell got a value" in result.output
    assert "TimeoutError: no answer" in result.output


def test_every_rank_of_a_launch_takes_its_own_shards(plugs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "in", 5)
    args = [f"path={folder}", "scorers=[plugs:brightness]", f"output_dir={tmp_path / 'out'}", "shard_size=1", "gallery=0"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("1", 2), ("0", 3)):
        monkeypatch.setenv("RANK", rank)
        assert json.loads(cli("score", *args, "--json").stdout)["scored"] == count
    assert len(values(tmp_path / "out", "brightness")) == 5


@pytest.mark.slow
def test_ranks_of_a_real_launch_share_nothing_but_the_folder(tmp_path: Path) -> None:
    """Two processes of ``accelerate launch``: each picture is scored by one of them, without a process group."""
    (tmp_path / "plugs.py").write_text(RANKED)
    folder, out = folder_of(tmp_path / "in", 7), tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", "-m", "diffalign", "score"]
    args = [f"path={folder}", "scorers=[plugs:rank]", f"output_dir={out}", "shard_size=2", "gallery=2"]
    done = subprocess.run([*launcher, *args], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(values(out, "rank").values()) == [0, 0, 1, 1, 0, 0, 1]
    assert len(read_table(out, "scores")) == 7
    assert (out / "gallery.html").exists()


# --- the gallery ----------------------------------------------------------------------------------------------------


def test_the_gallery_stands_alone_and_holds_both_ends(plugs, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (300 + i, 200), (20 * i, 20 * i, 20 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"<b>{i}</b>")
    result = cli(
        "score", f"path={folder}", "scorers=[plugs:brightness,plugs:width]", f"output_dir={tmp_path / 'o'}", "gallery=4"
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "o" / "gallery.html").read_text()
    shown = re.findall(r"<small>(\d)\.png</small>", page)
    assert shown == ["8", "7", "1", "0"]
    assert page.count("data:image/jpeg;base64,") == 4
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    assert "<b>8</b>" not in page
    assert "&lt;b&gt;8&lt;/b&gt;" in page
    assert page.count(">1.00<") == 4  # both scorers rise together


def test_spearman_is_the_correlation_of_ranks() -> None:
    a, b = np.array([1.0, 5, 2, np.nan, 9]), np.array([10.0, 40, 40, 1, 30])
    ranks = np.array([1.0, 3, 2, 4]), np.array([1.0, 3.5, 3.5, 2])
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(a, np.ones(5)) is None


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_gallery_sorts_in_a_browser_without_a_network(plugs, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (300 - i, 200), (50 * i, 50 * i, 50 * i)).save(folder / f"{i}.png")
    (folder / "x.png").write_bytes(b"")
    run(folder, tmp_path / "o", "plugs:brightness", "plugs:width", prompt="p")
    page_file = write_gallery(read_scored(tmp_path / "o"), open_source(str(folder)), tmp_path / "o" / "gallery.html", 10)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())

        def order() -> list[str]:
            return page.locator("figure small").all_inner_texts()

        assert order() == ["3.png", "2.png", "1.png", "0.png", "x.png"]
        page.select_option("#by", "width")
        assert order() == ["0.png", "1.png", "2.png", "3.png", "x.png"]
        page.select_option("#way", "1")
        assert order() == ["3.png", "2.png", "1.png", "0.png", "x.png"]
        page.screenshot(path=str(tmp_path / "gallery.png"), full_page=True)
        assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
        browser.close()


# --- compare --------------------------------------------------------------------------------------------------------


def scored_folder(folder: Path, rows: list[tuple[str, str | None, int | None, float | None]]) -> Path:
    """Rows of prompt, category, k and value."""
    images, scores = [], []
    for n, (prompt, category, k, value) in enumerate(rows):
        digest = f"{folder.name}{n}"
        said = {"prompt": prompt, "category": category, "k": k, "image": {"bytes": None, "path": None}}
        images.append({"image_id": digest, "sha256": digest, **said})
        key = {"scorer": "s", "version": "1", "preprocess_version": "1", "prompt_sha256": prompt_key(prompt)}
        scores.append({**key, "image_sha256": digest, "value": value, "error": None if value is not None else "no"})
    write_shard(folder, "images", 0, images)
    write_shard(folder, "scores", 0, scores)
    return folder


def test_compare_pairs_by_prompt_and_counts_each_prompt_once(tmp_path: Path) -> None:
    a = scored_folder(tmp_path / "a", [("x", "one", 0, 1.0), ("x", "one", 1, 1.0), ("y", "two", 0, 1.0), ("z", None, 0, 5.0)])
    b = scored_folder(
        tmp_path / "b",
        [("x", "one", 1, 1.0), ("x", "one", 0, 3.0), ("y", "two", 0, 0.0), ("y", "two", 1, 9.0), ("w", None, 0, 1)],
    )
    said = json.loads(cli("compare", str(a), str(b), "--json").stdout)
    s = said["scorers"]["s"]
    assert (said["pairs"], said["unpaired"], s["prompts"], s["ties"], s["missing"]) == (3, 3, 2, 1, 0)
    assert s["win_rate"]["value"] == pytest.approx((0.75 + 0) / 2)
    assert s["difference"]["value"] == pytest.approx((1.0 - 1.0) / 2)
    assert s["win_rate"]["low"] == 0
    assert s["win_rate"]["high"] == 0.75
    assert s["categories"]["one"]["win_rate"]["value"] == 0.75
    assert s["categories"]["two"]["difference"]["value"] == -1
    assert (s["best"][0]["a"], s["best"][0]["b"]) == ("a0", "b1")
    assert s["worst"][0]["prompt"] == "y"
    text = cli("compare", str(a), str(b)).output
    assert "win rate 0.375 [0.000, 0.750]" in text
    assert "3 pictures without partner" in text


def test_embeddings_tell_the_sets_apart(tmp_path: Path) -> None:
    """Distances and diversity come from what was stored, without a picture."""
    clip = small_clip(tmp_path / "clip")
    for name, start in (("a", 0), ("b", 50)):
        run(folder_of(tmp_path / name, 6, start), tmp_path / f"{name}s", f"clip:{clip}", prompt="p", limit=6)
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"{name}-gone")
    rows = read_scored(tmp_path / "as")
    (same,) = distances(tmp_path / "as", tmp_path / "as", rows, rows).values()
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert (same["n"], same["precision"], same["recall"]) == ([6, 6], 1, 1)
    (other,) = distances(tmp_path / "as", tmp_path / "bs", rows, read_scored(tmp_path / "bs")).values()
    assert other["frechet"] > 1e-6
    assert other["cmmd"] > 0
    (said,) = diversity(tmp_path / "as", rows).values()
    assert 1 < said["vendi"] <= 6
    assert said["within_prompt"] is None  # each has a prompt of its own
    vectors = np.stack([r["vector"] for r in read_table(tmp_path / "as", "embeddings").to_pylist()])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(6) for j in range(i)]
    assert said["dissimilarity"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def test_swapping_sides_flips_the_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        scored_folder(tmp_path / n, [(f"p{i // 2}", None, i % 2, float(x)) for i, x in enumerate(rng.integers(0, 4, 40))])
        for n in "ab"
    )
    one, other = compare(a, b)["scorers"]["s"], compare(b, a)["scorers"]["s"]
    assert one["win_rate"]["value"] + other["win_rate"]["value"] == pytest.approx(1)
    assert one["difference"]["value"] == pytest.approx(-other["difference"]["value"])
    assert one["ties"] == other["ties"] > 0
    assert compare(a, a)["scorers"]["s"]["win_rate"] == pytest.approx({"value": 0.5, "se": 0.0, "low": 0.5, "high": 0.5})


def test_a_missing_value_is_left_out_not_lost(tmp_path: Path) -> None:
    a = scored_folder(tmp_path / "a", [("x", None, None, 1.0), ("y", None, None, 1.0)])
    b = scored_folder(tmp_path / "b", [("x", None, None, 2.0), ("y", None, None, None)])
    s = compare(a, b)["scorers"]["s"]
    assert (s["win_rate"]["value"], s["pairs"], s["missing"]) == (1, 1, 1)
    assert ([e["prompt"] for e in s["best"]], s["worst"]) == (["x"], [])  # B loses nowhere


def test_compare_refuses_what_does_not_match(tmp_path: Path) -> None:
    a = scored_folder(tmp_path / "a", [("x", None, 0, 1.0)])
    for rows, said in (([("y", None, 0, 1.0)], "share no prompt"), ([("x", None, 0, None)], "share no scorer")):
        b = scored_folder(tmp_path / said.replace(" ", ""), rows)
        result = cli("compare", str(a), str(b))
        assert result.exit_code == 2
        assert said in result.output
    assert "no table" in cli("compare", str(a), str(tmp_path)).output


# --- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmarks_run_in_small(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args = ["throughput", "memory", "--images=2", "--batch=2", "--turns=1", "--rows=96", "--files=3"]
    command = [sys.executable, str(ROOT / "benchmarks" / "scoring.py"), *args, f"--results={tmp_path / 'r.json'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["memory"]["rows"] == 96
    assert 0 < said["throughput"]["cpu"]["over_bare"][0] < 2
    assert "96 rows of 3 files" in done.stdout


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_lose_no_finished_shard_and_repeat_nothing(tmp_path: Path, processes: int) -> None:
    folder = folder_of(tmp_path / "in", 60)
    (tmp_path / "plugs.py").write_text(PLUGS)
    log, out = tmp_path / "log", tmp_path / "out"
    log.touch()
    words = ["score", f"path={folder}", "scorers=[plugs:slow]", "shard_size=4", "batch_size=2", "gallery=0"]

    def start(output: Path, processes: int) -> subprocess.Popen[bytes]:
        path = f"{ROOT}{os.pathsep}{tmp_path}"
        return launch([*words, f"output_dir={output}"], processes, SCORE_LOG=str(log), PYTHONPATH=path)

    rng = random.Random(0)
    by_value = {float(np.asarray(picture(i), np.float64).sum()): i for i in range(60)}
    kept: dict[Path, bytes] = {}
    for _ in range(5):
        before = len(log.read_text().splitlines())
        process = start(out, processes)
        wanted = before + rng.randint(0, 12)
        while process.poll() is None and len(log.read_text().splitlines()) <= wanted:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        again = {by_value[float(v)] // 4 for v in log.read_text().splitlines()[before:]}
        finished = {int(p.stem.rpartition("-")[2]) for p in kept if p.parent.name == "scores"}
        assert not again & finished
        assert all(p.read_bytes() == data for p, data in kept.items())
        kept = {p: p.read_bytes() for p in out.rglob("*.parquet") if not p.name.startswith(".")}
    assert kept
    assert start(out, processes).wait(timeout=240) == 0
    assert all(p.read_bytes() == data for p, data in kept.items())
    got = {r.image_id: r.values["slow"] for r in read_scored(out)}
    assert got == {f"{i:03d}.png": pytest.approx(v, rel=1e-6) for v, i in by_value.items()}
    assert len(read_table(out, "scores")) == 60  # each cell once
    assert start(tmp_path / "whole", 1).wait(timeout=240) == 0
    whole, killed = ({f.name: f.read_bytes() for f in (d / "scores").glob("*.parquet")} for d in (tmp_path / "whole", out))
    assert killed == whole


def test_read_scored_keeps_versions_apart(tmp_path: Path) -> None:
    image = {"image_id": "a", "sha256": "s", "prompt": None, "image": {"bytes": None, "path": "x.png"}}
    write_shard(tmp_path, "images", 0, [image])
    cell = {"image_sha256": "s", "prompt_sha256": None, "scorer": "clip", "preprocess_version": "1"}
    write_shard(tmp_path, "scores", 0, [{**cell, "version": v, "value": x} for v, x in (("1", 0.1), ("2", 0.2), ("1", 0.3))])
    (row,) = read_scored(tmp_path)
    assert row == Scored("a", "s", None, path="x.png", values={"clip@1,1": 0.3, "clip@2,1": 0.2})
