"""gallery.html: scored pictures in one file that opens from disk, sorted, with histograms and correlations."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.data.files import write_text
from diffalign.data.images import decode
from diffalign.data.scores import Scored
from diffalign.data.sources import Source
from diffalign.errors import DataError
from diffalign.tally import columns_of, summary

SIDE = 256
BINS = 32


def write_gallery(rows: Sequence[Scored], source: Source, path: Path, limit: int) -> Path:
    """The best and the worst ``limit`` / 2 pictures by the first scorer; the source is walked once more for their bytes."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    names = [n for n in columns_of(rows) if any(r.values.get(n) is not None for r in rows)]
    shown = _chosen(rows, names, limit)
    uris = _thumbnails(source, {r.image_id for r in shown})
    said = summary(rows)
    numbers = {n: np.array([r.values.get(n) for r in rows], float) for n in names}
    context = {
        "name": path.parent.resolve().name,
        "said": said,
        "names": names,
        "histograms": [_histogram(n, numbers[n], said["scorers"][n]) for n in names],
        "correlations": [{"name": a, "row": [spearman(numbers[a], numbers[b]) for b in names]} for a in names],
        "cards": [
            {
                "id": r.image_id, "prompt": r.prompt, "uri": uris.get(r.image_id),
                "error": r.error or "; ".join(dict.fromkeys(r.errors.values())),
                "values": {n: r.values.get(n) for n in names}, "sort": json.dumps([r.values.get(n) for n in names]),
            }
            for r in shown
        ],
    }  # fmt: skip
    pages = Environment(loader=PackageLoader("diffalign"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True)
    return write_text(path, pages.get_template("gallery.html.j2").render(context))


def _chosen(rows: Sequence[Scored], names: Sequence[str], limit: int) -> list[Scored]:
    """Both ends of the order by the first scorer, best first; what has no value comes last, and counts as the worst."""
    first = names[0] if names else ""

    def order(r: Scored) -> tuple[bool, float]:
        value = r.values.get(first)
        return value is None, 0.0 if value is None else -value

    ranked = sorted(rows, key=order)
    return ranked if len(ranked) <= limit else ranked[: limit - limit // 2] + ranked[len(ranked) - limit // 2 :]


def _thumbnails(source: Source, wanted: set[str]) -> dict[str, str]:
    """Data URIs by image id; none for a picture that cannot be read."""
    out: dict[str, str] = {}
    left = set(wanted)
    rows = source.rows()
    while left and (row := next(rows, None)) is not None:
        if row.id not in left:
            continue
        left.discard(row.id)
        try:
            image = decode(row.open(), row.id)
        except (DataError, OSError):
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        out[row.id] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return out


def _histogram(name: str, values: Any, said: dict[str, Any]) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    counts, edges = np.histogram(known, BINS)
    bars = [round(float(c) / counts.max(), 4) for c in counts]
    low, high = edges[[0, -1]].tolist()
    return {"name": name, "bars": bars, "low": low, "high": high, "count": len(known), **said}


def spearman(a: Any, b: Any) -> float | None:
    """Rank correlation of (N,) values where both are finite, ties at their mean rank; None where one does not vary."""
    from scipy.stats import rankdata

    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2:
        return None
    x, y = (rankdata(v[both]) - (both.sum() + 1) / 2 for v in (a, b))
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm else None
