"""Vision-language judges against an endpoint of our own that answers as it is told."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from fake_endpoint import Fake, said
from PIL import Image
from test_online import online, small

from diffalign.cells import ScoreConfig, score
from diffalign.errors import ConfigError, DiffalignError
from diffalign.recipes import TrainConfig, train
from diffalign.scorers import ScoreInput
from diffalign.scorers.http import Address
from diffalign.scorers.vlm import Endpoint, Pairwise, Pointwise, VQAScore, image_1_or_2
from diffalign.scoring import identify, make_scorer
from diffalign.serve import ScorerServer
from diffalign.spec import validate
from diffalign.train.tracking import read_metrics


def likely(**words: float) -> dict[str, Any]:
    top = [{"token": w.replace("_", " "), "logprob": math.log(p)} for w, p in words.items()]
    return {"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": top}]}}


def scores(scorer: Any, *prompts: str) -> tuple[list[float], list[str | None]]:
    found = scorer(ScoreInput([picture(i) for i in range(len(prompts))], prompts))
    (values,) = found.values.values()
    return values.tolist(), found.errors


def test_vqascore_is_the_share_of_yes(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "a": likely(Yes=0.5, _yes=0.1, No=0.2, Maybe=0.1),
        "b": likely(no=0.9),
        "c": likely(Perhaps=0.9),
        "d": said("Yes"),
    }
    fake.answer = lambda images, text: answers[text.partition('"')[2][0]]
    monkeypatch.setenv("DIFFALIGN_VLM_KEY", "k")
    scorer = make_scorer(f"vlm:{fake.url},some/model")
    values, errors = scores(scorer, "a", "b", "c", "d")
    assert values[:2] == [pytest.approx(0.75), 0]
    assert all(math.isnan(v) for v in values[2:])
    assert errors == [None, None, "neither yes nor no among ['Perhaps']", "the endpoint gave no log-probabilities"]
    first = fake.asked[0]
    assert (first["model"], first["temperature"], first["max_tokens"], first["logprobs"]) == ("some/model", 0, 1, True)
    assert (first["path"], first["key"]) == ("/v1/chat/completions", "Bearer k")


def test_the_model_sees_the_very_pixels_in_order(fake: Fake) -> None:
    seen: dict[str, bytes] = {}

    def answer(images: list[Image.Image], text: str) -> dict[str, Any]:
        seen[text] = images[0].tobytes()
        return likely(yes=1.0)

    fake.answer = answer
    scores(VQAScore(Endpoint(Address(fake.url), "m"), "{prompt}"), "{0}", "p1", "p2")
    assert seen == {p: picture(i).tobytes() for i, p in enumerate(["{0}", "p1", "p2"])}


@pytest.mark.parametrize(
    ("answer", "value"),
    [("7", 7), ("7.5.", 7.5), (" 10/10 ", 10), ("11", None), ("7 of 10", None), ("", None), ("-1", None), ("nan", None)],
)
def test_ratings_are_numbers_or_nothing(fake: Fake, answer: str, value: float | None) -> None:
    fake.answer = lambda images, text: said(answer)
    values, errors = scores(make_scorer(f"vlm-rating:{fake.url},m"), "p")
    assert (errors[0] is None) == (value is not None)
    assert values[0] == value if value is not None else math.isnan(values[0])


def test_a_taste_for_the_first_place_cancels_out(fake: Fake) -> None:
    judge = Pairwise(Endpoint(Address(fake.url), "m"))
    fake.answer = lambda images, text: said("First.")
    assert judge([picture(0)], [picture(1)], ["p"])[0].tolist() == [0.5]

    def larger(images: list[Image.Image], text: str) -> dict[str, Any]:
        return said("first" if images[0].width > images[1].width else "second")

    fake.answer = larger
    values, errors = judge([picture(0, 48), picture(0, 16)], [picture(1), picture(1)], ["p", "q"])
    assert values.tolist() == [1, 0]
    assert errors == [None, None]
    fake.answer = lambda images, text: said("the first, I think")
    values, errors = judge([picture(0)], [picture(1)], ["p"])
    assert torch.isnan(values).all()
    assert "neither first nor second" in str(errors[0])


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("It is sharp.\nFinal Score: 4.5", 4.5),
        ("**Final Score:** 3", 3),
        ("Final Score: 7", None),
        ("Final Score: 2 Final Score: 3", None),
        ("4", None),
    ],
)
def test_final_scores_are_read_or_null(fake: Fake, answer: str, value: float | None) -> None:
    fake.answer = lambda images, text: said(answer)
    values, errors = scores(make_scorer(f"unifiedreward:{fake.url},m"), "p")
    assert (errors[0] is None) == (value is not None)
    assert values[0] == value if value is not None else math.isnan(values[0])


def test_verdicts_of_unifiedreward(fake: Fake) -> None:
    judge = Pairwise(Endpoint(Address(fake.url), "m"), "{prompt}", image_1_or_2, 64)
    for answer, value in {"Image 1 is better.": 0.5, "Both images are equally good": 0.5}.items():
        fake.answer = lambda images, text, answer=answer: said(answer)
        assert judge([picture(0)], [picture(1)], ["p"])[0].tolist() == [value]  # the same in both orders
    fake.answer = lambda images, text: said(f"Image {1 if images[0].width > images[1].width else 2} is better")
    assert judge([picture(0, 48)], [picture(1, 16)], ["p"])[0].tolist() == [1]
    fake.answer = lambda images, text: said("I cannot say")
    assert "no verdict" in str(judge([picture(0)], [picture(1)], ["p"])[1][0])


def test_questions_of_a_suite(fake: Fake) -> None:
    """A question whose parent is answered no is not asked, and counts as no."""
    asked: list[str] = []
    fake.answer = lambda images, text: asked.append(text) or (likely(yes=0.9) if "circle" in text else likely(no=0.9))
    scorer = make_scorer(f"vlm-questions:{fake.url},m")
    questions = [
        {"text": "Is there a circle?", "parents": [], "dimension": "Entity"},
        {"text": "Is it red?", "parents": [0], "dimension": "Color"},
        {"text": "Is the circle darker than red?", "parents": [0, 1], "dimension": "Color"},
        {"text": "Is it a circle?", "parents": [0]},
    ]
    batch = ScoreInput([picture(0), picture(1)], ["p", "q"], metadata=[{"questions": questions}, {}])
    found = scorer(batch)
    assert found.values["vlm-questions"].tolist()[0] == 0.5
    assert (found.values["Entity"][0], found.values["Color"][0]) == (1, 0)
    assert found.errors == [None, "nothing says what to ask: no questions"]
    assert found.partial == {"Entity", "Color"}
    assert [t.split("?")[0] for t in asked] == ["Is there a circle", "Is it red", "Is it a circle"]


def test_a_weighted_checklist(fake: Fake, tmp_path: Path) -> None:
    """Yes is +1, no is -1, what a mask hides is 0, a probability is itself."""
    fake.answer = lambda images, text: likely(yes=0.8, no=0.2) if "sky" in text else likely(no=0.7, yes=0.3)
    rows = [
        {"text": "A sky?", "weight": 2.0},
        {"text": "B?", "weight": 0.5},
        {"text": "is B there?", "weight": 0},
        {"text": "sky of B?", "weight": 100, "parents": [2]},
        {"text": 'sky "{prompt}"?', "weight": 10, "probability": True},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    scorer = make_scorer(f"vlm-checklist:{fake.url},m,{tmp_path}/q.json")
    values, errors = scores(scorer, "it")
    assert errors == [None]
    assert values == [pytest.approx(2 - 0.5 + 10 * 0.8)]
    assert any('sky "it"?' in str(a) for a in (r["messages"][0]["content"][-1]["text"] for r in fake.asked))
    (tmp_path / "q.json").write_text('[{"text": "x"}]')
    with pytest.raises(ConfigError, match="not a list of questions"):
        make_scorer(f"vlm-checklist:{fake.url},m,{tmp_path}/q.json")


def test_failures_are_tried_again_and_then_null(fake: Fake) -> None:
    answers: list[Any] = [503, 429, likely(yes=1.0)]
    fake.answer = lambda images, text: answers.pop(0)
    assert scores(VQAScore(Endpoint(Address(fake.url, pause=0), "m")), "p") == ([1], [None])
    answers[:] = [400, likely(yes=1.0)]
    assert "answered 400" in str(scores(VQAScore(Endpoint(Address(fake.url, pause=0), "m")), "p")[1][0])
    assert len(answers) == 1  # asking again would not help
    fake.answer = lambda images, text: time.sleep(2) or likely(yes=1.0)
    began = time.monotonic()
    assert scores(VQAScore(Endpoint(Address(fake.url, timeout=0.2, attempts=2, pause=0), "m")), "p")[1] == [
        "no answer within 0.2 s"
    ]
    assert time.monotonic() - began < 1.9


def test_model_and_template_are_the_version(fake: Fake) -> None:
    def mark(model: str, template: str | None = None) -> str:
        return identify("vlm:x", VQAScore(Endpoint(Address(fake.url), model), template)).version

    assert len({mark("a"), mark("b"), mark("a", "{prompt}?")}) == 3
    assert mark("a") == mark("a")
    assert Pointwise(Endpoint(Address(fake.url), "a")).version != mark("a")


def test_a_template_comes_from_a_file(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Is {prompt} there?\n")
    asked: list[str] = []
    fake.answer = lambda images, text: asked.append(text) or likely(yes=1.0)
    scores(make_scorer(f"vlm:{fake.url},m,{tmp_path}/t.txt"), "it")
    assert asked == ["Is it there?"]
    with pytest.raises(ConfigError, match="cannot read the template"):
        make_scorer(f"vlm:{fake.url},m,{tmp_path}/none.txt")


def test_what_cannot_be_a_judge_is_refused() -> None:
    for name in ("vlm:x,m", "vlm:http://x", "vlm"):
        with pytest.raises(ConfigError, match=r"address|vlm:"):
            make_scorer(name)
    with pytest.raises(ConfigError, match=r"no \{prompt\}"):
        VQAScore(Endpoint(Address("http://x"), "m"), "is it good?")


def wider(images: list[Image.Image], text: str) -> dict[str, Any]:
    return said("first" if images[0].width > images[1].width else "second" if images[0].width < images[1].width else "?")


def test_wins_are_shares_of_a_groups_other_pictures(fake: Fake) -> None:
    """By who is wider: 1, one half and 0 of three; a tie says nothing; groups do not meet."""
    fake.answer = wider
    sizes, prompts = [16, 48, 32, 16, 16], ["p", "p", "p", "q", "r"]
    scorer = make_scorer(f"vlm-wins:{fake.url},m")
    found = scorer(ScoreInput([picture(i, n) for i, n in enumerate(sizes)], prompts))
    assert found.values["vlm-wins"][:3].tolist() == [0.0, 1.0, 0.5]
    assert len(fake.asked) == 2 * 3  # all pairs of the group, in both orders
    alone = "no other picture of its prompt in the batch"
    assert found.errors == [None, None, None, alone, alone]
    again = scorer(ScoreInput([picture(0, 32), picture(1, 32), picture(2, 16)], ["p"] * 3))
    # of the two alike no verdict was read: each of them has one of two pairs
    assert again.values["vlm-wins"].tolist() == [1.0, 1.0, 0.0]
    few = scorer(ScoreInput([picture(i, n) for i, n in enumerate([32, 32, 32, 32, 16])], ["p"] * 5))
    assert few.values["vlm-wins"].isnan().tolist() == [True] * 4 + [False]  # one of four
    assert "neither first nor second" in str(few.errors[0])
    nothing = scorer(ScoreInput([picture(0), picture(1)], ["p"] * 2))
    assert nothing.values["vlm-wins"].isnan().all()
    assert "neither first nor second: '?'" in str(nothing.errors[0])


def test_wins_in_unifiedrewards_words(fake: Fake) -> None:
    fake.answer = lambda images, text: said(f"Well. Image {1 if images[0].width > images[1].width else 2} is better")
    found = make_scorer(f"unifiedreward-wins:{fake.url},m")(ScoreInput([picture(0, 16), picture(1, 48)], ["a {x}"] * 2))
    assert found.values["unifiedreward-wins"].tolist() == [0.0, 1.0]
    assert '"a {x}"' in fake.asked[0]["messages"][0]["content"][-1]["text"]


def test_a_judge_of_pairs_rewards_whole_groups(fake: Fake, tiny: Path, tmp_path: Path) -> None:
    """In training: every group's mean is one half, what is not answered stops the run, and nothing else takes it."""
    judge, alone = f"vlm-wins:{fake.url},m", r"which only online\.reward has together"
    reward = {"scorers": [judge], "weights": {"vlm-wins": 1.0}}

    def sections(name: str, **more: Any) -> dict[str, Any]:
        return small(tiny, tmp_path / name, online=online(reward=reward, **more).model_dump(), train={"max_steps": 1})

    fake.answer = lambda images, text: said("first" if sum(images[0].tobytes()) > sum(images[1].tobytes()) else "second")
    run = train(validate(TrainConfig, sections("run") | {"watch": {"num_prompts": 1, "images_per_prompt": 2}}))
    lines = read_metrics(run.folder)
    assert [x["rollout/vlm-wins"] for x in lines if "rollout/vlm-wins" in x] == [0.5]
    assert any(x["rollout/reward_std"] > 0.1 for x in lines if "rollout/reward_std" in x)
    assert not any("watch/reward" in x for x in lines)
    fake.answer = lambda images, text: said("neither")
    with pytest.raises(DiffalignError, match="neither first nor second"):
        train(validate(TrainConfig, sections("failed")))
    wrong: list[dict[str, Any]] = [{"rollout": {"batch_size": 1}}, {"advantages": {"shaping": "par"}}]
    wrong += [{"reward": {**reward, "on_error": "retry"}}, {"oversample": {"candidates": 4, "steps": 1}}]
    for change in wrong:
        with pytest.raises(ConfigError, match=r"vlm-wins:.* compares"):
            validate(TrainConfig, sections("wrong") | {"online": online(**{"reward": reward, **change}).model_dump()})
    with pytest.raises(ConfigError, match=r"watch\.limits\.reward is about single ones"):
        validate(TrainConfig, sections("wrong") | {"watch": {"limits": {"reward": {"below": 0}}}})
    with pytest.raises(ConfigError, match="no scorer gives 'vlm_wins'"):
        validate(
            TrainConfig, sections("wrong") | {"online": online(reward=reward | {"weights": {"vlm_wins": 1}}).model_dump()}
        )
    with pytest.raises(ConfigError, match=alone):
        train(validate(TrainConfig, sections("wrong") | {"evaluate": {"scorers": [judge]}}))
    with pytest.raises(ConfigError, match=alone):
        score(ScoreConfig(path=str(tmp_path), scorers=[f"minimum:shapes|{judge}"], output_dir=str(tmp_path / "scored")))
    with pytest.raises(ConfigError, match=alone):
        ScorerServer([judge], "secret", port=0)
    assert not (tmp_path / "wrong").exists()
