"""``diffalign export``: the trained weights of a finished run in another format."""

from __future__ import annotations

from pathlib import Path

from diffalign.building import build_model
from diffalign.data.files import atomic_folder
from diffalign.errors import ConfigError
from diffalign.hub import exported
from diffalign.models import Format
from diffalign.recipes import TrainConfig, about
from diffalign.spec import load


def export_run(run: Path, format: Format, output: Path | None = None, dtype: str | None = None) -> Path:
    """The whole of ``diffalign export``: the trained weights of a finished run in another format; returns the folder."""
    import shutil

    files = exported(run)
    if dtype is not None and format != "merged":
        raise ConfigError(f"--dtype does not apply to {format}", hint="an adapter stays as it was trained, fp32")
    config = load(TrainConfig, run / "config.resolved.yaml", [] if dtype is None else [f"model.dtype={dtype}"])
    out = output or run / "exports" / format
    if format == "diffusers":
        for file in files:
            (out / file.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file.relative_to(run))
        return out
    model = build_model(config.model.model_copy(update={"quantization": "none", "attention": None}))
    model.restore(run)
    atomic_folder(out, lambda to: model.export(to, format, about(config)))
    return out
