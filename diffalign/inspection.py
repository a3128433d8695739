"""``diffalign data show``, ``stats`` and ``validate``: what a dataset folder holds, and what is wrong with it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.curation import column
from diffalign.data.album import Album
from diffalign.data.grouped import coded
from diffalign.data.tables import read_manifest, schemas, shards_of
from diffalign.errors import DataError


def show_dataset(folder: Path, rows: int = 3) -> dict[str, Any]:
    """Tables with their rows, shards and bytes, the plans of the manifest, and the first pairs."""
    import pyarrow.parquet as pq

    tables = {}
    for table in schemas():
        if found := shards_of(folder, table):
            count = sum(pq.read_metadata(f).num_rows for f in found)
            tables[table] = {"rows": count, "shards": len(found), "bytes": sum(f.stat().st_size for f in found)}
    if not tables:
        raise DataError(f"{folder}: not a dataset folder", hint="it holds images/, pairs/ and manifest.json")
    names = ("pair_id", "prompt", "chosen_id", "rejected_id", "p_win", "margins", "source", "rejected_prompt")
    first = column(folder, "pairs", names).slice(0, rows).to_pylist() if "pairs" in tables else []
    plans = (read_manifest(folder) or {}).get("plans", {})
    return {"folder": str(folder), "tables": tables, "plans": plans, "pairs": first}


def show_lines(said: dict[str, Any]) -> list[str]:
    """For people."""
    out = [f"{t}/: {s['rows']} rows in {s['shards']} shards, {s['bytes'] / 1e6:.1f} MB" for t, s in said["tables"].items()]
    for p in said["pairs"]:
        margins = f", {p['margins']}" if p["margins"] not in (None, "", "{}") else ""
        out += [f"{p['prompt']!r}", f"  {p['chosen_id']} > {p['rejected_id']}, p_win {p['p_win']}{margins}"]
        out += [f"  the loser's caption: {p['rejected_prompt']!r}"] if p["rejected_prompt"] else []
    return out


def stats_of(folder: Path) -> dict[str, Any]:
    """Counts and distributions of the pairs and the images, by Arrow's columns; no picture is read."""
    pairs = column(folder, "pairs", ("prompt", "chosen_id", "rejected_id", "p_win", "margins", "user", "source", "rule"))
    images = column(folder, "images", ("image_id", "model", "licence", "category", "width", "height", "phash"))
    p_win = pairs["p_win"].fill_null(1.0).to_numpy()
    prompts, codes = coded(pairs["prompt"])
    per_prompt = np.bincount(codes[codes >= 0], minlength=1)
    edges = np.linspace(0.5, 1, 6).tolist()
    counts = np.histogram(p_win, edges)[0].tolist()
    sizes = zip(images["width"].to_pylist(), images["height"].to_pylist(), strict=True)
    return {
        "pairs": len(pairs), "prompts": len(prompts), "images": len(images), "ties": int((p_win == 0.5).sum()),
        "p_win": {f"{low:.1f} to {low + 0.1:.1f}": n for low, n in zip(edges, counts, strict=False)},
        "pairs_per_prompt": {"mean": float(per_prompt.mean()), "most": int(per_prompt.max())},
        "margins": _margins(pairs["margins"].to_pylist()), "users": len(coded(pairs["user"])[0]),
        "models": _counts(images["model"].to_pylist()), "licences": _counts(images["licence"].to_pylist()),
        "categories": _counts(images["category"].to_pylist()), "sources": _counts(pairs["source"].to_pylist()),
        "sizes": _counts([f"{w}x{h}" if w else None for w, h in sizes]),
        "blank": images["phash"].to_pylist().count("blank"), "wins": _wins(pairs, images), "agreement": agreement(folder),
    }  # fmt: skip


def _counts(values: Sequence[str | None]) -> dict[str, int]:
    return {"unknown" if name is None else name: n for name, n in Counter(values).most_common(20)}


def _margins(texts: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Mean of each margin, and the share above 0."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for text in texts:
        for name, value in (json.loads(text) if text else {}).items():
            s = sums[name]
            s[0], s[1], s[2] = s[0] + 1, s[1] + value, s[2] + (value > 0)
    return {n: {"pairs": int(c), "mean": total / c, "above_0": over / c} for n, (c, total, over) in sums.items()}


def _wins(pairs: Any, images: Any) -> dict[str, dict[str, float]]:
    """By model: the share of its comparisons with other models that it won; ties count one half."""
    models = dict(zip(images["image_id"].to_pylist(), images["model"].to_pylist(), strict=True))
    won: dict[str, float] = defaultdict(float)
    met: Counter[str] = Counter()
    ends = (pairs[c].to_pylist() for c in ("chosen_id", "rejected_id", "p_win"))
    for a, b, p in zip(*ends, strict=True):
        x, y = models.get(a), models.get(b)
        if x is None or y is None or x == y:
            continue
        met.update((x, y))
        won[x] += 0.5 if p == 0.5 else 1
        won[y] += 0.5 if p == 0.5 else 0
    return {m: {"comparisons": n, "won": won[m] / n} for m, n in met.most_common(20)}


def stats_lines(said: dict[str, Any]) -> list[str]:
    """For people."""
    out = [f"{said['pairs']} pairs ({said['ties']} ties) of {said['prompts']} prompts, {said['images']} images"]
    out.append(f"pairs a prompt: mean {said['pairs_per_prompt']['mean']:.2f}, at most {said['pairs_per_prompt']['most']}")
    out += [f"p_win {k}: {v}" for k, v in said["p_win"].items() if v]
    out += [f"margin {n}: mean {m['mean']:.4f}, above 0 in {m['above_0']:.1%}" for n, m in said["margins"].items()]
    for name in ("models", "sources", "licences", "categories", "sizes"):
        if set(said[name]) - {"unknown"}:
            out.append(f"{name}: " + ", ".join(f"{k} ({v})" for k, v in said[name].items()))
    out += [f"{m} won {w['won']:.3f} of {w['comparisons']} against others" for m, w in said["wins"].items()]
    out += [f"{said['users']} users"] if said["users"] else []
    if (a := said["agreement"]) is not None:
        out.append(
            f"{a['raters']} raters, {a['items']} items seen by several: agreement {a['observed']:.3f}, alpha {a['alpha']:.3f}"
        )
    return out + ([f"{said['blank']} blank images"] if said["blank"] else [])


# --- validate -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something about a dataset, how often, and where for the first time."""

    what: str
    count: int
    example: str
    wrong: bool = True
    """False for what may be meant so."""


def validate_dataset(folder: Path, pictures: bool = False) -> list[Finding]:
    """Everything that is wrong or odd with the tables; with ``pictures`` each is decoded and compared with its hash.

    Raises:
        DataError: a shard cannot be read, or there are no pairs.
    """
    if not shards_of(folder, "pairs"):
        raise DataError(f"{folder}: no table pairs/", hint="`diffalign pairs` and `import` make it")
    return [f for f in (*_of_pairs(folder), *(_of_pictures(folder) if pictures else ())) if f.count]


def _of_pairs(folder: Path) -> Iterator[Finding]:
    import pyarrow as pa
    import pyarrow.compute as pc

    pairs = column(folder, "pairs", ("pair_id", "prompt", "chosen_id", "rejected_id", "p_win", "rejected_prompt"))
    images = column(folder, "images", ("image_id", "sha256", "prompt", "error"))
    ids = pairs["pair_id"]

    def found(what: str, mask: Any, names: Any = ids, wrong: bool = True) -> Finding:
        mask = pc.fill_null(mask, True)
        count = pc.sum(mask).as_py() or 0
        example = names.filter(mask)[0].as_py() if count else ""
        return Finding(what, count, f"{'pair' if names is ids else 'image'} {example}", wrong)

    known = images["image_id"]
    place: dict[str, Any] = {}
    for side in ("chosen_id", "rejected_id"):
        place[side] = pc.index_in(pairs[side], value_set=known.combine_chunks(), skip_nulls=True)
        yield found(f"pairs whose {side} is not in images/", pc.is_null(place[side]))
    same = pc.equal(pc.coalesce(pairs["rejected_prompt"], pairs["prompt"]), pairs["prompt"])
    itself = pc.fill_null(pc.equal(pairs["chosen_id"], pairs["rejected_id"]), False)
    alone = pc.and_(itself, pc.fill_null(same, True))
    yield found("pairs of a picture with itself", alone)
    p = pc.fill_null(pairs["p_win"], 1.0)
    yield found("pairs with p_win outside of 0.5 to 1", pc.invert(pc.and_(pc.greater_equal(p, 0.5), pc.less_equal(p, 1.0))))
    yield found("pairs without a prompt", pc.equal(pc.utf8_trim_whitespace(pc.fill_null(pairs["prompt"], "")), ""))
    _, codes = coded(ids)
    again = np.ones(len(codes), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    yield found("pairs with the id of another", pa.chunked_array([pa.array(again)]))
    of_chosen = images["prompt"].take(place["chosen_id"])
    other = pc.and_(
        pc.not_equal(pc.fill_null(of_chosen, pairs["prompt"]), pairs["prompt"]), pc.is_null(pairs["rejected_prompt"])
    )
    yield found("pairs whose winner was made for another prompt", pc.fill_null(other, False), wrong=False)
    forth, back = (
        pc.binary_join_element_wise(*(pc.fill_null(pairs[c], "") for c in (*sides, "prompt")), "\n")
        for sides in (("chosen_id", "rejected_id"), ("rejected_id", "chosen_id"))
    )
    opposed = pc.and_(pc.and_not(pc.is_in(forth, value_set=back.combine_chunks()), itself), pc.greater(p, 0.5))
    yield found("pairs that another contradicts", opposed, wrong=False)
    names, codes = coded(known)
    _, hashes = coded(images["sha256"])
    rows = np.unique(np.stack([codes, hashes]), axis=1)[0] if len(codes) else codes
    twice = np.bincount(rows, minlength=len(names))[codes] > 1 if len(codes) else codes.astype(bool)
    yield found("image ids that stand for several pictures", pa.chunked_array([pa.array(twice, pa.bool_())]), known)
    yield found("images that could not be read", pc.is_valid(images["error"]), known, wrong=False)
    yield found("images without a hash, imported without pictures", pc.is_null(images["sha256"]), known, wrong=False)


def _of_pictures(folder: Path) -> Iterator[Finding]:
    from diffalign.data.images import decode, sha256

    album = Album(folder)
    hashes = column(folder, "images", ("image_id", "sha256"))
    bad: list[str] = []
    changed: list[str] = []
    for name, digest in zip(hashes["image_id"].to_pylist(), hashes["sha256"].to_pylist(), strict=True):
        try:
            data = album.read(name)
            decode(data, name)
        except DataError:
            bad.append(name)
            continue
        if digest is not None and sha256(data) != digest:
            changed.append(name)
    yield Finding("pictures that cannot be read", len(bad), f"image {bad[0]}" if bad else "")
    yield Finding("pictures that are not those of their hash", len(changed), f"image {changed[0]}" if changed else "")


def validate_lines(found: Sequence[Finding]) -> list[str]:
    """For people."""
    return [f"{'WRONG' if f.wrong else 'note '} {f.count} {f.what}; the first: {f.example}" for f in found] or [
        "nothing is wrong"
    ]


def agreement(folder: Path) -> dict[str, Any] | None:
    """How far raters agree on the same two pictures of one prompt; None where no pair was seen by two.

    ``observed`` is the share of pairs of ratings of one item that say the same; ``alpha`` is Krippendorff's for nominal
    data: 1 - D_o / D_e, 1 is perfect, 0 chance (Hayes & Krippendorff 2007).
    """
    pairs = column(folder, "pairs", ("prompt", "chosen_id", "rejected_id", "p_win", "user", "annotator"))
    items: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    raters = set()
    for row in pairs.to_pylist():
        who = row["user"] or row["annotator"]
        if who is None:
            continue
        a, b = sorted((row["chosen_id"], row["rejected_id"]))
        items[row["prompt"], a, b].append(0 if row["p_win"] == 0.5 else 1 if row["chosen_id"] == a else -1)
        raters.add(who)
    rated = [v for v in items.values() if len(v) > 1]
    if not rated:
        return None
    same = sum(sum(c * (c - 1) for c in Counter(v).values()) for v in rated)
    both = sum(len(v) * (len(v) - 1) for v in rated)
    total = Counter(x for v in rated for x in v)
    n = sum(total.values())
    # coincidences: each item's ordered pairs of ratings, weighted by 1 / (ratings - 1)
    disagree = sum((len(v) * (len(v) - 1) - sum(c * (c - 1) for c in Counter(v).values())) / (len(v) - 1) for v in rated)
    expected = (n * n - sum(c * c for c in total.values())) / (n - 1)
    return {
        "raters": len(raters), "items": len(rated), "observed": same / both,
        "alpha": 1 - disagree / expected if expected else math.nan,
    }  # fmt: skip
