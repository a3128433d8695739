"""Readers, writers and the cache, with the damage that real data brings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from diffalign.data import images
from diffalign.data.cache import TensorCache
from diffalign.data.files import atomic, atomic_folder, write_json, write_text
from diffalign.data.pairs import apart, read_pairs, shuffled_labels, split_by_prompt
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.data.tables import read_table, run_shards, schemas, write_shard
from diffalign.errors import DataError, DiffalignError
from tests.conftest import picture


def save(tmp_path: Path, image: Image.Image, name: str, **kwargs: object) -> Path:
    image.save(tmp_path / name, **kwargs)
    return tmp_path / name


# --- images ---------------------------------------------------------------------------------------------------------


def test_colour_modes_come_out_as_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    cmyk = images.decode(save(tmp_path, red.convert("CMYK"), "c.jpg", quality=100), "c")
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(red)).max() < 12
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert images.decode(save(tmp_path, half, "a.png"), "a").getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert images.decode(save(tmp_path, deep, "d.png"), "d").getpixel((3, 3)) == (100, 100, 100)
    palette = red.convert("P")
    assert images.decode(save(tmp_path, palette, "p.png"), "p").mode == "RGB"


def test_bad_images_are_named(tmp_path: Path) -> None:
    whole = save(tmp_path, picture(0, 64), "w.png").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"no image"), ("empty", b"")):
        with pytest.raises(DataError, match=f"{name}: cannot read the image"):
            images.decode(data, name)
    with pytest.raises(DataError, match="no such file"):
        images.decode(tmp_path / "none.png", "here")


def test_png_round_trip_is_exact() -> None:
    image = picture(3)
    assert np.array_equal(np.asarray(images.decode(images.encode_png(image), "x")), np.asarray(image))


def test_to_tensor_covers_and_cuts_at_the_centre() -> None:
    wide = Image.new("RGB", (64, 32), (0, 0, 0))
    wide.paste((255, 255, 255), (16, 0, 48, 32))
    x = images.to_tensor(wide, (32, 32))
    assert x.shape == (3, 32, 32)
    assert x.mean() > 0.95


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\none\n")
    (tmp_path / "p.csv").write_text('prompt,negative_prompt\none,ugly\n"a, b",\n')
    (tmp_path / "p.jsonl").write_text('{"caption": "ein"}\n{"caption": "日本 🙂"}\n')
    pq.write_table(pa.table({"text": ["x", "y"], "other": [1, 2]}), tmp_path / "p.parquet")
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    assert read_prompts(tmp_path / "p.csv") == [Prompt("one", "ugly"), Prompt("a, b")]
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["ein", "日本 🙂"]
    assert [p.text for p in read_prompts(tmp_path / "p.parquet", limit=1)] == ["x"]


def test_the_id_is_of_the_content() -> None:
    assert Prompt("a").id == Prompt("a").id != Prompt("a", "b").id


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("p.csv", "title\nx\n", "no column 'prompt'; found title"),
        ("p.jsonl", '{"prompt": "a"}\n{bad\n', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": ""}\n', "row 1: the prompt is empty"),
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.parquet", "junk", "not a readable Parquet"),
        ("p.doc", "x", "not a prompt file"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=part):
        read_prompts(tmp_path / name)


def test_a_missing_prompt_file_or_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="nobody/nothing: neither a file nor a dataset"):
        read_prompts("nobody/nothing")


# --- pairs ----------------------------------------------------------------------------------------------------------


def dataset(folder: Path, pairs: list[dict[str, object]]) -> Path:
    rows = [
        {"image_id": str(i), "image": {"bytes": images.encode_png(picture(i)), "path": None}, "prompt": "p"} for i in range(4)
    ]
    write_shard(folder, "images", 0, rows)
    write_shard(folder, "pairs", 0, pairs)
    return folder


def row(**changes: object) -> dict[str, object]:
    return {"pair_id": "x", "prompt": "p", "chosen_id": "0", "rejected_id": "1", "p_win": 1.0, **changes}


def test_own_dataset_round_trip(tmp_path: Path) -> None:
    pairs = read_pairs(dataset(tmp_path, [row(), row(p_win=0.5), row(chosen_id="2", p_win=None)]))
    assert [p.chosen.where.rsplit(" ", 1)[1] for p in pairs] == ["0", "2"]  # the tie is left out
    assert np.array_equal(np.asarray(pairs[0].rejected.load()), np.asarray(picture(1)))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"chosen_id": None}, "pair x: it has no chosen_id"),
        ({"rejected_id": "77"}, "'77' is not in images/"),
        ({"p_win": 0.2}, "p_win must lie between"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, changes: dict[str, object], part: str) -> None:
    with pytest.raises(DataError, match=part):
        read_pairs(dataset(tmp_path, [row(), row(**changes)]))


def test_missing_columns_and_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = dataset(tmp_path, [row()])
    pq.write_table(pa.table({"prompt": ["p"]}), folder / "pairs" / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.parquet"):
        read_pairs(folder)
    (folder / "pairs" / "00000.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"00000\.parquet: not a readable Parquet shard"):
        read_pairs(folder)


def test_tables_with_trl_columns(tmp_path: Path, pairs_csv: Path) -> None:
    assert len(read_pairs(pairs_csv)) == 40
    png = [images.encode_png(picture(i)) for i in (0, 1)]
    as_struct = pa.array([{"bytes": png[0], "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"prompt": ["p"], "chosen": as_struct, "rejected": pa.array([png[1]])}), tmp_path / "t.parquet")
    (pair,) = read_pairs(tmp_path / "t.parquet")
    assert np.array_equal(np.asarray(pair.chosen.load()), np.asarray(picture(0)))
    assert np.array_equal(np.asarray(pair.rejected.load()), np.asarray(picture(1)))


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen\np,a.png\n")
    with pytest.raises(DataError, match="row 1: no column 'rejected'; found prompt, chosen"):
        read_pairs(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected\np,,b.png\n")
    with pytest.raises(DataError, match="row 1: chosen is empty"):
        read_pairs(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected\np,../../etc/x.png,b.png\n")
    with pytest.raises(DataError, match="leads out of the dataset"):
        read_pairs(tmp_path / "c.csv")
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "none.csv")


def test_held_out_prompts_never_train(pairs_csv: Path) -> None:
    training, held = split_by_prompt(read_pairs(pairs_csv), 0.3)
    assert held
    assert not {p.prompt for p in training} & {p.prompt for p in held}
    assert len(training) + len(held) == 40


def test_evaluation_prompts_are_refused_or_left_out(pairs_csv: Path) -> None:
    pairs = read_pairs(pairs_csv)
    asked = [pairs[3].prompt.upper().replace(" ", "  ") + ".", "something else"]
    with pytest.raises(DataError, match=r"1 of 40 training pairs have a prompt .*=drop"):
        apart(pairs, asked, "refuse")
    assert apart(pairs, asked, "drop") == [p for i, p in enumerate(pairs) if i != 3]
    assert apart(pairs, asked, "keep") == pairs == apart(pairs, ["something else"], "refuse")
    with pytest.raises(DataError, match="40 of 40"):
        apart(pairs, [p.prompt for p in pairs], "drop")


def test_shuffled_labels_flip_about_half_and_are_fixed(pairs_csv: Path) -> None:
    pairs = read_pairs(pairs_csv)
    shuffled = shuffled_labels(pairs, 1)
    flips = sum(a.chosen == b.rejected for a, b in zip(pairs, shuffled, strict=True))
    assert 8 <= flips <= 32
    assert shuffled == shuffled_labels(pairs, 1) != shuffled_labels(pairs, 2)


# --- tables, shards, cache, files -------------------------------------------------------------------------------------


def test_datasets_loads_the_tables_with_images(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = dataset(tmp_path / "d", [row()])
    table = load_dataset(
        "parquet", data_files=str(folder / "images" / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert np.array_equal(np.asarray(table[2]["image"]), np.asarray(picture(2)))
    assert set(table.column_names) == set(schemas()["images"].names)


def test_shards_resume_where_they_stopped_and_keep_their_plan(tmp_path: Path) -> None:
    made: list[int] = []

    def make(n: int) -> list[dict[str, object]]:
        made.append(n)
        if n == 2 and len(made) == 3:
            raise KeyboardInterrupt
        return [{"pair_id": str(n)}]

    with pytest.raises(KeyboardInterrupt):
        run_shards(tmp_path, "pairs", {"seed": 1}, 4, make)
    assert not list(tmp_path.rglob("*.tmp"))
    assert run_shards(tmp_path, "pairs", {"seed": 1}, 4, make) == 2
    assert made == [0, 1, 2, 2, 3]
    assert read_table(tmp_path, "pairs", ["pair_id"])["pair_id"].to_pylist() == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"another plan \(differs in seed\)"):
        run_shards(tmp_path, "pairs", {"seed": 2}, 4, make)


def test_the_cache_computes_once_and_heals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[list[int]] = []

    def make(rows: list[int]) -> dict[str, torch.Tensor]:
        calls.append(rows)
        return {"x": torch.tensor([[float(r)] for r in rows])}

    TensorCache(tmp_path).fill(["a", "b", "a"], make)
    again = TensorCache(tmp_path)
    again.fill(["a", "b"], make)
    assert again.made == 0
    assert len(calls) == 1
    assert again["b"]["x"].item() == 1.0
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    healed = TensorCache(tmp_path)
    assert "damaged cache shard" in caplog.text
    healed.fill(["a", "b"], make)
    assert healed.made == 2
    assert healed["a"]["x"].item() == 0.0


def test_the_cache_is_not_held_in_memory(tmp_path: Path) -> None:
    """64 MiB of entries, made and read again by one process: what it holds of its own is less than a shard's 16."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc: the memory of a process cannot be split into its own and that of files")
    code = f"""
import ctypes, re
from pathlib import Path
import safetensors.torch, torch
from diffalign.data.cache import TensorCache

def own():
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

cache, keys = TensorCache(Path({str(tmp_path)!r})), [str(n) for n in range(1024)]
make = lambda rows: {{"x": torch.rand(len(rows), 1 << 14)}}
make([0])
before = own()
cache.fill(keys, make)
mean = sum(cache[key]["x"].mean().item() for key in keys) / len(keys)
print(own() - before, mean)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, mean = map(float, done.stdout.split())
    assert grown < 16
    assert mean == pytest.approx(0.5, abs=0.01)


def test_a_bar_shows_what_is_encoded_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(len(rows), 1)}

    TensorCache(tmp_path).fill(["a"], make)
    assert capsys.readouterr().err == ""
    TensorCache(tmp_path).fill(["a", "b", "c", "b"], make, unit="picture")
    assert "2/2" in capsys.readouterr().err
    TensorCache(tmp_path).fill(["a", "b"], make, unit="picture")
    assert capsys.readouterr().err == ""


def test_json_writes_are_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_read_only_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiffalignError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.write_text("begun")
        with Path("/dev/full").open("w") as f:
            f.write("x" * 100)

    with pytest.raises(DiffalignError, match=r"cannot write .*No space left"):
        atomic(tmp_path / "x", fill)
    assert not list(tmp_path.iterdir())


def full_in_safetensors(path: Path) -> None:
    path.write_text("begun")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # its own words


def test_a_disk_that_is_full_for_safetensors_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"cannot write .*No space left"):
        atomic(tmp_path / "x", full_in_safetensors)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(to: Path, text: str) -> None:
        (to / "unet").mkdir()
        (to / "unet" / text).write_text(text)
        (to / "index").write_text(text)

    def fail(to: Path) -> None:
        fill(to, "new")
        full_in_safetensors(to / "weights")

    atomic_folder(tmp_path, lambda to: fill(to, "old"))
    (tmp_path / "beside").write_text("not part of it")
    with pytest.raises(DiffalignError, match=r"cannot write .*No space left"):
        atomic_folder(tmp_path, fail)
    assert (tmp_path / "index").read_text() == "old"
    assert [p.name for p in (tmp_path / "unet").iterdir()] == ["old"]
    atomic_folder(tmp_path, lambda to: fill(to, "new"))
    assert [p.name for p in (tmp_path / "unet").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "index", "unet"]
