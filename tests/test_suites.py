"""Evaluation suites in their published file formats, with prompts of our own in the place of theirs."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import picture

from diffalign.cli import main
from diffalign.data.scores import Scored, read_scored
from diffalign.data.suites import SUITES, Suite, Task, read_suite
from diffalign.errors import DataError
from diffalign.evaluation import prompts_of
from diffalign.suites import open_suite, suite_lines, suite_report

RED, BLUE = "a red circle on a grey background", "a blue cross on a white background"


def hpsv2(folder: Path) -> Path:
    (folder / "benchmark").mkdir()
    for style in ("anime", "photo"):
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps([f"{style} {RED}", f"{style} {BLUE}"]))
    return folder


def partiprompts(folder: Path) -> Path:
    (folder / "PartiPrompts.tsv").write_text(
        f"Prompt\tCategory\tChallenge\tNote\n{RED}\tArts\tBasic\t\n{BLUE}\tPeople\tBasic\t\n"
    )
    return folder / "PartiPrompts.tsv"


def drawbench(folder: Path) -> Path:
    (folder / "drawbench.csv").write_text(f"Prompts,Category\n{RED},Colors\n{BLUE},Counting\n")
    return folder


def pickapic(folder: Path) -> Path:
    rows = [{"caption": p, "jpg_0": b"x", "label_0": 1.0} for p in (RED, BLUE)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test_unique-00000-of-00001.parquet")
    return folder


def imagereward(folder: Path) -> Path:
    (folder / "benchmark-prompts.json").write_text(json.dumps([{"id": 7, "prompt": RED}, {"id": 9, "prompt": BLUE}]))
    return folder


def geneval(folder: Path) -> Path:
    rows = [
        {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": RED},
        {"tag": "single_object", "include": [{"class": "cross", "count": 1}], "prompt": BLUE},
    ]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def compbench(folder: Path) -> Path:
    (folder / "color_val.txt").write_text(f"{RED}\n")
    (folder / "shape_val.txt").write_text(f"{BLUE}\n")
    (folder / "color_train.txt").write_text("not asked\n")
    return folder


def dpg(folder: Path) -> Path:
    (folder / "prompts").mkdir()
    (folder / "prompts" / "a.txt").write_text(RED)
    (folder / "prompts" / "b.txt").write_text(BLUE)
    columns = ["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"]
    with (folder / "dpg_bench.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(columns)
        table.writerow(["a", "short", 1, 0, "", "Is there a circle?"])
        table.writerow(["a", "short", 2, 1, "", "Is the circle red?"])
        table.writerow(["a", "short", 3, "1,2", "", "Is the red circle round?"])
        table.writerow(["b", "short", 1, 0, "", "Is there a cross?"])
    return folder


def unigenbench(folder: Path) -> Path:
    about = {"Testpoints": ["Attribute - Color", "Attribute - Shape"], "Testpoint Description": ["it is red", "it is round"]}
    with (folder / "test_prompts_en.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["index", "prompt_en", "sub_dims_en"])
        table.writerow([0, RED, json.dumps(about)])
        table.writerow([1, BLUE, json.dumps({"Testpoints": ["Style"], "Testpoint Description": ["it is flat"]})])
    return folder


MADE = {
    "hpsv2": hpsv2, "partiprompts": partiprompts, "drawbench": drawbench, "pickapic": pickapic, "imagereward": imagereward,
    "geneval": geneval, "t2i-compbench": compbench, "dpg-bench": dpg, "unigenbench": unigenbench,
}  # fmt: skip
NAMES = {
    "hpsv2": ("photo/00001.jpg", f"photo {BLUE}"),
    "imagereward": ("out/9_3.png", BLUE),
    "geneval": ("00001/samples/0002.png", BLUE),
    "t2i-compbench": (f"samples/{BLUE}_000123.png", BLUE),
    "unigenbench": ("1_0.png", BLUE),
}


@pytest.mark.parametrize("name", SUITES)
def test_published_files_are_read(name: str, tmp_path: Path) -> None:
    suite = open_suite(f"{name}:{MADE[name](tmp_path)}")
    said = [t.prompt for t in suite.tasks]
    assert said == ([f"{s} {p}" for s in ("anime", "photo") for p in (RED, BLUE)] if name == "hpsv2" else [RED, BLUE])
    assert len({t.id for t in suite.tasks}) == len(said)
    find = suite.finder()
    assert find("x/y.png", f" {said[-1]} ") == suite.tasks[-1]
    assert find("x/y.png", "another") is None
    assert find("x/y.png", None) is None
    if name in NAMES:
        path, prompt = NAMES[name]
        assert find(path, None).prompt == prompt
        assert find(path, RED if name != "hpsv2" else said[0]).prompt != prompt  # what a picture says of itself counts more
    assert [p.text for p in prompts_of(f"{name}:{tmp_path}", None)] == said


def test_questions_know_what_they_hang_on(tmp_path: Path) -> None:
    first, second = read_suite("dpg-bench", dpg(tmp_path)).tasks
    assert [q["parents"] for q in first.about["questions"]] == [[], [0], [0, 1]]
    assert [q["text"] for q in second.about["questions"]] == ["Is there a cross?"]
    (tmp_path / "u").mkdir()
    task, _ = read_suite("unigenbench", unigenbench(tmp_path / "u")).tasks
    assert [q["dimension"] for q in task.about["questions"]] == ["Attribute", "Attribute"]


def scored(prompt: str | None, value: float | None, name: str = "x.png") -> Scored:
    return Scored(name, name, prompt, values={"s": value})


def test_overall_is_the_mean_that_is_published() -> None:
    tasks = (Task("00000", "a", "one"), Task("00001", "b", "one"), Task("00002", "c", "two"))
    rows = [scored("a", 1), scored("a", 0), scored("b", 1), scored("c", 0.5)]
    said = {n: suite_report(Suite(n, tasks), rows)["scorers"]["s"] for n in ("geneval", "hpsv2", "partiprompts")}
    assert said["geneval"]["categories"] == {"one": pytest.approx(2 / 3), "two": 0.5}
    assert said["geneval"]["overall"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # of categories
    assert said["hpsv2"]["overall"] == pytest.approx(100 * 2.5 / 4)  # of pictures
    assert said["partiprompts"]["overall"] == pytest.approx((0.5 + 1 + 0.5) / 3)  # of prompts
    assert said["partiprompts"]["categories"] == {"one": 0.75, "two": 0.5}


def test_blocks_of_eighty() -> None:
    tasks = tuple(Task(f"photo/{i:05d}", f"p{i}", "photo") for i in range(200))
    rows = [scored(f"p{i}", i / 100) for i in range(200)]
    found = suite_report(Suite("hpsv2", tasks), rows)["scorers"]["s"]["block_deviation"]["photo"]
    assert found == pytest.approx(statistics.pstdev([39.5, 119.5]))  # the last forty are no block


def test_gaps_are_counted_and_said() -> None:
    tasks = (Task("0", "a"), Task("1", "b"), Task("2", "c"))
    said = suite_report(Suite("drawbench", tasks), [scored("a", 1), scored("a", 2), scored("b", None), scored("z", 9)])
    assert (said["without_picture"], said["other_count"], said["strangers"]) == (1, 1, 1)
    assert said["scorers"]["s"] == {"overall": 1.5, "without_value": 2}
    lines = "\n".join(suite_lines(said))
    assert "not the published protocol: 1 prompts without a picture" in lines
    assert "2 prompts without a value" in lines


def test_what_is_no_suite_is_refused(tmp_path: Path) -> None:
    for spec, why in {
        "geneval": "prompts of geneval are not shipped .*geneval:PATH",
        f"nothing:{tmp_path}": "is no suite",
        f"geneval:{tmp_path}": "no evaluation_metadata.jsonl",
        "geneval:./none": "no such file",
    }.items():
        with pytest.raises(DataError, match=why):
            open_suite(spec)
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(DataError, match="without 'tag'"):
        open_suite(f"geneval:{tmp_path}")
    (tmp_path / "evaluation_metadata.jsonl").write_text("[")
    with pytest.raises(DataError, match="not a readable table"):
        open_suite(f"geneval:{tmp_path}")


def test_geneval_from_pictures_to_its_number(tmp_path: Path) -> None:
    """Prompts and rows come by the names of the files; the judge's eyes stand in for the detector."""
    import numpy as np
    from PIL import Image

    from diffalign.shapes import draw, sample_scenes

    rng = np.random.default_rng(0)
    scenes = [s for s in sample_scenes(40, "train", rng) if len(s.things) == 1][:4]
    metadata = []
    for n, (scene, pixels) in enumerate(zip(scenes, draw(scenes, rng), strict=True)):
        (thing,) = scene.things
        row = {"tag": f"task{n % 2}", "prompt": scene.caption(), "include": [{"class": str(thing), "count": 1}]}
        metadata.append(row)
        folder = tmp_path / "images" / f"{n:05d}" / "samples"
        folder.mkdir(parents=True)
        (Image.fromarray(pixels) if n else picture(3)).save(folder / "0000.png")
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    args = [f"path={tmp_path / 'images'}", "scorers=[geneval:shapes]", f"suite=geneval:{tmp_path}", "gallery=0", "--json"]
    done = CliRunner().invoke(main, ["score", *args, f"output_dir={tmp_path / 'out'}"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["suite"]
    assert said["scorers"]["geneval"]["categories"] == {"task0": 0.5, "task1": 1}
    assert said["scorers"]["geneval"]["overall"] == 0.75
    assert {r.category for r in read_scored(tmp_path / "out")} == {"task0", "task1"}
