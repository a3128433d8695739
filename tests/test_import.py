"""Every published layout, in a small file of its exact form with its known defects."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from diffalign.cli import main
from diffalign.data.formats import LAYOUTS
from diffalign.data.pairs import read_pairs
from diffalign.data.records import json_rows
from diffalign.data.tables import read_table
from diffalign.errors import ConfigError, DataError
from diffalign.importing import ImportConfig, Imported, import_pairs
from diffalign.spec import validate
from tests.conftest import picture


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 16).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def struct(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def run(path: Path, layout: str, out: Path, **more: Any) -> Imported:
    return import_pairs(validate(ImportConfig, {"path": str(path), "format": layout, "output_dir": str(out), **more}))


def pairs(out: Path) -> list[tuple[str, str, str, float]]:
    rows = read_table(out, "pairs", ["prompt", "chosen_id", "rejected_id", "p_win"]).to_pylist()
    return [(r["prompt"], r["chosen_id"], r["rejected_id"], round(r["p_win"], 6)) for r in rows]


def one(out: Path, table: str = "pairs") -> dict[str, Any]:
    (row,) = read_table(out, table).to_pylist()
    return row


# --- Pick-a-Pic -----------------------------------------------------------------------------------------------------

PICKAPIC = pa.schema([
    ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
    ("created_at", pa.timestamp("ns")), ("has_label", pa.bool_()),
    *((f"image_{i}_{k}", pa.string()) for i in (0, 1) for k in ("uid", "url")),
    ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
    ("model_0", pa.string()), ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
    ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64()),
])  # fmt: skip


def pick(n: int, label: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "are_different": True, "caption": f" caption {n} ", "has_label": label is not None, "image_0_uid": f"a{n}",
        "image_1_uid": f"b{n}", "image_0_url": "https://dead.example/0.jpg", "jpg_0": jpeg(2 * n), "jpg_1": jpeg(2 * n + 1),
        "label_0": label, "label_1": None if label is None else 1 - label, "model_0": "sdxl", "model_1": "dreamlike",
        "user_id": 7, "ranking_id": n, "best_image_uid": None if label is None else {1: f"a{n}", 0: f"b{n}"}.get(label, "tie"),
    }  # fmt: skip
    return {**row, **more}


@pytest.fixture
def pickapic(tmp_path: Path) -> Path:
    rows = [
        pick(0, 1.0), pick(1, 0.0), pick(2, 0.5), pick(3, None), pick(4, 1.0, jpg_1=jpeg(9)[:300]), pick(5, 0.0, jpg_0=None),
        pick(6, 1.0, image_1_uid="a6"), pick(7, 1.0, label_1=1.0), pick(8, 1.0, has_label=False), pick(9, 1.0, caption=None),
        pick(10, 0.0, image_0_uid="a0", jpg_0=jpeg(0)),
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    name = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PICKAPIC), name, row_group_size=4)
    return tmp_path / "data"


def test_pickapic_with_ties_missing_labels_and_corrupt_bytes(pickapic: Path, tmp_path: Path) -> None:
    done = run(pickapic, "pickapic", tmp_path / "out")
    assert pairs(tmp_path / "out") == [
        ("caption 0", "a0", "b0", 1.0), ("caption 1", "b1", "a1", 1.0), ("caption 2", "a2", "b2", 0.5),
        ("caption 10", "b10", "a0", 1.0),
    ]  # fmt: skip
    assert done.dropped == {
        "no label": 2, "a picture is damaged": 1, "a picture is missing": 1, "the same picture twice": 1,
        "labels do not sum to 1": 1, "no prompt": 1,
    }  # fmt: skip
    assert (done.rows, done.pairs, done.ties, done.agrees, done.disagrees) == (11, 4, 1, 3, 0)
    images = read_table(tmp_path / "out", "images").to_pylist()
    assert {r["image_id"]: r["image"]["bytes"] for r in images}["b1"] == jpeg(3)  # the bytes are not encoded again
    assert {r["model"] for r in images} == {"sdxl", "dreamlike"}
    assert {r["user"] for r in read_table(tmp_path / "out", "pairs").to_pylist()} == {"7"}
    assert len(read_pairs(tmp_path / "out")) == 3
    run(pickapic, "pickapic", tmp_path / "untied", ties="drop")
    assert len(pairs(tmp_path / "untied")) == 3


def test_shards_and_processes_leave_the_same_bytes(pickapic: Path, tmp_path: Path) -> None:
    def settings(out: str) -> ImportConfig:
        return ImportConfig(path=str(pickapic), format="pickapic", output_dir=str(tmp_path / out), shard_size=2)

    import_pairs(settings("one"))
    assert not import_pairs(settings("two"), 1, 2).finished
    assert import_pairs(settings("two"), 0, 2).finished
    assert import_pairs(settings("two")).made == 0
    files = [sorted((tmp_path / f).rglob("*.*")) for f in ("one", "two")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert len(list((tmp_path / "one" / "pairs").iterdir())) == 2 + 2 + 2
    with pytest.raises(DataError, match=r"another plan \(differs in ties\)"):
        run(pickapic, "pickapic", tmp_path / "one", shard_size=2, ties="drop")


def test_without_pictures_no_picture_column_is_read(pickapic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = pq.ParquetFile.read_row_group, list[str]()

    def noted(self: Any, group: int, columns: list[str] | None = None) -> Any:
        seen.extend(columns or ["all"])
        return read(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    done = run(pickapic, "pickapic", tmp_path / "out", pictures=False)
    assert done.pairs == 6  # those with bad pictures as well
    assert seen
    assert not {"jpg_0", "jpg_1", "image_0_url", "all"} & set(seen)


def test_contradicted_labels_are_refused(tmp_path: Path) -> None:
    rows = [pick(n, 1.0, best_image_uid=f"b{n}") for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, schema=PICKAPIC), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="another column disagrees with 3 of 3 labels"):
        run(tmp_path / "x.parquet", "pickapic", tmp_path / "out")


def test_mapo_sets_have_no_ids_and_double_captions_two_prompts(tmp_path: Path) -> None:
    row = {"jpg_0": jpeg(0), "jpg_1": jpeg(1), "label_0": 0, "label_1": 1, "caption": "a cat"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "mapo.parquet")
    run(tmp_path / "mapo.parquet", "pickapic", tmp_path / "mapo")
    assert one(tmp_path / "mapo")["prompt"] == "a cat"
    chosen = read_pairs(tmp_path / "mapo")[0].chosen
    assert chosen.data == jpeg(1)
    double = {**row, "caption_0": "a grey cat asleep", "caption_1": "a black cat"}
    pq.write_table(pa.Table.from_pylist([double]), tmp_path / "dcpo.parquet")
    run(tmp_path / "dcpo.parquet", "pickapic", tmp_path / "dcpo")
    found = one(tmp_path / "dcpo")
    assert (found["prompt"], found["rejected_prompt"]) == ("a black cat", "a grey cat asleep")


# --- HPD ------------------------------------------------------------------------------------------------------------


def pictures(folder: Path, *names: str) -> None:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(n))


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_hpd_v1_has_the_position_of_the_winner(tmp_path: Path) -> None:
    pictures(tmp_path / "d", "images/0.jpg", "images/1.jpg", "images/2.jpg")
    row = {"prompt": "p", "id": 1, "user_hash": "u", "contain_name": False, "file_path": [f"images/{i}.jpg" for i in range(3)]}
    rows = [{**row, "human_preference": 2}, {**row, "human_preference": 3}, {**row, "human_preference": None}]
    write(tmp_path / "d" / "preference_train.json", rows)
    done = run(tmp_path / "d", "hpdv1", tmp_path / "out")
    assert pairs(tmp_path / "out") == [("p", "images/2.jpg", f"images/{i}.jpg", 1.0) for i in (0, 1)]
    assert done.dropped == {"no label": 2}
    assert {r["licence"] for r in read_table(tmp_path / "out", "images").to_pylist()} == {"cc-by-4.0"}


def test_hpd_v2_training_and_test_files(tmp_path: Path) -> None:
    pictures(tmp_path / "d", *(f"{i}.jpg" for i in range(4)))
    files = [f"{i}.jpg" for i in range(4)]
    train = [
        {"prompt": "p", "file_path": files[:2], "human_preference": [0, 1]},
        {"prompt": "q", "file_path": files[2:], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": files[:2], "human_preference": [0, 0]},
        {"prompt": "q", "file_path": ["0.jpg", "gone.jpg"], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": ["0.jpg", "../x.jpg"], "human_preference": [1, 0]},
    ]
    write(tmp_path / "d" / "train.json", train)
    done = run(tmp_path / "d", "hpdv2", tmp_path / "out")
    assert pairs(tmp_path / "out") == [("p", "1.jpg", "0.jpg", 1.0), ("q", "2.jpg", "3.jpg", 1.0)]
    assert done.dropped == {
        "no label": 1, "a picture is missing": 1, "a picture lies outside of image_root, or is a URL": 1,
    }  # fmt: skip
    ranked = {
        "prompt": "p", "image_path": files[:3], "rank": [2.5, 1, 2.5],
        "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "u"}, {"rank": [3, 1, 2], "user_hash": "v"}],
    }  # fmt: skip
    write(tmp_path / "d" / "test.json", [ranked])
    done = run(tmp_path / "d" / "test.json", "hpdv2", tmp_path / "test")
    assert pairs(tmp_path / "test") == [
        ("p", "1.jpg", "0.jpg", 1.0),
        ("p", "0.jpg", "2.jpg", 0.5),
        ("p", "1.jpg", "2.jpg", 1.0),
    ]
    assert (done.agrees, done.disagrees) == (2, 0)


def test_hpd_v3_has_the_winner_first_and_votes(tmp_path: Path) -> None:
    pictures(tmp_path / "d", "a.jpg", "b.jpg")
    row = {"prompt": "p", "path1": "a.jpg", "path2": "b.jpg", "model1": "flux", "model2": "sd", "confidence": 0.97}
    write(tmp_path / "d" / "train.json", [{**row, "choice_dist": [3, 9]}, {**row, "choice_dist": None}])
    run(tmp_path / "d", "hpdv3", tmp_path / "out")
    assert pairs(tmp_path / "out") == [("p", "a.jpg", "b.jpg", 0.75), ("p", "a.jpg", "b.jpg", 1.0)]
    first, second = read_table(tmp_path / "out", "pairs").to_pylist()
    assert json.loads(first["margins"]) == {"confidence": 0.97}
    assert first["pair_id"] != second["pair_id"]
    assert len(read_table(tmp_path / "out", "images")) == 2


# --- rankings and ratings -------------------------------------------------------------------------------------------


def test_imagerewarddb_gathers_prompts_and_keeps_shared_ranks_as_ties(tmp_path: Path) -> None:
    names = ["images/train/train_1/a.webp", "images/train/train_1/b.webp", "images/train/train_1/c.webp", "d.webp"]
    pictures(tmp_path / "d", *names)

    def row(file: str, prompt: str, rank: int | None, rating: int) -> dict[str, Any]:
        return {
            "image_path": file, "prompt_id": prompt, "prompt": f"prompt of {prompt}", "classification": "People",
            "image_amount_in_total": 3, "rank": rank, "overall_rating": rating, "image_text_alignment_rating": 5,
            "fidelity_rating": rating,
        }  # fmt: skip

    rows = [row(names[0], "x", 2, 4), row(names[3], "y", None, 1), row(names[1], "x", 1, 7), row(names[2], "x", 2, 3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / "metadata-train.parquet")
    done = run(tmp_path / "d", "imagerewarddb", tmp_path / "out")
    a, b, c = names[:3]
    assert pairs(tmp_path / "out") == [("prompt of x", *w) for w in ((b, a, 1.0), (a, c, 0.5), (b, c, 1.0))]
    assert (done.agrees, done.disagrees) == (2, 0)
    margins = [json.loads(r["margins"]) for r in read_table(tmp_path / "out", "pairs").to_pylist()]
    assert margins[0] == {"rank": 1.0, "overall_rating": 3.0, "image_text_alignment_rating": 0.0, "fidelity_rating": 3.0}
    wrong = [{**r, "overall_rating": 8 - r["overall_rating"]} for r in rows]
    pq.write_table(pa.Table.from_pylist(wrong), tmp_path / "d" / "metadata-train.parquet")
    with pytest.raises(DataError, match="disagrees with 2 of 2"):
        run(tmp_path / "d", "imagerewarddb", tmp_path / "wrong")


def test_rapidata_is_soft_and_per_dimension(tmp_path: Path) -> None:
    def row(shares: dict[str, float], **more: Any) -> dict[str, Any]:
        out = {"prompt": "p", "image1": struct(jpeg(0)), "image2": struct(jpeg(1)), "model1": "x", "model2": "y"}
        for dim, share in shares.items():
            out |= {f"weighted_results_image1_{dim}": share, f"weighted_results_image2_{dim}": 1 - share}
            out[f"detailed_results_{dim}"] = "[]"
        return {**out, **more}

    rows = [
        row({"preference": 0.25, "coherence": 0.8, "alignment": math.nan}),
        row({"preference": 0.5, "coherence": 0.5, "alignment": 0.5}),
        row({"preference": math.nan, "coherence": math.nan, "alignment": math.nan}),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    done = run(tmp_path, "rapidata", tmp_path / "out")
    found = read_table(tmp_path / "out", "pairs").to_pylist()
    assert [r["p_win"] for r in found] == [0.75, 0.5]
    assert json.loads(found[0]["margins"]) == {"preference": 0.5, "coherence": -0.6}  # of the winner, image 2
    assert read_pairs(tmp_path / "out")[0].chosen.data == jpeg(1)
    assert done.dropped == {"no label": 1}
    old = {"prompt": "p", "image1": struct(jpeg(0)), "image2": struct(jpeg(1)), "votes_image1": 3, "votes_image2": 9}
    pq.write_table(pa.Table.from_pylist([old]), tmp_path / "old.parquet")
    run(tmp_path / "old.parquet", "rapidata", tmp_path / "votes")
    assert one(tmp_path / "votes")["p_win"] == 0.75


def test_visionprefer_makes_all_pairs_of_the_aspects_as_numbers(tmp_path: Path) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    scores = [{"fidelity": "9", "aesthetic": 1}, {"fidelity": "10", "aesthetic": 1}, {"fidelity": 8, "aesthetic": 2}]
    row = {"prompt": "p", "images": [{"image": f"{i}.jpg", "model": "sd", "scores": s} for i, s in enumerate(scores)]}
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "q", "images": None}) + "\n")
    done = run(tmp_path / "v.jsonl", "visionprefer", tmp_path / "out")
    assert pairs(tmp_path / "out") == [
        ("p", "1.jpg", "0.jpg", 1.0),
        ("p", "0.jpg", "2.jpg", 0.5),
        ("p", "1.jpg", "2.jpg", 1.0),
    ]
    assert done.dropped == {"fewer than two pictures": 1}


# --- plain tables and folders ---------------------------------------------------------------------------------------


def test_open_image_preferences_and_trl_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "category": "Anime", "chosen": struct(jpeg(0)), "rejected": struct(jpeg(1)), "model_chosen": "flux"},
        {"prompt": "p", "category": "Anime", "chosen": struct(jpeg(0)), "rejected": struct(jpeg(0)), "model_chosen": "flux"},
        {"prompt": "p", "category": "Anime", "chosen": None, "rejected": struct(jpeg(0)), "model_chosen": "flux"},
    ]
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("category", pa.string()),
            ("chosen", IMAGE),
            ("rejected", IMAGE),
            ("model_chosen", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "o.parquet")
    done = run(tmp_path / "o.parquet", "open-image-preferences", tmp_path / "out", licence="apache-2.0")
    assert done.dropped == {"the same picture twice": 1, "a picture is missing": 1}
    images = read_table(tmp_path / "out", "images").to_pylist()
    assert [(r["model"], r["category"], r["licence"]) for r in images] == [
        ("flux", "Anime", "apache-2.0"),
        (None, "Anime", "apache-2.0"),
    ]
    pictures(tmp_path, "w.jpg", "l.jpg")
    (tmp_path / "t.csv").write_text(
        "prompt,chosen,rejected,p_win,score_chosen,score_rejected\np,w.jpg,l.jpg,0.8,2,1\np,w.jpg,https://dead.example/l.jpg,,,\n"
    )
    done = run(tmp_path / "t.csv", "trl", tmp_path / "csv")
    assert pairs(tmp_path / "csv") == [("p", "w.jpg", "l.jpg", 0.8)]
    assert done.dropped == {"a picture lies outside of image_root, or is a URL": 1}
    assert done.agrees == 1


def test_a_loser_keeps_its_own_caption(tmp_path: Path) -> None:
    pictures(tmp_path, "w.jpg", "l.jpg")
    rows = [
        {"prompt": "a dog", "chosen": "w.jpg", "rejected": "l.jpg", "rejected_prompt": "a cat"},
        {"prompt": "a cat", "chosen": "w.jpg", "rejected": "l.jpg", "rejected_prompt": "a dog", "p_win": 0.2},
        {"prompt": "a dog", "chosen": "w.jpg", "rejected": "w.jpg", "rejected_prompt": "a cat"},
        {"prompt": "a dog", "chosen": "w.jpg", "rejected": "w.jpg", "rejected_prompt": " a dog "},
        {"prompt": "a dog", "chosen": "l.jpg", "rejected": "w.jpg", "rejected_prompt": None},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run(tmp_path / "t.jsonl", "trl", tmp_path / "out")
    assert done.dropped == {"the same picture twice": 1}
    names = ["prompt", "rejected_prompt", "chosen_id", "rejected_id"]
    assert [tuple(r.values()) for r in read_table(tmp_path / "out", "pairs", names).to_pylist()] == [
        ("a dog", "a cat", "w.jpg", "l.jpg"), ("a dog", "a cat", "l.jpg", "w.jpg"), ("a dog", "a cat", "w.jpg", "w.jpg"),
        ("a dog", None, "l.jpg", "w.jpg"),
    ]  # fmt: skip
    (tmp_path / "no.txt").write_text("A cat.\n")
    with pytest.raises(DataError, match="evaluated on"):
        run(tmp_path / "t.jsonl", "trl", tmp_path / "barred", exclude=[str(tmp_path / "no.txt")])


@pytest.mark.parametrize(
    ("layout", "text", "said"),
    [
        ("trl", "prompt,winner,loser\np,w.jpg,l.jpg\n", "no column 'chosen'; found prompt, winner, loser"),
        ("trl", "prompt;chosen;rejected\np;w.jpg;l.jpg\n", "no column 'prompt' or 'caption'; found prompt;chosen;rejected"),
        ("pickapic", "caption,label_0\np,1\n", "no column 'label_1'"),
    ],
)
def test_a_table_of_other_columns_is_refused_and_leaves_nothing(tmp_path: Path, layout: str, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 't.csv'}: {said}")):
        run(tmp_path / "t.csv", layout, tmp_path / "out")
    (tmp_path / "t.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match="not JSON"):
        run(tmp_path / "t.jsonl", "trl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pictures(tmp_path, "w.jpg", "l.jpg")
    (tmp_path / "t.csv").write_text("prompt,chosen,rejected\np,w.jpg,l.jpg\n")
    assert run(tmp_path / "t.csv", "trl", tmp_path / "out").pairs == 1


def test_an_import_of_which_nothing_is_left_fails(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,chosen,rejected\np,w.jpg,l.jpg\np,w.jpg,\n")
    with pytest.raises(DataError, match="nothing is left of 2 rows: 2 a picture is missing"):
        run(tmp_path / "t.csv", "trl", tmp_path / "out")


def test_plain_folders(tmp_path: Path) -> None:
    pictures(tmp_path / "d", "chosen/a.jpg", "rejected/a.jpeg", "chosen/b.jpg", "chosen/c.jpg", "rejected/c.jpg")
    (tmp_path / "d" / "a.txt").write_text("prompt a\n")
    (tmp_path / "d" / "chosen" / "b.txt").write_text("prompt b\n")
    done = run(tmp_path / "d", "folders", tmp_path / "out")
    assert pairs(tmp_path / "out") == [("prompt a", "chosen/a.jpg", "rejected/a.jpeg", 1.0)]
    assert done.dropped == {"a picture is missing": 1, "no prompt": 1}
    with pytest.raises(DataError, match="no folder chosen/"):
        run(tmp_path, "folders", tmp_path / "none")


# --- the gate, files, the verb --------------------------------------------------------------------------------------


def red_is_unsafe(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [-1.0 if i.getpixel((0, 0))[0] > 127 else 1.0 for i in images]  # type: ignore[index]


def test_the_gate_flags_or_drops(tmp_path: Path) -> None:
    rows = []
    for n, colour in enumerate(((250, 0, 0), (0, 0, 250), (0, 250, 0))):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{n}.png")
    rows = [{"prompt": "p", "chosen": f"{a}.png", "rejected": f"{b}.png"} for a, b in ((0, 1), (1, 2), (2, 0))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "tests.test_import:red_is_unsafe"
    done = run(tmp_path / "t.jsonl", "trl", tmp_path / "drop", safety={"scorer": name})
    assert [p[1:3] for p in pairs(tmp_path / "drop")] == [("1.png", "2.png")]
    assert done.dropped == {"below the safety floor": 2}
    assert {r["image_id"] for r in read_table(tmp_path / "drop", "images").to_pylist()} == {"1.png", "2.png"}
    done = run(tmp_path / "t.jsonl", "trl", tmp_path / "flag", safety={"scorer": name, "action": "flag"})
    assert (done.pairs, done.flagged) == (3, 1)
    assert sorted(r["value"] for r in read_table(tmp_path / "flag", "scores").to_pylist()) == [-1.0, 1.0, 1.0]


def test_json_lists_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "x]" * n, "b": [n, {"c": "}"}]} for n in range(50)]
    monkeypatch.setattr("diffalign.data.records.BLOCK", 7)  # every token is cut somewhere
    for indent in (None, 2):
        (tmp_path / "l.json").write_text(json.dumps(rows, indent=indent))
        assert list(json_rows(tmp_path / "l.json")) == rows
    (tmp_path / "l.json").write_text('[{"a": 1}, {"a": ')
    with pytest.raises(DataError, match="item 1: not JSON, or cut short"):
        list(json_rows(tmp_path / "l.json"))
    (tmp_path / "l.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON list"):
        list(json_rows(tmp_path / "l.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_raises_on_rows_of_nothing(layout: str) -> None:
    read: Callable[[Any], Any] = LAYOUTS[layout].read
    empty = dict.fromkeys((*LAYOUTS[layout].columns, *LAYOUTS[layout].pictures, "prompt", "rank", "human_preference"))
    for row in ({}, empty):
        found = list(read({"rows": [row]} if LAYOUTS[layout].gather else row))
        assert all(isinstance(x, str) for x in found)


def test_the_command_and_its_mistakes(pickapic: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["import", "format=pickapic", f"path={pickapic}", f"output_dir={tmp_path / 'o'}"])
    assert result.exit_code == 0, result.output
    assert "4 pairs of 11 rows" in result.output
    assert "a second column agrees with 3 labels and disagrees with 0" in result.output
    with pytest.raises(ConfigError, match="unknown format 'pickpic'; known: pickapic, hpdv1"):
        run(pickapic, "pickpic", tmp_path)
    with pytest.raises(DataError, match=r"no train\.json or"):
        run(pickapic, "hpdv3", tmp_path / "n")
    with pytest.raises(DataError, match="no such file"):
        run(tmp_path / "none" / "x.json", "hpdv3", tmp_path / "n")
