"""Pairs that differ in their text: edited captions, crossed prompts, and prompts that may not become training data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_endpoint import Fake, said
from hypothesis import given
from hypothesis import strategies as st
from test_pairs import config, dataset, sha, written

from diffalign.cli import main
from diffalign.data import edits as rules
from diffalign.data.edits import Edit, Kind
from diffalign.data.english import plural, singular
from diffalign.data.examples import labels_of
from diffalign.data.pairs import apart, read_pairs
from diffalign.data.prompts import normalised
from diffalign.data.suites import SUITES
from diffalign.data.tables import read_table, write_shard
from diffalign.data.wording import GLUE, Similar, may_show
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.importing import ImportConfig, import_pairs
from diffalign.inspection import validate_dataset
from diffalign.negatives import EVERY_KIND, leaves_world
from diffalign.selection import Selected, select
from diffalign.shapes import Scene, Thing, draw, judge, parse_caption, sample_prompts, sample_scenes
from diffalign.spec import validate


def edits(caption: str, kinds: list[Kind], seed: int) -> list[Edit]:
    return list(rules.edits(caption, kinds, seed))


# --- rules ----------------------------------------------------------------------------------------------------------------

RELATIONS = {
    "a cat left of a dog": ["a cat right of a dog"],
    "A man standing to the right of a woman.": ["A man standing to the left of a woman."],
    "a vase on the left side of a mirror": ["a vase on the right side of a mirror"],
    "a dog on the left and a cat on the right": [
        "a dog on the right and a cat on the right", "a dog on the left and a cat on the left",
    ],
    "a kite above a house": ["a kite below a house"],
    "a boat below the bridge": ["a boat above the bridge"],
    "a bike in front of a shop": ["a bike behind a shop"],
    "a bike behind a shop": ["a bike in front of a shop"],
    "a girl on the top of a frog": ["a girl on the bottom of a frog"],
    "a cat on a wooden table": ["a cat under a wooden table"],
    "a cat under the bed": ["a cat on the bed"],
    "two books on top of a shelf": ["two books under a shelf"],
    "a bird inside a cage": ["a bird outside a cage"],
    "Outside the house, a horse": ["Inside the house, a horse"],
    "a black cat behind a white cat": ["a black cat in front of a white cat"],
    # the two sides say the same, so the edit would be as true
    "a dog behind a dog": [], "a cat in front of another cat": [], "a black cat behind another cat": [],
    "two men behind each other": [],
    # no places
    "a fish under the sea": [], "a castle on a hill at night": [], "a photo of a right hand": [], "on a grey background": [],
    "above all, a masterpiece": [], "no dog left of a cat": [], "a man leaving, left behind": [],
}  # fmt: skip
COUNTS = {
    "a dog": ["two dogs", "three dogs", "four dogs"],
    "A small box is open": ["Two small boxes are open", "Three small boxes are open", "Four small boxes are open"],
    "Dogs. A box is open": ["Dogs. Two boxes are open", "Dogs. Three boxes are open", "Dogs. Four boxes are open"],
    "one child smiling": ["two children smiling", "three children smiling", "four children smiling"],
    "two cities": ["three cities", "four cities", "five cities", "one city"],
    "photo of 3 women": ["photo of 2 women", "photo of 4 women", "photo of 5 women", "photo of one woman"],
    "two cats are asleep": ["three cats are asleep", "four cats are asleep", "five cats are asleep", "one cat is asleep"],
    "a knife and fork": ["two knives and fork", "three knives and fork", "four knives and fork"],
    # not sure what the noun is, or not something to count
    "a man rides fast": [], "a beautiful sleeping cat": [], "a lot of dogs": [], "in a park": [], "in a hurry": [],
    "a photo of Paris": [], "4k, 35mm, f/2": [], "2x2 icons": [], "a pear cut in half": [],
    "without a hat": [], "a bus that is red": [], "a very quickly": [], "dogs": [],
    "an old Ford": [],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "caption"), [("relation", c) for c in RELATIONS] + [("count", c) for c in COUNTS])
def test_relations_and_counts_are_exactly_these(kind: Any, caption: str) -> None:
    want = (RELATIONS if kind == "relation" else COUNTS)[caption]
    assert sorted(e.text for e in edits(caption, [kind], 0)) == sorted(want)


COLOURS = "red orange yellow green cyan blue purple pink brown black white grey".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("caption", "word", "instead"),
    [
        ("a red car", "red", set(COLOURS) - {"red"}),
        ("the car is red", "red", set(COLOURS) - {"red"}),
        ("a crimson car on a blue bridge", "crimson", set(COLOURS) - {"red", "blue"}),  # not one that is there already
        ("a woman in green", "green", set(COLOURS) - {"green"}),
        ("red and blue stripes", "red", set(COLOURS) - {"red", "blue"}),
        ("a tiny house", "tiny", {"large"}),
        ("a tall tree", "tall", {"short"}),
        (
            "a glass bottle",
            "glass",
            {"wooden", "metal", "plastic", "stone", "leather", "paper", "brick", "ceramic", "concrete"},
        ),
        ("a plaid skirt", "plaid", {"striped", "spotted", "floral"}),
        ("a sunny day", "sunny", {"rainy", "snowy", "foggy", "stormy"}),
        ("three circles", "circles", {"squares", "triangles", "diamonds", "crosses", "rectangles", "hexagons"}),
        ("a yellow colored giraffe", "yellow", set(COLOURS) - {"yellow"}),
        ("a street without any red cars", "red", set()),
        ("a red or blue car", "red", set()),
        ("an orange", "orange", set()),
        ("an orange on a table", "orange", set()),
        ("a glass of water", "glass", set()),
        ("the White House", "White", set()),
        ("a diamond ring", "diamond", set()),
        ("people cross the street", "cross", set()),
        ("short hair", "short", set()),  # of tall, or of long
    ],
)
def test_attributes_are_exchanged_where_they_describe(caption: str, word: str, instead: set[str]) -> None:
    found = [e for e in edits(caption, ["attribute"], 0) if e.old == word.lower()]
    assert {e.new for e in found} == instead
    for e in found:
        assert re.sub(r"\ban? ", "a ", e.text) == re.sub(r"\ban? ", "a ", caption.replace(word, e.new))


def test_articles_and_capitals_follow() -> None:
    texts = {e.text for e in edits("A red apple, an orange cup", ["attribute"], 0)}
    assert {"A green apple, an orange cup", "A red apple, a blue cup"} <= texts
    assert "An orange cup" in {e.text for e in edits("A red cup", ["attribute"], 0)}
    assert {"Green apples", "Tiny Bob"} & {e.text for e in edits("Red apples", ["attribute"], 0)} == {"Green apples"}


@pytest.mark.parametrize(
    ("one", "many"),
    [("dog", "dogs"), ("box", "boxes"), ("city", "cities"), ("boy", "boys"), ("snowman", "snowmen"), ("human", "humans"),
     ("church", "churches"), ("glass", "glasses"), ("sheep", "sheep"), ("person", "people"), ("leaf", "leaves")],
)  # fmt: skip
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many
    assert singular(many) == one


WORDS = (
    "a an the red grey orange two 3 small dog dogs cat glass left right of to on in front behind is and , . A White".split()  # noqa: SIM905
)


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.integers(0, 3))
def test_no_caption_breaks_the_rules(caption: str, seed: int) -> None:
    found = edits(caption, EVERY_KIND, seed)
    assert found == edits(caption, EVERY_KIND, seed)
    assert {e.text for e in found} == {e.text for e in edits(caption, EVERY_KIND, seed + 1)}  # only the order is the seed's
    assert len({e.text for e in found}) == len(found)
    for e in found:
        assert normalised(e.text) != normalised(caption)
        assert not may_show(caption, e.text)


def test_kinds_take_turns_and_seeds_differ() -> None:
    caption = "a small red cat on a wooden table left of two blue cups"
    assert {e.kind for e in edits(caption, EVERY_KIND, 0)[:3]} == {"attribute", "count", "relation"}
    firsts = {edits(caption, EVERY_KIND, seed)[0].text for seed in range(20)}
    assert len(firsts) > 5


def test_in_the_built_in_world_every_edit_is_false_by_the_judge() -> None:
    scenes = sample_scenes(60, "train", np.random.default_rng(0))
    pictures = draw(scenes, np.random.default_rng(1))
    kinds: Counter[str] = Counter()
    for n, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        caption = scene.caption(n % 4)
        found = [e for e in edits(caption, EVERY_KIND, 0) if leaves_world(caption, e.text) is None]
        assert found
        kinds.update(e.kind for e in found)
        verdicts = judge(np.stack([picture] * (len(found) + 1)), [caption, *(e.text for e in found)])
        assert verdicts[0].exact
        assert not any(v.exact for v in verdicts[1:])
        assert {parse_caption(e.text).split() for e in found} == {scene.split()}
    assert set(kinds) == {"attribute", "relation"}  # this world counts nothing


def test_what_leaves_the_world_says_why() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "grey", "left of")
    assert leaves_world("a cat", "a dog") is None
    assert leaves_world(scene.caption(), scene.turned().caption(3)) == "the same scene of the built-in world"
    assert leaves_world(scene.caption(), "two red circles on a grey background") == "no caption of the built-in world"
    other = next(s for s in sample_scenes(99, "test" if scene.split() != "test" else "train", np.random.default_rng(0)))
    assert leaves_world(scene.caption(), other.caption()) == "a scene of another split of the built-in world"


# --- what words say -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "other", "may"),
    [
        ("a dog left of a cat", "a cat right of a dog", True),
        ("a dog left of a cat", "a dog right of a cat", False),
        ("a cat on a mat", "a mat under a cat", True),
        ("a cat on a mat", "a cat under a mat", False),
        ("a lamp over a table", "a lamp above a table", True),
        ("a bike in front of a shop", "a bike behind a shop", False),
        ("a big dog", "a dog", True),
        ("a dog", "a big dog", False),
        ("A photo of 2 dogs!", "two dogs", True),
        ("two dogs", "three dogs", False),
        ("a gray wall", "the grey wall", True),
    ],
)
def test_whether_a_picture_may_show_another_caption(caption: str, other: str, may: bool) -> None:
    assert may_show(caption, other) is may


def test_captions_of_one_scene_are_known_as_such() -> None:
    for scene in sample_scenes(40, "train", np.random.default_rng(0)):
        for one, two in product((scene, scene.turned()), repeat=2):
            for a, b in product(range(4), repeat=2):
                assert may_show(one.caption(a), two.caption(b))


@given(
    st.floats(0.05, 0.95) | st.sampled_from([1 / 3, 0.5, 0.6]),
    st.lists(st.lists(st.sampled_from(["red", "cat", "dog", "tree", "sky", "car"]), max_size=5), min_size=2, max_size=40),
)
def test_similarity_is_the_jaccard_index(least: float, found: list[list[str]]) -> None:
    captions = [" ".join(words) for words in found]
    sets = [set(words) - GLUE for words in found]
    similar = Similar(captions, least)
    for row in range(len(captions)):
        others = similar.to(row)
        index = {j: len(sets[row] & s) / len(sets[row] | s) for j, s in enumerate(sets) if j != row and sets[row] & s}
        assert dict(others) == pytest.approx({j: x for j, x in index.items() if x >= least})
        assert [j for j, _ in others] == sorted((j for j, _ in others), key=lambda j: (-index[j], j))


# --- the verb: edited captions --------------------------------------------------------------------------------------------

ENGLISH = [
    "a red cat left of a blue dog",
    "two small boats on a lake",
    "a tall man",
    "sky",
    "a glass bottle",
    "a wooden chair",
]


def prompted(folder: Path, prompts: list[str], **more: Any) -> Path:
    """The data set of the tests of rules, with these prompts."""
    dataset(folder, prompts=len(prompts), **more)
    named = {f"prompt {n}": p for n, p in enumerate(prompts)}
    shas = {sha(old): sha(new) for old, new in named.items()}
    for table, column, names in (("images", "prompt", named), ("scores", "prompt_sha256", shas)):
        rows = [{**r, column: names[r[column]]} for r in read_table(folder, table).to_pylist()]
        for shard in (folder / table).iterdir():
            shard.unlink()
        write_shard(folder, table, 0, rows)
    return folder


def made(folder: Path, out: Path, **more: Any) -> Selected:
    return select(config(folder, out, **{"rule": None, "reward": {}, **more}))


def test_one_image_and_two_captions(tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ENGLISH)
    done = made(folder, tmp_path / "out", captions={"type": "edits", "per_image": 2})
    rows = written(tmp_path / "out")
    assert {(r["chosen_id"], r["p_win"], r["margins"], r["scores"]) for r in rows} == {
        (f"p{n}-{k}", 1.0, None, None) for n in (0, 1, 2, 4, 5) for k in range(4)
    }
    assert all(r["chosen_id"] == r["rejected_id"] for r in rows)
    assert len({r["pair_id"] for r in rows}) == len(rows) == done.pairs == 40
    for r in rows:
        found = edits(r["prompt"], EVERY_KIND, 0)[:2]
        assert (r["rejected_prompt"], r["source"]) in [(e.text, f"edited {e.kind}") for e in found]
    assert done.dropped == {"prompts without attribute, count, relation to edit": 1}  # "sky"
    assert sum(done.made_by.values()) == 40
    assert "edited attribute" in "\n".join(done.lines("x"))
    assert not [f for f in validate_dataset(tmp_path / "out", pictures=True) if f.wrong]
    pairs = read_pairs(tmp_path / "out")
    assert all(p.chosen.key == p.rejected.key and p.prompts == (p.prompt, p.rejected_prompt) for p in pairs)
    labels = labels_of(pairs)  # TKTO: good with its own caption, bad with the edited ones
    assert Counter(x.good for x in labels) == {True: 20, False: 40}
    assert all(x.good == (x.prompt in ENGLISH) for x in labels)


def test_losers_get_captions_of_their_own(tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ENGLISH)
    select(config(folder, tmp_path / "plain", rule={"type": "all"}, temperature=2.0))
    done = select(
        config(folder, tmp_path / "out", rule={"type": "all"}, temperature=2.0, captions={"type": "edits", "of": "losers"})
    )
    kept = ("chosen_id", "rejected_id", "prompt", "p_win", "margins", "rule", "scores")
    want = [tuple(r[k] for k in kept) for r in written(tmp_path / "plain") if r["prompt"] != "sky"]
    assert [tuple(r[k] for k in kept) for r in written(tmp_path / "out")] == want
    assert all(p.rejected_prompt == edits(p.prompt, EVERY_KIND, 0)[0].text for p in read_pairs(tmp_path / "out"))
    assert done.dropped["prompts without attribute, count, relation to edit"] == 1
    tied = {"rule": {"type": "all", "min_margin": 3.0}, "ties": "keep", "captions": {"type": "edits", "of": "losers"}}
    done = select(config(folder, tmp_path / "tied", **tied))
    assert done.ties == sum(r["p_win"] == 0.5 for r in written(tmp_path / "tied")) > 0


def test_edits_belong_to_the_seed_and_the_prompt_alone(tmp_path: Path) -> None:
    """Not to the other prompts, shards or processes."""

    def by_prompt(out: Path) -> set[tuple[str, str]]:
        return {(r["prompt"], r["rejected_prompt"]) for r in written(out)}

    settings = {"captions": {"type": "edits"}, "crossed": {"least": 0.1}, "shard_size": 1}
    whole = prompted(tmp_path / "d", ENGLISH)
    made(whole, tmp_path / "one", **settings)
    for rank in (1, 0):
        select(config(whole, tmp_path / "two", rule=None, reward={}, **settings), rank, 2)
    files = [sorted(f.rglob("*.*")) for f in (tmp_path / "one", tmp_path / "two")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    made(prompted(tmp_path / "e", ENGLISH[::-1]), tmp_path / "back", captions={"type": "edits"})
    made(whole, tmp_path / "plain", captions={"type": "edits"})
    made(whole, tmp_path / "seed", captions={"type": "edits", "seed": 1})
    assert by_prompt(tmp_path / "back") == by_prompt(tmp_path / "plain") != by_prompt(tmp_path / "seed")


def test_training_does_not_see_evaluation_prompts_as_rejected_captions(tmp_path: Path) -> None:
    made(prompted(tmp_path / "d", ["a tall man"]), tmp_path / "out", captions={"type": "edits", "kinds": ["attribute"]})
    pairs = read_pairs(tmp_path / "out")
    with pytest.raises(DataError, match="4 of 4 training pairs"):
        apart(pairs, ["A short man."], "refuse")
    asked = {"exclude": [str(tmp_path / "p.txt")], "captions": {"type": "edits", "kinds": ["attribute"]}}
    (tmp_path / "p.txt").write_text("A short man.")
    done = made(tmp_path / "d", tmp_path / "none", **asked)
    assert done.pairs == 0
    assert done.dropped["edits: a prompt that is evaluated on"] == 1
    assert made(tmp_path / "d", tmp_path / "kept", **asked, evaluation_prompts="keep").pairs == 4


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"reward": {}}, "reward: name a score"),
        ({"rule": None}, "nothing makes pairs"),
        ({"rule": None, "captions": {"type": "edits", "of": "losers"}}, "needs the pairs of a rule"),
        ({"captions": {"type": "edit"}}, "did you mean 'edits'"),
        ({"captions": {"type": "edits", "kinds": []}}, "captions"),
        ({"captions": {"type": "endpoint", "url": "x", "model": "m", "template": "no"}}, "has no {prompt}"),
        ({"crossed": {"least": 0}}, "crossed.least"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(Path("x"), Path("y"), **wrong)


# --- the verb: a language model -------------------------------------------------------------------------------------------


def asked(fake: Fake, **more: Any) -> dict[str, Any]:
    return {"captions": {"type": "endpoint", "url": fake.url, "model": "m", "attempts": 2, "timeout": 5, **more}}


def test_a_language_model_edits_and_what_cannot_be_used_is_counted(fake: Fake, tmp_path: Path) -> None:
    answers = {
        ENGLISH[0]: ["a red cat right of a blue dog", None],
        ENGLISH[1]: ["two small boats on a lake", "three small boats on a lake"],  # better at the second time
        ENGLISH[2]: ["a man", "A TALL MAN"],  # both true as well
        ENGLISH[3]: ["not JSON", "not JSON"],
        ENGLISH[4]: [500, 500],
        ENGLISH[5]: ["a metal chair", None],
    }
    count: Counter[str] = Counter()

    def answer(images: list[Any], text: str) -> Any:
        assert images == []
        assert "attribute" in text
        prompt = text.partition('"')[2].partition('"')[0]
        found = answers[prompt][min(count[prompt], 1)]
        if count[prompt] and prompt != ENGLISH[4]:
            assert "could not be used: " in text
        count[prompt] += 1
        if isinstance(found, int) or found == "not JSON":
            return found if isinstance(found, int) else said("I would rather not.")
        return said(f"```json\n{json.dumps({'caption': found})}\n```")

    fake.answer = answer
    folder = prompted(tmp_path / "d", ENGLISH)
    done = made(folder, tmp_path / "out", **asked(fake))
    rows = {(r["prompt"], r["rejected_prompt"]) for r in written(tmp_path / "out")}
    assert rows == {(ENGLISH[0], answers[ENGLISH[0]][0]), (ENGLISH[1], answers[ENGLISH[1]][1]), (ENGLISH[5], "a metal chair")}
    assert done.dropped == {
        "edits by m: it may be true of the picture as well": 1, "edits by m: not JSON with a caption": 1,
        "edits by m: the endpoint gave no answer": 1,
    }  # fmt: skip
    assert count == {ENGLISH[0]: 1, ENGLISH[1]: 2, ENGLISH[2]: 2, ENGLISH[3]: 2, ENGLISH[4]: 2, ENGLISH[5]: 1}
    assert all("type: endpoint" in r["rule"] for r in written(tmp_path / "out"))
    before = len(fake.asked)
    assert made(folder, tmp_path / "out", **asked(fake)).made == 0
    assert len(fake.asked) == before  # what is written is not asked again


def test_a_silent_endpoint_leaves_no_empty_shard(fake: Fake, tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ENGLISH[:2])
    fake.answer = lambda images, text: 503
    with pytest.raises(ModelError, match="none of 2 requests was answered: it answered 503"):
        made(folder, tmp_path / "out", **asked(fake, attempts=1))
    assert not list((tmp_path / "out").glob("pairs/*"))
    fake.answer = lambda images, text: said('{"caption": "a horse"}')
    assert made(folder, tmp_path / "out", **asked(fake, attempts=1)).pairs == 8


# --- the verb: crossing ---------------------------------------------------------------------------------------------------


def test_two_similar_prompts_make_the_four_pairs_of_their_quadruple(tmp_path: Path) -> None:
    prompts = ["a red cat on a chair", "a red dog on a chair", "a red cat", "the sea", "a chair on a red cat"]
    folder = prompted(tmp_path / "d", prompts)
    done = select(config(folder, tmp_path / "out", rule=None, crossed={"least": 0.5}))
    value = {(r["image_sha256"]): r["value"] for r in read_table(folder, "scores").to_pylist() if r["scorer"] == "good"}
    images = read_table(folder, "images").to_pylist()
    best = {p: max((r for r in images if r["prompt"] == p), key=lambda r: value[r["sha256"]])["image_id"] for p in prompts}
    c, d = prompts[:2]
    last = prompts[4]
    rows = {(r["prompt"], r["chosen_id"], r["rejected_id"], r["rejected_prompt"]) for r in written(tmp_path / "out")}
    want = {(p, best[p], best[q], None) for p, q in ((c, d), (d, c), (last, d))}
    assert rows == want | {(p, best[p], best[p], q) for p, q in ((c, d), (d, c), (last, d))}
    # "a red cat" is in "a red cat on a chair", whose words are also those of the last: neither is a counterexample
    assert done.dropped["prompts without a similar one to cross with"] == 2
    assert done.dropped["crossings: one prompt says all that the other says"] > 0
    assert done.made_by == {"crossed images": 3, "crossed captions": 3}
    assert len(read_pairs(tmp_path / "out")) == 6
    assert not [f for f in validate_dataset(tmp_path / "out", pictures=True) if f.wrong]
    only = select(config(folder, tmp_path / "worst", rule=None, crossed={"least": 0.5, "pairs": ["images"], "take": "worst"}))
    assert only.made_by == {"crossed images": 3}
    worst = {r["rejected_id"] for r in written(tmp_path / "worst")}
    assert {value[r["sha256"]] for r in images if r["image_id"] in worst} == {
        min(value[r["sha256"]] for r in images if r["prompt"] == p) for p in (c, d)
    }


def test_one_picture_of_two_prompts_is_not_crossed_with_itself(tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ["a red cat", "a red dog"], k=1)
    rows = read_table(folder, "images").to_pylist()
    write_shard(folder, "images", 0, [{**r, "sha256": rows[0]["sha256"], "image": rows[0]["image"]} for r in rows])
    done = made(folder, tmp_path / "out", crossed={"least": 0.1})
    assert done.pairs == 0
    assert done.dropped == {"crossings: the same picture has both prompts": 2}


def test_crossed_pictures_are_false_for_their_prompt_by_the_judge(tmp_path: Path) -> None:
    prompts = sample_prompts(120, "train", seed=3)
    folder = prompted(tmp_path / "d", prompts, k=1)
    done = made(folder, tmp_path / "out", crossed={"least": 0.4, "neighbours": 3}, shard_size=50)
    rows = written(tmp_path / "out")
    assert len(rows) == done.pairs > 100
    images = read_table(tmp_path / "out", "images").to_pylist()
    assert len({r["image_id"] for r in images}) == len(images)  # once, whichever shard needs it
    pictures = dict(zip(prompts, draw([parse_caption(p) for p in prompts], np.random.default_rng(0)), strict=True))
    of = {r["image_id"]: r["prompt"] for r in images}
    crossed = [r for r in rows if r["source"] == "crossed images"]
    seen = np.stack([pictures[of[r["rejected_id"]]] for r in crossed])
    assert not any(v.exact for v in judge(seen, [r["prompt"] for r in crossed]))
    texts = [r for r in rows if r["source"] == "crossed captions"]
    seen = np.stack([pictures[of[r["chosen_id"]]] for r in texts])
    assert not any(v.exact for v in judge(seen, [r["rejected_prompt"] for r in texts]))


def test_neighbours_equal_a_search_over_all_pairs(tmp_path: Path) -> None:
    prompts = sample_prompts(60, "train", seed=5)
    made(
        prompted(tmp_path / "d", prompts, k=1),
        tmp_path / "out",
        crossed={"least": 0.6, "neighbours": 2, "pairs": ["captions"]},
    )

    def bag(text: str) -> set[str]:
        plain = re.sub(r"on (a )?(\w+)( background|$)", r"\2", text.replace("to the ", "").replace(",", ""))
        return set(plain.replace(" background", "").split()) - {"a", "of", "is", "picture"}

    want = set()
    for p in prompts:
        near = [(-len(bag(p) & bag(q)) / len(bag(p) | bag(q)), n, q) for n, q in enumerate(prompts) if q != p]
        far = [q for x, _, q in sorted(near) if -x >= 0.6 and not may_show(p, q) and not may_show(q, p)]
        want |= {(p, q) for q in far[:2]}
    assert {(r["prompt"], r["rejected_prompt"]) for r in written(tmp_path / "out")} == want


def test_a_score_decides_where_pictures_were_scored_under_the_other_prompt(tmp_path: Path) -> None:
    """Images of c', scored under c, are images of c in a folder of their own, and compete there."""
    a = prompted(tmp_path / "a", ["a cat", "a dog"], k=2)
    rows = [r for r in read_table(a, "images").to_pylist() if r["prompt"] == "a dog"]
    write_shard(tmp_path / "b", "images", 0, [{**r, "prompt": "a cat"} for r in rows])
    scores = [r for r in read_table(a, "scores").to_pylist() if r["scorer"] == "good"][:1]
    cells = [
        {**scores[0], "image_sha256": r["sha256"], "prompt_sha256": sha("a cat"), "value": 100.0 + n}
        for n, r in enumerate(rows)
    ]
    write_shard(tmp_path / "b", "scores", 0, cells)
    select(config([a, tmp_path / "b"], tmp_path / "out"))
    (row,) = [r for r in written(tmp_path / "out") if r["prompt"] == "a cat"]
    assert row["chosen_id"] == rows[1]["image_id"]


# --- prompts that are evaluated on ----------------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path) -> str:
    row = {"tag": "colors", "include": [], "prompt": "a TALL man."}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row))
    return f"geneval:{tmp_path / 'evaluation_metadata.jsonl'}"


def test_pairs_of_a_suite_are_refused_dropped_or_kept(suite: str, tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ENGLISH)
    settings: dict[str, Any] = {"rule": {"type": "all"}, "exclude": [suite]}
    with pytest.raises(DataError, match=rf"d: 1 of 6 prompts are evaluated on \({suite}: 1\), first 'a tall man'.*=drop"):
        select(config(folder, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
    done = select(config(folder, tmp_path / "out", **settings, evaluation_prompts="drop"))
    assert done.images_dropped == {"of a prompt that is evaluated on": 4}
    assert "a tall man" not in {r["prompt"] for r in written(tmp_path / "out")}
    with pytest.raises(DataError, match=r"another plan \(differs in evaluation_prompts\)"):
        select(config(folder, tmp_path / "out", **settings, evaluation_prompts="keep"))
    select(config(folder, tmp_path / "kept", **settings, evaluation_prompts="keep"))
    assert "a tall man" in {r["prompt"] for r in written(tmp_path / "kept")}


def test_imports_of_a_suite_are_refused_dropped_or_kept(suite: str, tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": f"{n}.png", "rejected": "x.png"} for n, p in enumerate(["a cat", "A tall man", "a dog"])]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def imported(out: str, **more: Any) -> Any:
        said = {"format": "trl", "path": str(tmp_path / "t.jsonl"), "output_dir": str(tmp_path / out), "pictures": False}
        return import_pairs(validate(ImportConfig, {**said, "exclude": [suite], "shard_size": 1, **more}))

    with pytest.raises(DataError, match=r"t.jsonl, shard 1: 1 of 1 prompts are evaluated on .*first 'A tall man'"):
        imported("out")
    done = imported("out", evaluation_prompts="drop")  # goes on where the refusal stopped
    assert (done.made, done.pairs, done.dropped) == (2, 2, {"a prompt that is evaluated on": 1})
    assert {r["prompt"] for r in written(tmp_path / "out")} == {"a cat", "a dog"}
    assert imported("kept", evaluation_prompts="keep").pairs == 3


def test_the_commands_say_what_is_refused(suite: str, tmp_path: Path) -> None:
    folder = prompted(tmp_path / "d", ENGLISH)
    words = ["pairs", f"path={folder}", "reward.good=1", f"exclude=[{suite}]", f"output_dir={tmp_path / 'o'}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "evaluation_prompts=drop leaves them out" in result.output
    result = CliRunner().invoke(main, [*words, "evaluation_prompts=drop", "rule=null", "captions.type=edits"])
    assert result.exit_code == 0, result.output
    assert "edited " in result.output
    assert "images dropped: 4 of a prompt that is evaluated on" in result.output
    wrong = CliRunner().invoke(main, [*words[:-1], "exclude=[geneval:./none]", "output_dir=x"])
    assert wrong.exit_code == 2
    assert "no such file" in wrong.output
    wrong = CliRunner().invoke(main, [*words[:-2], "exclude=[geneval]", "output_dir=x"])
    assert wrong.exit_code == 2
    assert "write geneval:PATH" in wrong.output


def test_the_documented_suites_are_those_that_are_known() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    known = re.search(r"Known are (.+?);", page, re.DOTALL)
    assert known is not None
    assert set(re.findall(r"`(.+?)`", known[1])) == set(SUITES)


def test_pairs_begin_without_torch() -> None:
    code = "import sys, diffalign.selection; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_ordered_pair_of_small_captions_is_symmetric_where_it_must_be() -> None:
    """If each may show the other, the two say the same words; a caption may always show itself."""
    captions = ["a dog", "a big dog", "a dog left of a cat", "a cat right of a dog", "two dogs"]
    assert all(may_show(c, c) for c in captions)
    both = {frozenset(p) for p in permutations(captions, 2) if may_show(*p) and may_show(*p[::-1])}
    assert both == {frozenset(("a dog left of a cat", "a cat right of a dog"))}
