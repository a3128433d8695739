"""``diffalign data push``: the card of a dataset folder, and the way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign import hub
from diffalign.data.files import write_text
from diffalign.data.tables import read_manifest, schemas, shards_of
from diffalign.inspection import show_dataset, stats_lines, stats_of

KNOWN = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail++", "openrail")
"""Names that the hub knows; others are told in the text."""


def write_dataset_card(folder: Path) -> Path:
    """README.md of a dataset folder: what it holds, where it is from, under which licences. Nothing is guessed.

    Raises:
        DataError: it is no dataset folder.
    """
    import yaml

    said, stats = show_dataset(folder, 0), stats_of(folder)
    licences = [name for name in stats["licences"] if name != "unknown"]
    head: dict[str, Any] = {
        "task_categories": ["text-to-image"],
        "tags": ["preferences", "diffalign"],
        "configs": [
            {"config_name": t, "data_files": f"{t}/*.parquet", **({"default": True} if t == "pairs" else {})}
            for t in said["tables"]
        ],
    }
    if len(stats["licences"]) == 1 and licences and licences[0] in KNOWN:
        head["license"] = licences[0]
    elif licences:
        head |= {"license": "other", "license_name": ", ".join(licences)}
    lines = [f"- `{t}/`: {s['rows']} rows" for t, s in said["tables"].items()]
    unknown = stats["licences"].get("unknown", 0)
    terms = [f"- {name}: {count} images" for name, count in stats["licences"].items() if name != "unknown"]
    terms += [f"- {unknown} images state no licence"] if unknown else []
    plan = (said["plans"] or {}).get("pairs", {})
    made = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).strip() if plan else "not recorded"
    text = "\n".join(
        [
            "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {folder.resolve().name}", "",
            "Preference pairs for text-to-image models, in the tables of diffalign:", "", *lines, "",
            "`pairs/` names images of `images/` by id; `p_win` is how likely raters prefer the chosen one, 0.5 is a tie.", "",
            "## Licences", "", *(terms or ["Not stated."]), "",
            "## Content", "", *(f"- {line}" for line in stats_lines(stats)), "",
            "## How the pairs were made", "", "```yaml", made, "```", "",
        ]
    )  # fmt: skip
    return write_text(folder / "README.md", text)


def push_dataset(folder: Path, repository: str, private: bool) -> str:
    """Upload the tables, the manifest and a fresh card; returns the address."""
    card = write_dataset_card(folder)
    manifest = [folder / "manifest.json"] if read_manifest(folder) else []
    files = [*(f for table in schemas() for f in shards_of(folder, table)), *manifest, card]
    return hub.push(folder, files, repository, private, kind="dataset")
