"""The built-in world: renderer, captions, split, both judges, taste."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffalign.errors import ConfigError, DataError
from diffalign.shapes import (
    Scene,
    Taste,
    Thing,
    all_scenes,
    draw,
    judge,
    parse_caption,
    render,
    sample_layout,
    sample_prompts,
    sample_scenes,
    see,
)
from diffalign.shapes.render import EXTENT, coverage, relation_of, signed_distance
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, INVERSE, PHRASINGS, RELATIONS, SHAPES
from diffalign.shapes.second import second_judge


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 5
    assert len(COLOURS) >= 8
    assert len(BACKGROUNDS) >= 3
    assert len(RELATIONS) == 4


def test_captions_are_read_back_in_every_phrasing() -> None:
    for scene in sample_scenes(500, "train", np.random.default_rng(0)):
        assert all(parse_caption(scene.caption(p)) == scene for p in range(PHRASINGS))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a dog",
        "a red circle",
        "a red circle and a blue square on a grey background",
        "a red circle on grey on white",
    ],
)
def test_other_prompts_are_refused_by_name(prompt: str) -> None:
    with pytest.raises(DataError, match="not a caption of the shapes world"):
        parse_caption(prompt)


def test_the_split_keeps_scenes_whole_and_has_the_promised_shares() -> None:
    scenes = all_scenes()
    shares = {s: sum(x.split() == s for x in scenes) / len(scenes) for s in ("train", "select", "test")}
    assert shares["train"] == pytest.approx(0.7, abs=0.03)
    assert shares["select"] == pytest.approx(0.1, abs=0.02)
    assert shares["test"] == pytest.approx(0.2, abs=0.03)
    for s in scenes[::50]:
        others = [replace(s, relation=r) for r in RELATIONS] if s.relation else [s]
        assert {x.split() for x in [*others, *(o.turned() for o in others)]} == {s.split()}
    salted = [s.split("audit") for s in scenes]
    assert salted != [s.split() for s in scenes]


def test_prompts_are_distinct_fixed_and_of_their_split() -> None:
    prompts = sample_prompts(300, "test")
    assert len(set(prompts)) == 300
    assert prompts == sample_prompts(300, "test")
    assert {parse_caption(p).split() for p in prompts} == {"test"}


def test_all_shapes_have_equal_area_and_their_centroid_at_the_centre() -> None:
    grid = (np.arange(128) + 0.5) / 4
    for i in range(len(SHAPES)):
        a = coverage(np.array([i]), np.float32([15.3]), np.float32([16.7]), np.float32([6.0]), 128)[0]
        assert a.sum() / 16 == pytest.approx(np.pi * 36, rel=0.01)
        assert (a.sum(0) * grid).sum() / a.sum() == pytest.approx(15.3, abs=0.05)
        assert (a.sum(1) * grid).sum() / a.sum() == pytest.approx(16.7, abs=0.05)


def test_what_is_absent_covers_nothing() -> None:
    """Beside a shape that is there, with no leftovers of other memory in its place."""
    cx, cy, r = (np.full(2, v, np.float32) for v in (16, 16, 6))
    a = coverage(np.array([-1, 0]), cx, cy, r, 32)
    assert (a[0] == 0).all()
    assert a[1].sum() == pytest.approx(np.pi * 36, rel=0.02)


def test_layouts_keep_to_the_canvas_and_to_the_relation() -> None:
    scenes = sample_scenes(400, "train", np.random.default_rng(1))
    layout = sample_layout(scenes, np.random.default_rng(2))
    for i, scene in enumerate(scenes):
        for j in range(len(scene.things)):
            side, up, down = EXTENT[layout.shape[i, j]] * layout.r[i, j]
            assert side <= layout.cx[i, j] <= 32 - side
            assert up <= layout.cy[i, j] <= 32 - down
        if scene.relation:
            (x0, x1), (y0, y1) = layout.cx[i], layout.cy[i]
            assert relation_of(x1 - x0, y1 - y0) == scene.relation


def rate(images: np.ndarray, scenes: list[Scene]) -> tuple[float, float]:
    verdicts = judge(images, scenes)
    return float(np.mean([f for v in verdicts for f in v.facts.values()])), float(np.mean([v.exact for v in verdicts]))


def test_the_judge_is_right_on_5000_clean_renders() -> None:
    scenes = sample_scenes(5000, "test", np.random.default_rng(3))
    images = draw(scenes, np.random.default_rng(4))
    facts = [f for i in range(0, 5000, 500) for v in judge(images[i : i + 500], scenes[i : i + 500]) for f in v.facts.values()]
    assert np.mean(facts) >= 0.999


def test_the_judge_reads_64_pixels_too() -> None:
    scenes = sample_scenes(200, "test", np.random.default_rng(5))
    layout = sample_layout(scenes, np.random.default_rng(6))
    assert rate(render(layout, 64), scenes)[0] >= 0.999


def test_every_kind_of_wrong_fact_is_seen_alone() -> None:
    """One fact of the prompt is made wrong; that fact is false and the others hold."""
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "grey", "left of")
    image = draw([scene], np.random.default_rng(7))
    wrong = {
        "colour0": replace(scene, things=(Thing("green", "circle"), scene.things[1])),
        "shape0": replace(scene, things=(Thing("red", "cross"), scene.things[1])),
        "colour1": replace(scene, things=(scene.things[0], Thing("pink", "square"))),
        "shape1": replace(scene, things=(scene.things[0], Thing("blue", "triangle"))),
        "background": replace(scene, background="white"),
        "relation": replace(scene, relation=INVERSE["left of"]),
    }
    for fact, other in wrong.items():
        facts = judge(image, [other])[0].facts
        assert [k for k, ok in facts.items() if not ok] == [fact]
    alone = Scene((scene.things[0],), "grey")
    assert [k for k, ok in judge(image, [alone])[0].facts.items() if not ok] == ["count"]


def test_blank_noise_and_wrong_prompts_score_as_they_should() -> None:
    rng = np.random.default_rng(8)
    scenes = [replace(s, background="white") for s in sample_scenes(300, "test", rng)]
    images = draw(scenes, rng)
    grey = np.full_like(images, 128)
    for v, s in zip(judge(grey, scenes), scenes, strict=True):
        assert not any(v.facts.values()), s
    noise = rng.integers(0, 256, images.shape, np.uint8)
    assert rate(noise, scenes)[1] == 0
    assert np.mean([v.cleanliness for v in judge(noise, scenes)]) < 0.1
    assert rate(images[rng.permutation(300)], scenes)[1] < 0.02


def test_cleanliness_falls_with_dirt() -> None:
    rng = np.random.default_rng(9)
    scenes = sample_scenes(50, "test", rng)
    images = draw(scenes, rng).astype(float)
    levels = [np.clip(images + rng.normal(0, 255 * s, images.shape), 0, 255).astype(np.uint8) for s in (0, 0.02, 0.05, 0.1)]
    means = [np.mean([x.cleanliness for x in see(x)]) for x in levels]
    assert means[0] > 0.97
    assert means == sorted(means, reverse=True)


def test_the_judge_forgives_slight_blur() -> None:
    scenes = sample_scenes(200, "test", np.random.default_rng(10))
    images = ndimage.uniform_filter(draw(scenes, np.random.default_rng(11)), (0, 3, 3, 0))
    assert rate(images, scenes)[0] > 0.95


def test_the_judge_separates_touching_objects_of_two_colours() -> None:
    canvas = np.full((1, 32, 32, 3), 128, np.uint8)
    canvas[0, 10:20, 6:16] = COLOURS["red"]
    canvas[0, 10:20, 16:26] = COLOURS["blue"]
    sight = see(canvas)[0]
    assert sorted((b.colour, b.shape) for b in sight.blobs) == [("blue", "square"), ("red", "square")]


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "8-bit"),
        (np.zeros((1, 32, 24, 3), np.uint8), "square"),
        ([Image.new("RGB", (32, 32)), Image.new("RGB", (64, 64))], "one size"),
    ],
)
def test_the_judge_refuses_other_pictures(images: object, part: str) -> None:
    with pytest.raises(DataError, match=part):
        judge(images, ["a red circle on a grey background"] * 2)  # type: ignore[arg-type]


def test_the_judge_takes_as_many_prompts_as_pictures() -> None:
    with pytest.raises(DataError, match="1 pictures but 2 prompts"):
        judge(np.zeros((1, 32, 32, 3), np.uint8), ["a red circle on a grey background"] * 2)
    assert judge([], []) == []


def test_the_second_judge_agrees_on_clean_and_damaged_drawings() -> None:
    rng = np.random.default_rng(12)
    scenes = sample_scenes(150, "test", rng)
    clean = draw(scenes, rng)
    noisy = np.clip(clean + rng.normal(0, 10, clean.shape), 0, 255).astype(np.uint8)
    for images in (clean, noisy, ndimage.uniform_filter(clean, (0, 2, 2, 0))):
        first, second = judge(images, scenes), second_judge(images, scenes)
        agree = [a.facts[k] == b[k] for a, b in zip(first, second, strict=True) for k in b]
        assert np.mean(agree) >= 0.95
    wrong = second_judge(clean, scenes[1:] + scenes[:1])
    assert np.mean([ok for facts in wrong for ok in facts.values()]) < 0.5


def test_the_second_judge_sees_two_things_of_one_colour() -> None:
    pair = np.minimum(one("triangle", cx=8, cy=16, r=4), one("cross", cx=24, cy=16, r=4))
    facts = second_judge(pair, ["a red triangle left of a red cross on a grey background"])
    assert all(facts[0].values())


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(range(len(SHAPES)), 2)))
def test_an_outline_nearer_to_one_shape_is_not_called_by_the_other(a: int, b: int) -> None:
    """A mixture of two shapes' distances, 0.6 of the one: drawn eight times as fine and averaged."""
    grid = (np.arange(256, dtype=np.float32) + 0.5) / 8
    x, y, r = grid[None, :] - 15.8, grid[:, None] - 16.3, np.float32(4.5)
    near, far = (signed_distance(np.array([[k]]), x, y, r) for k in (a, b))
    ink = np.clip(0.5 - 8 * (0.6 * near + 0.4 * far), 0, 1).reshape(32, 8, 32, 8).mean((1, 3))[..., None]
    picture = np.float32(BACKGROUNDS["white"]) * (1 - ink) + np.float32(COLOURS["blue"]) * ink
    assert not judge(picture.round().astype(np.uint8)[None], [f"a blue {SHAPES[b]} on a white background"])[0].exact


def one(
    shape: str = "circle", cx: float = 16, cy: float = 16, r: float = 6, rgb: tuple[int, int, int] | None = None
) -> np.ndarray:
    from diffalign.shapes.render import Layout

    f = lambda v: np.float32([[v]])  # noqa: E731
    ink = np.float32([[rgb or COLOURS["red"]]])
    return render(Layout(np.array([[SHAPES.index(shape)]]), f(cx), f(cy), f(r), ink, np.float32([BACKGROUNDS["grey"]])))


def test_tastes_prefer_what_they_say() -> None:
    assert Taste("size")(one(r=8))[0] > Taste("size")(one(r=5))[0]
    assert Taste("size")(one(r=6))[0] == pytest.approx(np.pi * 36 / 1024, rel=0.03)
    assert Taste("placement")(one())[0] > 0.98 > Taste("placement")(one(cx=10))[0]
    assert Taste("margin")(one(r=5))[0] == pytest.approx(11 / 16, abs=0.03)
    assert Taste("margin")(one(cx=8, r=6))[0] == pytest.approx(2 / 16, abs=0.03)
    dull = tuple(int(0.7 * c + 0.3 * 100) for c in COLOURS["red"])
    assert Taste("palette")(one())[0] > 0.97 > Taste("palette")(one(rgb=dull))[0]
    assert Taste("cleanliness")(one())[0] > 0.97
    assert Taste("size")(np.full((1, 32, 32, 3), 128, np.uint8)) == [0.0]
    with pytest.raises(ConfigError, match="unknown taste"):
        Taste("beauty")  # type: ignore[arg-type]
