"""How published preference datasets are written: one pure function from a row to comparisons, or to the reason for none.

The layouts are those of the dataset cards and of the code that trains on them; docs/data.md says which defects are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any

from diffalign.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    """One picture of a comparison: an id that is stable over the dataset, and bytes, ``{bytes, path}`` or a path."""

    id: str | None
    image: Any
    model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one prompt; ``p_win`` of the first is 0.5 to 1."""

    prompt: str
    chosen: Side
    rejected: Side
    p_win: float = 1.0
    margins: Mapping[str, float] = field(default_factory=dict)
    user: str | None = None
    group: str | None = None
    category: str | None = None
    rejected_prompt: str | None = None
    """Where the loser has a caption of its own."""
    second: bool | None = None
    """Whether another column of the row says the same about who won; None where none does."""


@dataclass(frozen=True)
class Rated:
    """One picture with what people said of it alone."""

    prompt: str
    side: Side
    scores: Mapping[str, float]
    """By the name that they get in the scores table; higher is better."""
    maps: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded pictures that say where something is wrong, by kind."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Words of the prompt that it does not show, by kind."""


@dataclass(frozen=True)
class Layout:
    """One way of writing preferences."""

    read: Callable[[Row], Iterator[Comparison | Rated | str]]
    """Comparisons and ratings of a row; a string is a reason for a missing one."""
    files: tuple[str, ...]
    """Patterns in a folder, in order of preference."""
    pictures: tuple[str, ...] = ()
    """Columns that hold pictures."""
    columns: tuple[str, ...] = ()
    """The other columns that are read; all if empty."""
    gather: str | None = None
    """Rows with the same value here are read together, as ``{"rows": [...]}``."""
    licence: str | None = None
    needs: tuple[tuple[str, ...], ...] = ()
    """Columns without which no row says anything; of each tuple one."""

    def check(self, rows: Sequence[Row], where: str, skip: Sequence[str] = ()) -> None:
        """Look at the first rows of a source.

        Raises:
            DataError: none of them has a column that is needed.
        """
        there = list(dict.fromkeys(str(name) for row in rows for name in row))
        for names in self.needs:
            if rows and not any(n in there or n in skip for n in names):
                raise DataError(
                    f"{where}: no column {' or '.join(map(repr, names))}; found {', '.join(there) or 'none that is read'}",
                    hint="name the columns as the format does, or choose another: diffalign list formats",
                )


def _compare(
    prompt: Any,
    sides: Sequence[Side],
    p_first: float,
    margins: Mapping[str, float] | None = None,
    captions: Sequence[str] | None = None,
    **more: Any,
) -> Comparison | str:
    """The comparison with its winner in front; margins are those of the first side over the second."""
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt"
    if not 0 <= p_first <= 1:  # also of nan
        return "no label"
    if sides[0].id is not None and sides[0].id == sides[1].id and (captions is None or captions[0] == captions[1]):
        return "the same picture twice"
    margins = {k: v for k, v in (margins or {}).items() if math.isfinite(v)}
    if p_first < 0.5:
        sides, p_first, captions = sides[::-1], 1 - p_first, captions[::-1] if captions else None
        margins = {k: -v for k, v in margins.items()}
    if captions:
        prompt, more["rejected_prompt"] = captions
    return Comparison(prompt.strip(), sides[0], sides[1], p_first, margins, **more)


def _number(value: Any) -> float:
    """NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


# --- layouts --------------------------------------------------------------------------------------------------------------


def pickapic(row: Row) -> Iterator[Comparison | str]:
    """``label_0`` + ``label_1`` = 1, ties at 0.5; also MaPO's sets and Pick-Double-Caption (``caption_0``, ``caption_1``)."""
    labels = [_number(row.get(f"label_{i}")) for i in (0, 1)]
    if row.get("has_label") is False or not all(map(math.isfinite, labels)):
        yield "no label"
        return
    if row.get("are_different") is False:
        yield "the same picture twice"
        return
    if abs(sum(labels) - 1) > 1e-6:
        yield "labels do not sum to 1"
        return
    sides = [Side(_text(row.get(f"image_{i}_uid")), row.get(f"jpg_{i}"), _text(row.get(f"model_{i}"))) for i in (0, 1)]
    best, second = row.get("best_image_uid"), None
    if labels[0] != 0.5 and best in (sides[0].id, sides[1].id) and best is not None:
        second = (best == sides[0].id) == (labels[0] > 0.5)
    captions = (row["caption_0"], row["caption_1"]) if row.get("caption_0") and row.get("caption_1") else None
    prompt = captions[0] if captions else row.get("caption") or row.get("prompt")
    yield _compare(prompt, sides, labels[0], captions=captions, user=_text(row.get("user_id")), second=second)


def hpdv1(row: Row) -> Iterator[Comparison | str]:
    """``human_preference`` is the position of the best of ``file_path``."""
    files, best = row.get("file_path") or [], row.get("human_preference")
    if not isinstance(best, int) or isinstance(best, bool) or not 0 <= best < len(files):
        yield "no label"
        return
    for file in files[:best] + files[best + 1 :]:
        yield _compare(
            row.get("prompt"), (Side(files[best], files[best]), Side(file, file)), 1.0, user=_text(row.get("user_hash"))
        )


def hpdv2(row: Row) -> Iterator[Comparison | str]:
    """Training: ``human_preference`` [1, 0] over two of ``file_path``. Test: ``rank`` over ``image_path``, 1 is the best."""
    if "rank" in row:
        files, ranks = row.get("image_path") or [], row["rank"] or []
        said = [a.get("rank") for a in row.get("raw_annotations") or [] if isinstance(a, Mapping)]
        raw = [[_number(r[i]) for r in said if r and len(r) == len(files)] for i in range(len(files))]
        yield from _ranked(
            row.get("prompt"), [Side(f, f) for f in files], ranks, [-math.fsum(r) for r in raw] if said else None
        )
        return
    files, won = row.get("file_path") or [], row.get("human_preference")
    if len(files) != 2 or not isinstance(won, Sequence) or sorted(map(_number, won)) != [0, 1]:
        yield "no label"
        return
    yield _compare(row.get("prompt"), [Side(f, f) for f in files], _number(won[0]))


def hpdv3(row: Row) -> Iterator[Comparison | str]:
    """``path1`` is always the preferred one; ``choice_dist`` has the votes, ``confidence`` what the annotators are worth."""
    votes = [_number(v) for v in row.get("choice_dist") or []]
    p = max(votes) / math.fsum(votes) if votes and math.fsum(votes) > 0 else 1.0
    sides = [Side(_text(row.get(f"path{i}")), row.get(f"path{i}"), _text(row.get(f"model{i}"))) for i in (1, 2)]
    yield _compare(row.get("prompt"), sides, p, {"confidence": _number(row.get("confidence"))})


def imagerewarddb(row: Row) -> Iterator[Comparison | str]:
    """The images of one ``prompt_id``; ``rank`` 1 is the best and may be shared, the ratings are higher for better."""
    rows = row["rows"]
    sides = [Side(_text(r.get("image_path")), r.get("image_path")) for r in rows]
    names = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
    dims = {n: [_number(r.get(n)) for r in rows] for n in names}
    ranks = [r.get("rank") for r in rows]
    yield from _ranked(
        rows[0].get("prompt"), sides, ranks, dims["overall_rating"], dims, category=_text(rows[0].get("classification"))
    )


def _ranked(
    prompt: Any,
    sides: Sequence[Side],
    ranks: Sequence[Any],
    second: Sequence[float] | None,
    dims: Mapping[str, Sequence[float]] | None = None,
    **more: Any,
) -> Iterator[Comparison | str]:
    """All pairs of a ranking in which 1 is the best; equal ranks are ties. ``second`` is higher for better."""
    if len(ranks) != len(sides) or not all(math.isfinite(_number(r)) for r in ranks):
        yield "no label"
        return
    for i, j in combinations(range(len(sides)), 2):
        gap = _number(ranks[j]) - _number(ranks[i])
        margins = {"rank": gap} | {n: v[i] - v[j] for n, v in (dims or {}).items()}
        said = second[i] - second[j] if second is not None else math.nan
        agrees = (said > 0) == (gap > 0) if gap and math.isfinite(said) and said else None
        yield _compare(prompt, (sides[i], sides[j]), 0.5 if gap == 0 else float(gap > 0), margins, second=agrees, **more)


def rapidata(row: Row) -> Iterator[Comparison | str]:
    """Soft and per dimension: ``weighted_results_image1_preference`` and so on, or ``votes_image1``."""
    shares: dict[str, float] = {}
    for name in row:
        if name.startswith("weighted_results_image1_"):
            dim = name.removeprefix("weighted_results_image1_")
            shares[dim] = _share(row[name], row.get(f"weighted_results_image2_{dim}"))
    votes = _share(row.get("votes_image1"), row.get("votes_image2"))
    p = shares.get("preference", votes)
    if not math.isfinite(p):
        p = next((v for v in shares.values() if math.isfinite(v)), math.nan)
    paths = [row.get(f"image{i}_path") for i in (1, 2)]
    sides = [Side(_text(paths[i - 1]), row.get(f"image{i}"), _text(row.get(f"model{i}"))) for i in (1, 2)]
    second = (votes > 0.5) == (p > 0.5) if math.isfinite(votes) and 0.5 not in (votes, p) and shares else None
    margins = {dim: round(2 * share - 1, 6) for dim, share in shares.items()}
    yield _compare(row.get("prompt"), sides, p, margins, second=second, category=_text(row.get("category")))


def _share(a: Any, b: Any) -> float:
    x, y = _number(a), _number(b)
    return x / (x + y) if x >= 0 and y >= 0 and x + y > 0 else math.nan


def visionprefer(row: Row) -> Iterator[Comparison | str]:
    """``images``: a list of {image, model, scores: {aspect: 1 to 5}}; all pairs by the mean of the aspects."""
    images = [i for i in row.get("images") or [] if isinstance(i, Mapping)]
    if len(images) < 2:
        yield "fewer than two pictures"
    for a, b in combinations(images, 2):
        x, y = (dict(i.get("scores") or {}) for i in (a, b))
        dims = {n: gap for n in x if n in y and math.isfinite(gap := _number(x[n]) - _number(y[n]))}
        gap = math.fsum(dims.values())
        p = math.nan if not dims else 0.5 if gap == 0 else float(gap > 0)
        found = [i.get("image", i.get("path")) for i in (a, b)]
        sides = [Side(f if isinstance(f, str) else None, f, _text(i.get("model"))) for f, i in zip(found, (a, b), strict=True)]
        yield _compare(row.get("prompt"), sides, p, dims)


RICHHF = ("overall", "aesthetics", "artifact", "misalignment")


def richhf(row: Row) -> Iterator[Comparison | Rated | str]:
    """RichHF-18K: four scores, all higher for better, two heatmaps and a label per word, 0 for what the picture lacks.

    ``prompt`` and ``image`` come from Pick-a-Pic by the name of the file. All pairs of a prompt by the overall score.
    """
    found: list[tuple[Side, dict[str, float]]] = []
    for r in row["rows"]:
        name, prompt = _decoded(r.get("filename")), _decoded(r.get("prompt") or r.get("caption"))
        scores = {n: _number(r.get(f"{n}_score")) for n in RICHHF}
        if r.get("error"):
            yield str(r["error"])
        elif not name:
            yield "no file name"
        elif not prompt:
            yield "no prompt: Pick-a-Pic has no such picture"
        elif not math.isfinite(scores["overall"]):
            yield "no label"
        else:
            side = Side(PurePosixPath(name).stem, r.get("image"), _text(r.get("model")))
            words = _lacking(prompt, _decoded(r.get("prompt_misalignment_label")))
            if words is None:
                yield "labels of words that are not those of the prompt"
            maps = {f"richhf/{n}": m for n in RICHHF[2:] if (m := _encoded(r.get(f"{n}_map"))) is not None}
            finite = {f"richhf/{n}": v for n, v in scores.items() if math.isfinite(v)}
            yield Rated(prompt, side, finite, maps, {"richhf/misalignment": words} if words else {})
            found.append((side, scores))
    for (a, x), (b, y) in combinations(found, 2):
        gaps = {n: x[n] - y[n] for n in RICHHF}
        overall, others = gaps["overall"], math.fsum(gaps[n] for n in RICHHF[1:])
        second = (others > 0) == (overall > 0) if overall and others and math.isfinite(others) else None
        p = 0.5 if overall == 0 else float(overall > 0)
        yield _compare(_decoded(row["rows"][0].get("prompt") or row["rows"][0].get("caption")), (a, b), p, gaps, second=second)


def _decoded(value: Any) -> str | None:
    return _text(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)


def _encoded(value: Any) -> bytes | None:
    value = value.get("bytes") if isinstance(value, Mapping) else value
    return value if isinstance(value, bytes) and value else None


def _lacking(prompt: str, labels: str | None) -> list[str] | None:
    """The words that are labelled 0; None where there are not as many labels as words (split as the authors do)."""
    words = [w for w in re.split(r'[,.?!":; ]', prompt) if w]
    said = (labels or "").split()
    if len(said) != len(words) or not set(said) <= {"0", "1"}:
        return None
    return [w for w, label in zip(words, said, strict=True) if label == "0"]


def chosen_rejected(row: Row) -> Iterator[Comparison | str]:
    """TRL's columns: ``prompt``, ``chosen``, ``rejected``; ``p_win``, ``score_chosen`` and ``score_rejected`` if there are.

    With ``rejected_prompt`` the loser has a caption of its own, and may be the same picture.
    """
    sides = []
    for side in ("chosen", "rejected"):
        image = row.get(side)
        image = image[0] if isinstance(image, list) and len(image) == 1 else image
        name = image if isinstance(image, str) else None
        sides.append(Side(name, image, _text(row.get(f"{side}_model") or row.get(f"model_{side}"))))
    p = 1.0 if row.get("p_win") in (None, "") else _number(row["p_win"])
    scores = [_number(row.get(f"score_{side}")) for side in ("chosen", "rejected")]
    gap = scores[0] - scores[1]
    second = gap > 0 if math.isfinite(gap) and gap else None
    who: dict[str, Any] = {n: _text(row.get(n)) for n in ("user", "group", "category")}
    prompt, other = row.get("prompt") or row.get("caption"), row.get("rejected_prompt")
    captions = None
    if isinstance(prompt, str) and isinstance(other, str) and other.strip():
        captions = (prompt.strip(), other.strip())
    yield _compare(prompt, sides, p, {"score": gap}, captions=captions, second=second, **who)


PAIRED = (("prompt", "caption"), ("chosen",), ("rejected",))


LAYOUTS = {
    "pickapic": Layout(
        pickapic, ("*.parquet",), ("jpg_0", "jpg_1"),
        ("caption", "prompt", "caption_0", "caption_1", "label_0", "label_1", "has_label", "are_different", "best_image_uid",
         "image_0_uid", "image_1_uid", "model_0", "model_1", "user_id"),
        needs=(("caption", "prompt", "caption_0"), ("label_0",), ("label_1",), ("jpg_0",), ("jpg_1",)),
    ),
    "hpdv1": Layout(hpdv1, ("preference_train.json", "preference_*.json", "*.json"), ("file_path",), licence="cc-by-4.0"),
    "hpdv2": Layout(hpdv2, ("train.json", "*.json"), ("file_path", "image_path"), licence="apache-2.0"),
    "hpdv3": Layout(hpdv3, ("train.json", "*.json", "*.jsonl"), ("path1", "path2"), licence="mit"),
    "imagerewarddb": Layout(
        imagerewarddb, ("metadata-train.parquet", "metadata*.parquet", "*.parquet"), ("image_path",), gather="prompt_id",
        licence="apache-2.0",
    ),
    "open-image-preferences": Layout(
        chosen_rejected, ("*.parquet",), ("chosen", "rejected"), licence="apache-2.0", needs=PAIRED
    ),
    "rapidata": Layout(rapidata, ("*.parquet",), ("image1", "image2")),
    "richhf": Layout(richhf, ("train.tfrecord", "*.tfrecord", "*.parquet"), ("image",), gather="prompt"),
    "visionprefer": Layout(visionprefer, ("*.jsonl", "*.json"), ("images",)),
    "trl": Layout(chosen_rejected, ("*.parquet", "*.jsonl", "*.csv", "*.json"), ("chosen", "rejected"), needs=PAIRED),
}  # fmt: skip
"""Pick-a-Pic v1 and v2, MaPO's sets and Pick-Double-Caption share ``pickapic``."""
