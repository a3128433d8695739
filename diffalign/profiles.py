"""``diffalign data profiles``: a few examples of what each user likes, and the user's other pairs (PPD, Dang et al. 2025)."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from diffalign.curation import column
from diffalign.data.files import atomic
from diffalign.data.prompts import normalised
from diffalign.errors import DataError


def write_profiles(folder: Path, out: Path, shots: int = 4, salt: str = "profiles") -> dict[str, int]:
    """``out`` (.jsonl): ``user``, ``examples`` of (prompt, liked, disliked) and ``pairs``, the ids of the others.

    Examples are drawn by a hash among the pairs that are no ties; pairs that share a prompt or an image with an example of
    their user are left out, so that a profile never shows what it is asked about.

    Raises:
        DataError: no pair names a user, or nobody has more than ``shots``.
    """
    by_user: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in column(folder, "pairs", ("pair_id", "prompt", "chosen_id", "rejected_id", "p_win", "user")).to_pylist():
        if row["user"] is not None and row["p_win"] != 0.5:
            by_user[row["user"]].append(row)
    if not by_user:
        raise DataError(f"{folder}/pairs: no pair names a user", hint="Pick-a-Pic and HPD v1 do")
    lines, counts = [], {"users": 0, "examples": 0, "pairs": 0, "users_left_out": 0}
    for user, rows in sorted(by_user.items()):
        rows.sort(key=lambda r: hashlib.sha256(f"{salt}|{user}|{r['pair_id']}".encode()).digest())
        shown = rows[:shots]
        prompts = {normalised(r["prompt"]) for r in shown}
        images = {r[side] for r in shown for side in ("chosen_id", "rejected_id")}
        rest = [r for r in rows[shots:] if normalised(r["prompt"]) not in prompts]
        rest = [r for r in rest if not images & {r["chosen_id"], r["rejected_id"]}]
        if len(shown) < shots or not rest:
            counts["users_left_out"] += 1
            continue
        examples = [{"prompt": r["prompt"], "liked": r["chosen_id"], "disliked": r["rejected_id"]} for r in shown]
        lines.append({"user": user, "examples": examples, "pairs": sorted(r["pair_id"] for r in rest)})
        for name, n in (("users", 1), ("examples", shots), ("pairs", len(rest))):
            counts[name] += n
    if not lines:
        raise DataError(f"{folder}/pairs: no user has {shots} examples and other pairs", hint="ask for fewer with --shots")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic(out, lambda p: p.write_text(text, encoding="utf-8"))
    return counts
