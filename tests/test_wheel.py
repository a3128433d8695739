"""A built wheel works where there is no checkout, assets and configurations included."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_wheel_brings_its_assets(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "diffalign" / "py.typed").exists()
    code = (
        "import diffalign, json; from diffalign.building import build_model; from diffalign.catalogue import shipped_configs\n"
        "from diffalign.training_data import DataSpec, build_pairs\n"
        "from diffalign.models import ModelSpec\n"
        "m = build_model(ModelSpec(path='shapes-unet')); a, b = build_pairs(DataSpec(limit=50), 0)\n"
        "print(json.dumps([diffalign.__file__, m.kind, len(a) + len(b), sorted(shipped_configs())]))"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    # -S and -I are not used: the libraries come from this environment, the package from the wheel
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import json

    file, kind, pairs, configs = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert (kind, pairs) == ("epsilon", 50)
    assert "shapes-dpo" in configs
