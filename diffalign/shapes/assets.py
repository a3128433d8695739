"""Where the shipped models and pairs are: inside an installed wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import DataError

LICENCE = "Apache-2.0"
"""Of the assets, as of the code that makes them."""

ASSETS = ("shapes-unet", "shapes-clip", "shapes-pairs", "shapes-second", "shapes-dit", "shapes-dit-pairs")


def asset(name: str) -> Path:
    """The folder of a shipped asset."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).is_dir():
            return root / name
    raise DataError(f"the asset {name} is not installed", hint="install the wheel again, or run scripts/build_assets.py")
