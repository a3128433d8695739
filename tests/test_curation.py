"""`diffalign data`: show, stats, validate, split, merge, dedup, export, push."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.cli import main
from diffalign.curation import dedup_dataset, merge_datasets, split_dataset
from diffalign.data.exports import embedded
from diffalign.data.images import decode, encode_png, fingerprint, sha256
from diffalign.data.pairs import read_pairs
from diffalign.data.prompts import normalised
from diffalign.data.tables import read_table, shards_of, write_shard
from diffalign.errors import ConfigError, DataError
from diffalign.excluding import shapes_captions
from diffalign.inspection import agreement, show_dataset, show_lines, stats_of, validate_dataset
from diffalign.profiles import write_profiles
from diffalign.shapes.scene import sample_prompts
from tests.conftest import picture


def image(name: str, seed: int, prompt: str = "p", **more: Any) -> dict[str, Any]:
    shown = picture(seed, 16)
    data = encode_png(shown)
    row = {"image_id": name, "sha256": sha256(data), "prompt": prompt, "image": {"bytes": data, "path": None}}
    return {**row, "phash": fingerprint(shown), "width": 16, "height": 16, "licence": "mit", "model": name[0], **more}


def pair(chosen: str, rejected: str, prompt: str = "p", **more: Any) -> dict[str, Any]:
    said = {"pair_id": f"{chosen}>{rejected}", "prompt": prompt, "p_win": 1.0, "margins": '{"reward": 2.0}', "source": "here"}
    return {**said, "chosen_id": chosen, "rejected_id": rejected, **more}


def make(folder: Path, images: list[dict[str, Any]], pairs: list[dict[str, Any]], size: int = 3) -> Path:
    for table, rows in (("images", images), ("pairs", pairs)):
        for n in range(0, len(rows), size):
            write_shard(folder, table, n // size, rows[n : n + size])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = [image(f"{m}{i}", 10 * i + (m == "b"), f"Prompt {i // 2}!") for i in range(12) for m in "ab"]
    pairs = [pair(f"a{i}", f"b{i}", f"Prompt {i // 2}!", p_win=0.5 if i == 3 else 1.0, user=f"u{i % 3}") for i in range(12)]
    return make(tmp_path / "d", images, pairs)


def rows(folder: Path, table: str = "pairs") -> list[dict[str, Any]]:
    return read_table(folder, table).to_pylist()


# --- show, stats, validate --------------------------------------------------------------------------------------------


def test_scored_images_without_pairs_say_what_is_missing(tmp_path: Path) -> None:
    write_shard(tmp_path / "gen", "images", 0, [image("a", 0)])
    with pytest.raises(DataError, match="a dataset folder without pairs/") as e:
        read_pairs(tmp_path / "gen")
    assert "diffalign pairs" in str(e.value.hint)


def test_show_and_stats_count(folder: Path, tmp_path: Path) -> None:
    said = show_dataset(folder, 1)
    assert {t: (s["rows"], s["shards"]) for t, s in said["tables"].items()} == {"images": (24, 8), "pairs": (12, 4)}
    assert said["pairs"][0]["chosen_id"] == "a0"
    assert show_lines(said)[3] == '  a0 > b0, p_win 1.0, {"reward": 2.0}'
    bare = make(tmp_path / "bare", [image("a", 0), image("b", 1)], [pair("a", "b", margins="{}")])
    assert show_lines(show_dataset(bare, 1))[3] == "  a > b, p_win 1.0"
    stats = stats_of(folder)
    assert (stats["pairs"], stats["prompts"], stats["images"], stats["ties"], stats["users"]) == (12, 6, 24, 1, 3)
    assert stats["wins"] == {"a": {"comparisons": 12, "won": 11.5 / 12}, "b": {"comparisons": 12, "won": 0.5 / 12}}
    assert stats["margins"] == {"reward": {"pairs": 12, "mean": 2.0, "above_0": 1.0}}
    assert stats["licences"] == {"mit": 24}
    assert stats["agreement"] is None
    with pytest.raises(DataError, match="not a dataset folder"):
        show_dataset(tmp_path)


def test_a_whole_dataset_is_valid(folder: Path) -> None:
    assert validate_dataset(folder, pictures=True) == []


def test_every_mistake_is_found_and_named(folder: Path) -> None:
    bad = [
        pair("a0", "gone"), pair("a1", "a1"), pair("a2", "b2", p_win=0.2), pair("a4", "b4", prompt=" "),
        pair("b5", "a5", "Prompt 2!"), pair("a6", "b6", "Prompt 3!"),
    ]  # fmt: skip
    write_shard(folder, "pairs", 9, bad)
    broken = image("x", 900, error="it broke") | {"image": {"bytes": b"no picture", "path": None}}
    write_shard(folder, "images", 9, [image("a0", 901), broken, image("y", 902) | {"sha256": "0" * 64}])
    found = {f.what: (f.count, f.example, f.wrong) for f in validate_dataset(folder, pictures=True)}
    assert found == {
        "pairs whose rejected_id is not in images/": (1, "pair a0>gone", True),
        "pairs of a picture with itself": (1, "pair a1>a1", True),
        "pairs with p_win outside of 0.5 to 1": (1, "pair a2>b2", True),
        "pairs without a prompt": (1, "pair a4>b4", True),
        "pairs with the id of another": (3, "pair a2>b2", True),
        "pairs whose winner was made for another prompt": (4, "pair a0>gone", False),
        "pairs that another contradicts": (2, "pair a5>b5", False),
        "image ids that stand for several pictures": (2, "image a0", True),
        "images that could not be read": (1, "image x", False),
        "pictures that cannot be read": (1, "image x", True),
        "pictures that are not those of their hash": (2, "image a0", True),
    }


def test_agreement_is_krippendorffs(tmp_path: Path) -> None:
    # Hayes & Krippendorff's nominal form on a table of units, with another computation: the matrix of coincidences
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 2, (8, 3)) | (np.arange(8)[:, None] % 2)
    pairs = []
    for unit, votes in enumerate(ratings):
        for user, vote in enumerate(votes):
            ends = (f"a{unit}", f"b{unit}") if vote else (f"b{unit}", f"a{unit}")
            pairs.append(pair(*ends, user=f"u{user}"))
    make(tmp_path, [image("a", 0)], [*pairs, pair("a99", "b99", user="u0")])
    matrix = np.zeros((2, 2))
    for votes in ratings:
        for i in range(3):
            for j in range(3):
                if i != j:
                    matrix[votes[i], votes[j]] += 1 / 2
    n, margins = matrix.sum(), matrix.sum(0)
    alpha = 1 - (n - 1) * (n - np.trace(matrix)) / (n * n - (margins**2).sum())
    said = agreement(tmp_path)
    assert said is not None
    assert said["alpha"] == pytest.approx(alpha)
    assert (said["raters"], said["items"]) == (3, 8)
    same = np.mean([votes[i] == votes[j] for votes in ratings for i in range(3) for j in range(3) if i != j])
    assert said["observed"] == pytest.approx(same)


# --- split ------------------------------------------------------------------------------------------------------------


def test_prompts_and_their_images_stay_on_one_side(tmp_path: Path) -> None:
    images = [image(f"{m}{i}", 10 * i + (m == "b")) for i in range(40) for m in "ab"]
    pairs = [pair(f"a{i}", f"b{i}", ("A prompt, %d" if i % 2 else "a  Prompt %d") % (i // 4)) for i in range(40)]
    pairs.append(pair("a0", "b39", "a prompt 99"))  # shares images with the prompts 0 and 9
    make(tmp_path / "d", images, pairs)
    counts = split_dataset(tmp_path / "d", tmp_path / "out", {"train": 0.5, "test": 0.5})
    sides = {n: rows(tmp_path / "out" / n) for n in ("train", "test")}
    assert sum(c["pairs"] for c in counts.values()) == 41
    assert all(sides.values())
    prompts, used = (
        [{f(p) for p in s} for s in sides.values()] for f in (lambda p: normalised(p["prompt"]), lambda p: p["chosen_id"])
    )
    assert not prompts[0] & prompts[1]
    assert not used[0] & used[1]
    home = next(s for s in sides.values() if any(p["prompt"] == "a prompt 99" for p in s))
    assert {"a prompt 0", "a prompt 9"} <= {normalised(p["prompt"]) for p in home}
    for name, side in sides.items():
        assert {r["image_id"] for r in rows(tmp_path / "out" / name, "images")} == {
            p[s] for p in side for s in ("chosen_id", "rejected_id")
        }
        assert not [f for f in validate_dataset(tmp_path / "out" / name, pictures=True) if f.wrong]
        assert len(read_pairs(tmp_path / "out" / name)) == len(side)
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        split_dataset(tmp_path / "d", tmp_path / "no", {"train": 0.5, "test": 0.4})


def test_a_split_stays_when_data_are_added_and_resumes(folder: Path, tmp_path: Path) -> None:
    shares = {"train": 0.5, "select": 0.25, "test": 0.25}
    split_dataset(folder, tmp_path / "one", shares)
    for name in shares:
        for f in [*shards_of(tmp_path / "one" / name, "pairs")][1:]:
            f.unlink()
    again = split_dataset(folder, tmp_path / "one", shares)
    write_shard(folder, "images", 50, [image("z0", 700, "new"), image("z1", 701, "new")])
    write_shard(folder, "pairs", 50, [pair("z0", "z1", "new")])
    more = split_dataset(folder, tmp_path / "two", shares)
    assert sum(c["pairs"] for c in again.values()) == 12
    assert sum(c["pairs"] for c in more.values()) == 13
    for name in shares:
        old, new = ([r["pair_id"] for r in rows(tmp_path / n / name)] for n in ("one", "two"))
        assert [p for p in new if p != "z0>z1"] == old


def test_users_can_be_kept_apart_and_pictures_left_out(folder: Path, tmp_path: Path) -> None:
    split_dataset(folder, tmp_path / "out", {"a": 0.5, "b": 0.5}, by="user", salt="2", pictures=False)
    users = [{r["user"] for r in rows(tmp_path / "out" / n)} for n in ("a", "b")]
    assert users[0] | users[1] == {"u0", "u1", "u2"}
    assert not users[0] & users[1]
    assert {r["image"] for n in ("a", "b") for r in rows(tmp_path / "out" / n, "images")} == {None}
    write_shard(folder, "pairs", 9, [pair("a0", "b0")])
    with pytest.raises(DataError, match="1 pairs have no user"):
        split_dataset(folder, tmp_path / "no", {"a": 0.5, "b": 0.5}, by="user")


@settings(max_examples=20)
@given(
    edges=st.lists(st.tuples(*[st.integers(0, 9)] * 3, st.none() | st.integers(0, 12)), min_size=1, max_size=12),
)
def test_no_split_leaks_whatever_images_and_captions_link(
    edges: list[tuple[int, int, int, int | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("s")
    own = {n: None if n is None else f"Prompt {n}!" for *_, n in edges}
    pairs = [pair(f"i{a}", f"i{b}", f"prompt {p}", rejected_prompt=own[n]) for a, b, p, n in edges]
    make(tmp_path / "d", [{"image_id": f"i{i}"} for i in range(10)], pairs, 5)
    split_dataset(tmp_path / "d", tmp_path / "out", {"a": 0.5, "b": 0.5}, pictures=False)
    both = [rows(tmp_path / "out" / n) for n in ("a", "b")]
    assert len(both[0]) + len(both[1]) == len(edges)
    for key in (
        lambda r: {normalised(c) for c in (r["prompt"], r["rejected_prompt"]) if c},
        lambda r: {r["chosen_id"], r["rejected_id"]},
    ):
        seen = [set().union(*(key(r) for r in side)) for side in both]
        assert not seen[0] & seen[1]


def test_profiles_show_nothing_of_what_they_are_asked_about(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for n in range(60):
        a, b = rng.choice(30, 2, replace=False)
        said = {"user": f"u{n % 3}", "p_win": 0.5 if n % 7 == 0 else 1.0, "pair_id": str(n)}
        pairs.append(pair(f"i{a}", f"i{b}", f"Prompt {n // 4}", **said))
    pairs += [pair("i0", "i1", user="rare"), pair("i2", "i3")]
    make(tmp_path / "d", [image("i0", 0)], pairs)
    words = ["data", "profiles", str(tmp_path / "d"), str(tmp_path / "p.jsonl"), "--shots", "2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "1 users have too few" in result.output
    first = (tmp_path / "p.jsonl").read_bytes()
    CliRunner().invoke(main, words)
    assert (tmp_path / "p.jsonl").read_bytes() == first
    by_id = {p["pair_id"]: p for p in pairs}
    lines = [json.loads(x) for x in first.splitlines()]
    assert [x["user"] for x in lines] == ["u0", "u1", "u2"]
    for line in lines:
        assert len(line["examples"]) == 2
        rest = [by_id[i] for i in line["pairs"]]
        assert {r["user"] for r in rest} == {line["user"]}
        assert all(r["p_win"] == 1.0 for r in rest)
        assert not {e["prompt"] for e in line["examples"]} & {r["prompt"] for r in rest}
        seen = {e[k] for e in line["examples"] for k in ("liked", "disliked")}
        assert not seen & {r[k] for r in rest for k in ("chosen_id", "rejected_id")}
    with pytest.raises(DataError, match="no user has 90 examples"):
        write_profiles(tmp_path / "d", tmp_path / "p.jsonl", 90)


# --- merge, dedup -----------------------------------------------------------------------------------------------------


def test_merge_keeps_pictures_apart_and_pairs_once(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "e", [image("a0", 777), image("b0", 1), image("c0", 5)], [pair("a0", "b0"), pair("c0", "b0")])
    counts = merge_datasets([folder, other, folder], tmp_path / "out")
    assert counts == {"images": 24 + 2, "pairs": 12 + 2}
    pictures = {r["image_id"]: r["image"]["bytes"] for r in rows(tmp_path / "out", "images")}
    fresh = rows(tmp_path / "out")[12]
    assert pictures[fresh["chosen_id"]] == encode_png(picture(777, 16))
    assert fresh["chosen_id"].startswith("a0-")
    assert not [f for f in validate_dataset(tmp_path / "out", pictures=True) if f.wrong]
    assert merge_datasets([folder, other, folder], tmp_path / "out") == counts
    with pytest.raises(DataError, match="is the source as well"):
        merge_datasets([folder, other], folder)


def test_what_a_folder_cannot_keep_is_not_lost_unsaid(folder: Path, tmp_path: Path) -> None:
    shard = shards_of(folder, "pairs")[0]
    there = pq.read_table(shard)
    pq.write_table(there.append_column("segments", [["[]"] * len(there)]), shard)
    with pytest.raises(DataError, match=f"{shard.name}: its column segments would be lost"):
        merge_datasets([folder], tmp_path / "m")


def test_an_unfinished_merge_is_made_again(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "e", [image("a0", 777), image("b0", 1)], [pair("a0", "b0")])
    whole = merge_datasets([folder, other, folder], tmp_path / "whole")
    merge_datasets([folder, other, folder], tmp_path / "out")
    (tmp_path / "out" / ".unfinished").touch()
    for f in shards_of(tmp_path / "out", "pairs")[1:]:
        f.unlink()
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    assert merge_datasets([folder, other, folder], tmp_path / "out") == whole
    for table in ("images", "pairs"):
        a, b = (shards_of(tmp_path / n, table) for n in ("out", "whole"))
        assert [f.read_bytes() for f in a] == [f.read_bytes() for f in b]
    assert (tmp_path / "out" / "mine.txt").exists()


def test_dedup_makes_copies_one_and_removes_evaluation_prompts(tmp_path: Path) -> None:
    original = image("a", 1)
    near_copy = picture(1, 16).convert("RGB")
    near_copy.putpixel((0, 0), (0, 0, 0))
    data = encode_png(near_copy)
    assert (int(fingerprint(near_copy), 16) ^ int(original["phash"], 16)).bit_count() < 4
    near = {
        **original,
        "image_id": "near",
        "sha256": sha256(data),
        "image": {"bytes": data, "path": None},
        "phash": fingerprint(near_copy),
    }
    images = [original, {**original, "image_id": "copy"}, near, image("b", 2), image("c", 3)]
    pairs = [pair("a", "b"), pair("copy", "b"), pair("a", "near"), pair("c", "near"), pair("b", "c", "A Red circle.")]
    make(tmp_path / "d", images, pairs)
    counts, reasons = dedup_dataset(tmp_path / "d", tmp_path / "out", {"a red circle"})
    assert [(r["chosen_id"], r["rejected_id"]) for r in rows(tmp_path / "out")] == [("a", "b"), ("c", "a")]
    assert counts == {"images": 3, "pairs": 2}
    assert reasons == {
        "images of the same bytes": 1, "images of nearly the same look": 1, "repeated pairs": 1,
        "pairs of a picture with its copy": 1, "pairs of excluded prompts": 1,
    }  # fmt: skip
    exact, _ = dedup_dataset(tmp_path / "d", tmp_path / "exact", look=False)
    assert exact == {"images": 4, "pairs": 4}


def test_every_caption_of_a_split_of_the_world_is_known() -> None:
    known = {s: shapes_captions(s) for s in ("train", "test")}
    for name, captions in known.items():
        assert {normalised(p) for p in sample_prompts(300, name, seed=5)} <= captions  # type: ignore[arg-type]
    assert not known["train"] & known["test"]


# --- export, push -----------------------------------------------------------------------------------------------------


def test_exports_hold_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    from datasets import load_dataset, load_from_disk

    want = [(r["prompt"], r["chosen"], r["rejected"]) for r in embedded(folder)]
    run = CliRunner()
    for kind in ("parquet", "webdataset", "datasets"):
        result = run.invoke(main, ["data", "export", str(folder), str(tmp_path / kind), "--format", kind])
        assert result.exit_code == 0, result.output
    files = sorted(str(f) for f in (tmp_path / "parquet" / "data").iterdir())
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    saved = load_from_disk(str(tmp_path / "datasets"))
    for table in (loaded, saved):
        assert table[3]["p_win"] == 0.5
        assert np.array_equal(np.asarray(table[1]["rejected"]), np.asarray(picture(11, 16)))
    assert [(p.prompt, p.chosen.data, p.rejected.data) for p in read_pairs(files[0]) if p.p_win > 0.5] == [
        w for n, w in enumerate(want) if n != 3
    ]
    with tarfile.open(tmp_path / "webdataset" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["00000-00000.chosen.png", "00000-00000.rejected.png", "00000-00000.json"]
        assert tar.extractfile(names[0]).read() == want[0][1]  # type: ignore[union-attr]
        assert json.load(tar.extractfile(names[2]))["prompt"] == "Prompt 0!"  # type: ignore[arg-type]


def test_labelling_tasks_do_not_show_who_won_by_the_side(folder: Path, tmp_path: Path) -> None:
    for kind in ("label-studio", "argilla"):
        result = CliRunner().invoke(main, ["data", "export", str(folder), str(tmp_path / kind), "--format", kind])
        assert result.exit_code == 0, result.output
    tasks = json.loads((tmp_path / "label-studio" / "tasks.json").read_text())
    records = json.loads((tmp_path / "argilla" / "records.json").read_text())
    want = list(embedded(folder))
    sides = set()
    for task, record, row in zip(tasks, records, want, strict=True):
        said, same = task["predictions"][0]["result"], record["suggestions"]["preference"]["value"]
        if row["p_win"] == 0.5:
            assert (said, same) == ([], "tie")
            continue
        side = said[0]["value"]["selected"]
        assert (said[0]["to_name"], side) == ("left,right", same)
        sides.add(side)
        file = task["data"][side].removeprefix("/data/local-files/?d=label-studio/")
        assert (tmp_path / "label-studio" / file).read_bytes() == row["chosen"]
        assert (tmp_path / "argilla" / record["fields"][side]).read_bytes() == row["chosen"]
        decode(row["chosen"], "it")
    assert sides == {"left", "right"}


def test_push_writes_a_card_with_licences_and_no_guess(folder: Path, fake_hub: FakeHub) -> None:
    import yaml

    result = CliRunner().invoke(main, ["data", "push", str(folder), "me/pairs", "--private"])
    assert result.exit_code == 0, result.output
    assert (fake_hub.kind, fake_hub.private) == ("dataset", True)
    assert "README.md" in fake_hub.files["me/pairs"]
    assert sum(f.startswith("images/") for f in fake_hub.files["me/pairs"]) == 8
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert head["license"] == "mit"
    assert [c["config_name"] for c in head["configs"]] == ["images", "pairs"]
    write_shard(folder, "images", 50, [image("z", 999, licence=None)])
    CliRunner().invoke(main, ["data", "push", str(folder), "me/pairs"])
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
    assert "1 images state no licence" in text


def test_the_commands_print_and_fail_as_promised(folder: Path, tmp_path: Path) -> None:
    run = CliRunner()
    for words in (["show"], ["stats"], ["validate", "--pictures"]):
        result = run.invoke(main, ["data", words[0], str(folder), *words[1:]])
        assert result.exit_code == 0, result.output
    assert "nothing is wrong" in result.output
    result = run.invoke(main, ["data", "split", str(folder), str(tmp_path / "s"), "train=0.5", "test=0.5", "--json"])
    assert json.loads(result.output)["train"]["pairs"] + json.loads(result.output)["test"]["pairs"] == 12
    assert run.invoke(main, ["data", "split", str(folder), str(tmp_path / "t"), "train=x"]).exit_code == 2
    assert run.invoke(main, ["data", "merge", str(folder), str(folder), str(tmp_path / "m")]).exit_code == 0
    (tmp_path / "p.txt").write_text("prompt 0\nprompt 1\n")
    result = run.invoke(
        main,
        ["data", "dedup", str(folder), str(tmp_path / "c"), "--exclude", str(tmp_path / "p.txt"), "--exclude", "shapes:test"],
    )
    assert "removed: 4 pairs of excluded prompts" in result.output
    write_shard(folder, "pairs", 9, [pair("a0", "gone")])
    result = run.invoke(main, ["data", "validate", str(folder)])
    assert result.exit_code == 2
    assert "WRONG 1 pairs whose rejected_id" in result.output
    pq.read_table(tmp_path / "c" / "pairs" / "00000.parquet")
