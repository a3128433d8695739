"""Models, processes and the environment, from what a configuration says of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError
from diffalign.hub import resolve
from diffalign.models import Model, ModelSpec, load_model
from diffalign.scoring import device, quiet

PATIENCE_HOURS = 12
"""How long a process waits for another before it gives up; the backends' own limit of minutes is short of an evaluation."""


def build_model(spec: ModelSpec) -> Model:
    """Load a model by any kind of path. A LoRA's own path is resolved too."""
    quiet()
    if spec.lora is not None and spec.lora.path is not None:
        spec = spec.model_copy(update={"lora": spec.lora.model_copy(update={"path": str(resolve(spec.lora.path))})})
    return load_model(resolve(spec.path, spec.revision, spec.variant), spec)


def ready_model(spec: ModelSpec) -> Model:
    """A model that makes images, on this machine's device."""
    import torch

    return build_model(spec).to(torch.device(device()))


def environment() -> dict[str, Any]:
    """Versions and machine, for env.json."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else "mps" if torch.backends.mps.is_available() else "cpu",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def make_accelerator(precision: str = "no", report_to: Sequence[str] = (), project: Path | None = None) -> Any:
    """The process group, device and precision, from the environment that accelerate or torchrun set up."""
    from importlib.util import find_spec

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    for name in report_to:
        if find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed", hint=f"pip install {name}, or drop it")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.mixed_precision: fp16 needs a CUDA device", hint="use bf16 or no on this machine")
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    # buffers are constants, and sending them at each pass would tie processes to the same number of passes
    alike = DistributedDataParallelKwargs(broadcast_buffers=False)
    # one process evaluates, looks and exports while the others wait
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=PATIENCE_HOURS))
    return Accelerator(
        mixed_precision=precision, log_with=list(report_to) or None, project_dir=project, kwargs_handlers=[alike, patient]
    )
