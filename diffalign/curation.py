"""``diffalign data split``, ``merge`` and ``dedup``: dataset folders from dataset folders, shard by shard and resumable."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffalign.data.duplicates import near
from diffalign.data.grouped import Ints, coded
from diffalign.data.prompts import normalised
from diffalign.data.tables import conform, fingerprint, run_shards, schemas, shards_of
from diffalign.errors import ConfigError, DataError
from diffalign.seeds import uniform_of

MAPS = ("kind", "region", "segments")
"""Columns that training reads of a table of one's own, and that dataset folders do not keep."""
Rewrite = Callable[[str, int, Any], Any]
"""(table, source, rows) -> rows."""


def rewrite(
    sources: Sequence[Path],
    out: Path,
    plan: Mapping[str, Any],
    change: Rewrite,
    pictures: bool = True,
    tables: Sequence[str] = (),
) -> dict[str, int]:
    """Every shard of every source through ``change``, as a shard of ``out``; returns rows by table.

    Raises:
        DataError: ``out`` is one of the sources or holds something else, a shard cannot be read, or a column would be lost.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.resolve() in [s.resolve() for s in sources]:
        raise DataError(f"{out} is the source as well", hint="choose another folder")
    counts = {}
    for table in tables or ("images", "scores", "annotations", "embeddings", "groups", "pairs"):
        found = [(n, f) for n, source in enumerate(sources) for f in shards_of(source, table)]
        if not found:
            continue

        def make(i: int, found: Sequence[tuple[int, Path]] = found, table: str = table) -> Any:
            n, file = found[i]
            try:
                there = pq.ParquetFile(file)
                names = there.schema_arrow.names
                if lost := [c for c in MAPS if c in names and c not in schemas()[table].names]:
                    raise DataError(f"{file}: its column {lost[0]} would be lost", hint="train on it as it is, or drop that")
                columns = [c for c in names if pictures or c != "image"]
                return change(table, n, conform(there.read(columns=columns), table))
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{file}: not a readable Parquet shard: {e}", hint="delete it and run again") from e

        marks = [fingerprint(s, shards_of(s, table)) for s in sources]
        run_shards(out, table, {**plan, "sources": [str(s) for s in sources], "fingerprint": marks}, len(found), make)
        counts[table] = sum(pq.read_metadata(f).num_rows for f in shards_of(out, table))
    return counts


def column(folder: Path, table: str, names: Sequence[str]) -> Any:
    """Columns of a table of a folder, without the others; null where a shard lacks one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([schemas()[table].field(n) for n in names])
    parts = [schema.empty_table()]
    for file in shards_of(folder, table):
        try:
            there = pq.ParquetFile(file)
            part = there.read(columns=[n for n in names if n in there.schema_arrow.names])
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{file}: not a readable Parquet shard: {e}", hint="delete it and run again") from e
        columns = [part[f.name] if f.name in part.column_names else pa.nulls(len(part), f.type) for f in schema]
        parts.append(pa.table(columns, names=list(names)).cast(schema))
    return pa.concat_tables(parts)


# --- split ----------------------------------------------------------------------------------------------------------------


def split_dataset(
    folder: Path,
    out: Path,
    shares: Mapping[str, float],
    by: Literal["prompt", "user"] = "prompt",
    salt: str = "split",
    pictures: bool = True,
) -> dict[str, dict[str, int]]:
    """Dataset folders ``out/NAME`` with about these shares of the pairs; returns their rows by table.

    Prompts that read the same but for case, punctuation and spaces fall on one side, as do prompts that share an image or a
    caption of a loser's own (by ``user``: users alone are kept together). The side is a hash of the smallest of them, so more
    data move nothing that is not joined by it.

    Raises:
        ConfigError: shares that do not sum to 1.
        DataError: no pairs, or a pair without a user.
    """
    import pyarrow as pa

    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) <= 0:
        raise ConfigError(f"the shares {', '.join(f'{k}={v:g}' for k, v in shares.items())} must be positive and sum to 1")
    pairs = column(folder, "pairs", ("prompt", "user", "chosen_id", "rejected_id", "rejected_prompt"))
    if not len(pairs):
        raise DataError(f"{folder}: no pairs to split")
    names, codes = coded(pairs[by])
    if (codes < 0).any():
        raise DataError(f"{folder}/pairs: {int((codes < 0).sum())} pairs have no {by}", hint="split by prompt")
    keys = [normalised(n) if by == "prompt" else n for n in names]
    part_of = _parts(keys, codes, pairs if by == "prompt" else None, shares, salt)
    owner = dict(zip(names, part_of, strict=True))
    prompts = {normalised(p): owner[p] for p in names} if by == "prompt" else {}
    images = {}
    for name in shares:
        mine = pa.array([owner[n] == name for n in names]).take(pa.array(codes))
        used = pairs.filter(mine)
        images[name] = {*used["chosen_id"].to_pylist(), *used["rejected_id"].to_pylist()}

    counts = {}
    for name in shares:

        def change(table: str, _: int, rows: Any, name: str = name) -> Any:
            if table == "pairs":
                return rows.filter(pa.array([owner.get(x) == name for x in rows[by].to_pylist()], pa.bool_()))
            if table == "groups" and by == "prompt":
                return rows.filter(
                    pa.array([prompts.get(normalised(p)) == name for p in rows["prompt"].to_pylist()], pa.bool_())
                )
            if table == "images":
                return rows.filter(pa.array([i in images[name] for i in rows["image_id"].to_pylist()], pa.bool_()))
            return rows

        plan = {"split": dict(shares), "part": name, "by": by, "salt": salt, "pictures": pictures}
        tables = ("images", "pairs", "groups") if by == "prompt" else ("images", "pairs")
        counts[name] = rewrite([folder], out / name, plan, change, pictures, tables)
    return counts


def _parts(keys: Sequence[str], codes: Ints, pairs: Any, shares: Mapping[str, float], salt: str) -> list[str]:
    """The side of each of the distinct values; those linked by equal keys or, with ``pairs``, images or captions share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = {k: i for i, k in enumerate(dict.fromkeys(keys))}
    node = np.array([place[k] for k in keys])
    groups = np.arange(len(place))
    if pairs is not None:
        import pyarrow as pa

        _, images = coded(pa.chunked_array([*pairs["chosen_id"].chunks, *pairs["rejected_id"].chunks], pa.string()))
        captions, own = coded(pairs["rejected_prompt"])
        other = np.array([place.setdefault(normalised(c), len(place)) for c in captions], np.int64)[own[own >= 0]]
        ends = np.concatenate([np.tile(node[codes], 2), node[codes][own >= 0]])
        joined = np.concatenate([images + len(place), other])
        size = len(place) + int(images.max(initial=-1)) + 1
        graph = coo_array((np.ones(len(ends), np.int8), (ends, joined)), shape=(size, size))
        groups = connected_components(graph, directed=False)[1][: len(place)]
    smallest: dict[int, str] = {}
    for key, i in place.items():
        group = int(groups[i])
        smallest[group] = min(smallest.get(group, key), key)
    edges = np.cumsum(list(shares.values()))
    side = {
        g: list(shares)[min(int(np.searchsorted(edges, uniform_of(salt, key), "right")), len(shares) - 1)]
        for g, key in smallest.items()
    }
    return [side[int(groups[i])] for i in node]


# --- merge ----------------------------------------------------------------------------------------------------------------


def merge_datasets(sources: Sequence[Path], out: Path) -> dict[str, int]:
    """One folder from several; returns rows by table.

    An image that several hold is written once; ids that stand for other pictures elsewhere get their hash; of equal pairs
    (images, prompt, user, rule) the first stays.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found = [column(s, "images", ("image_id", "sha256")) for s in sources]
    ids = pa.concat_tables(found)
    distinct = ids.group_by("image_id").aggregate([("sha256", "count_distinct")])
    clash = distinct.filter(pc.greater(distinct["sha256_count_distinct"], 1))["image_id"].combine_chunks()
    renamed = []
    for table in found:
        shared = table.filter(pc.is_in(table["image_id"], value_set=clash))
        hashes = [s or "" for s in shared["sha256"].to_pylist()]
        renamed.append({i: f"{i}-{h[:8]}" for i, h in zip(shared["image_id"].to_pylist(), hashes, strict=True)})
    seen: dict[str, set[Any]] = {"images": set(), "pairs": set()}
    taken: set[str] = set()

    def new(table: str, values: Sequence[Any]) -> Any:
        fresh = []
        for value in values:
            fresh.append(value not in seen[table])
            seen[table].add(value)
        return pa.array(fresh, pa.bool_())

    def change(table: str, source: int, rows: Any) -> Any:
        rows = renamed_rows(table, rows, renamed[source])
        if table == "images":
            return rows.filter(new(table, rows["image_id"].to_pylist()))
        if table == "pairs":
            rows = rows.filter(new(table, pair_keys(rows)))
            return _unique_ids(rows, source, taken)
        return rows

    return _once(out, lambda: rewrite(sources, out, {"merge": len(sources)}, change))


def _unique_ids(rows: Any, source: int, taken: set[str]) -> Any:
    """Pairs of several sources may have the same id and not say the same."""
    import pyarrow as pa

    ids = []
    for name in rows["pair_id"].to_pylist():
        while name in taken:
            name = f"{name}+{source}"
        taken.add(name)
        ids.append(name)
    return rows.set_column(rows.column_names.index("pair_id"), "pair_id", pa.array(ids, pa.string()))


def _once(out: Path, work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What is kept depends on all shards before: what was begun and not finished is made again from its first shard."""
    marker = out / ".unfinished"
    if marker.exists():
        for file in [out / "manifest.json", *(f for table in schemas() for f in shards_of(out, table))]:
            file.unlink(missing_ok=True)
    if not (out / "manifest.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    counts = work()
    marker.unlink(missing_ok=True)
    return counts


def renamed_rows(table: str, rows: Any, names: Mapping[str, str]) -> Any:
    """Rows with image ids exchanged."""
    import pyarrow as pa

    columns = {"images": ["image_id"], "pairs": ["chosen_id", "rejected_id"], "groups": ["image_ids"]}.get(table, [])
    for name in columns if names else ():
        old = rows[name].to_pylist()
        fresh = [[names.get(i, i) for i in x] if isinstance(x, list) else names.get(x, x) for x in old]
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(fresh, rows.schema.field(name).type))
    return rows


def pair_keys(rows: Any) -> list[tuple[Any, ...]]:
    """What makes two pairs the same statement."""
    names = ("chosen_id", "rejected_id", "prompt", "rejected_prompt", "p_win", "user", "annotator", "rule")
    return list(zip(*(rows[n].to_pylist() for n in names), strict=True))


# --- dedup ----------------------------------------------------------------------------------------------------------------


def dedup_dataset(
    folder: Path, out: Path, exclude: Collection[str] = (), look: bool = True
) -> tuple[dict[str, int], Counter[str]]:
    """A folder without copies and without pairs of ``exclude``d prompts; returns rows by table, and reasons.

    Pictures of the same bytes, and with ``look`` those whose difference hashes are linked by 3 bits or less, become the
    first of them. Pairs of a picture with itself and repeated pairs go.
    """
    import pyarrow as pa

    images = column(folder, "images", ("image_id", "sha256", "phash"))
    ids, sha, looks = (images[n].to_pylist() for n in ("image_id", "sha256", "phash"))
    leader: dict[str, str] = {}
    first_of: dict[str, str] = {}
    for name, digest in zip(ids, sha, strict=True):
        leader[name] = first_of.setdefault(digest, name) if digest is not None else name
    reasons: Counter[str] = Counter({"images of the same bytes": sum(leader[i] != i for i in leader)})
    if look:
        hashes = {i: h for i, h in zip(ids, looks, strict=True) if h not in (None, "blank") and leader[i] == i}
        for group in near(hashes):
            for name in group[1:]:
                leader[name] = group[0]
                reasons["images of nearly the same look"] += 1
    names = {i: leader[first] for i, first in leader.items() if leader[first] != i}
    barred, written, seen = set(exclude), set[str](), set[Any]()

    def change(table: str, _: int, rows: Any) -> Any:
        if table == "images":
            keep = []
            for name in rows["image_id"].to_pylist():
                keep.append(name not in names and name not in written)
                written.add(name)
            return rows.filter(pa.array(keep, pa.bool_()))
        if table not in ("pairs", "groups"):
            return rows
        rows = renamed_rows(table, rows, names)
        keep = [normalised(p) not in barred for p in rows["prompt"].to_pylist()]
        if table == "pairs":
            other = [p is None or normalised(p) not in barred for p in rows["rejected_prompt"].to_pylist()]
            keep = [a and b for a, b in zip(keep, other, strict=True)]
        reasons[f"{table} of excluded prompts"] += keep.count(False)
        for n, key in enumerate(pair_keys(rows)) if table == "pairs" else ():
            if keep[n] and key[0] == key[1] and key[3] in (None, key[2]):
                keep[n], why = False, "pairs of a picture with its copy"
            elif keep[n] and key in seen:
                keep[n], why = False, "repeated pairs"
            else:
                seen.add(key)
                continue
            reasons[why] += 1
        return rows.filter(pa.array(keep, pa.bool_()))

    plan = {"dedup": {"look": look, "exclude": hashlib.sha256("\n".join(sorted(barred)).encode()).hexdigest()[:16]}}
    counts = _once(out, lambda: rewrite([folder], out, plan, change))
    return counts, +reasons
