"""Reading weights: safetensors first, pickles only without code, and one clear error for whatever is wrong."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError


def choose(path: Path, *names: str) -> Path:
    """The file itself, or the first in the folder that one of ``names`` (or patterns) matches.

    Raises:
        ModelError: there is no such file; names those that would do.
    """
    if path.is_file():
        return path
    for name in names:
        if found := sorted(path.glob(name)):
            return found[0]
    raise ModelError(f"{path}: no {' or '.join(names)}", hint="give the file, or the folder that holds it")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name; the dict under ``state_dict`` where a pickle has one.

    Raises:
        ModelError: not weights, code instead of weights, cut short, or not finite.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ModelError(
            f"{path}: the pickle holds more than tensors, and is not opened because it could run code",
            hint="take a safetensors copy, or convert it where you trust it",
        ) from e
    except Exception as e:  # safetensors, zip and pickle raise many kinds
        raise ModelError(
            f"{path}: cannot read the weights: {' '.join(str(e).split())[:200]}", hint="fetch the file again"
        ) from e
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {"": state}
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path}: not a table of tensors", hint="fetch the published file")
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ModelError(f"{path}: {key} holds values that are not finite", hint="fetch the file again")
    return dict(state)


def stripped(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of ``state`` under ``prefix``, without it; all of it where nothing stands under it."""
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return inside or dict(state)


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """How ``state`` does not fit ``module``: the first tensors missing, unexpected, or of another shape; or None."""
    own = module.state_dict()

    def some(what: str, keys: Iterable[str]) -> list[str]:
        found = sorted(keys)
        return [f"{len(found)} {what} ({', '.join(found[:3])})"] if found else []

    other = [
        f"{k}: {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    said = some("missing", own.keys() - state.keys()) + some("unexpected", state.keys() - own.keys()) + some("shapes", other)
    return "; ".join(said) or None


def fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill ``module`` with exactly ``state``, in fp32.

    Raises:
        ModelError: the weights are of another architecture; names the file and the first tensors.
    """
    if said := differences(module, state):
        raise ModelError(f"{path}: not the weights of this scorer: {said}", hint="check the file with `diffalign verify`")
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def load_pretrained(cls: Any, folder: Path, unused: str = " ") -> Any:
    """``cls.from_pretrained`` in fp32 without the hub, refusing random weights in gaps but under the prefix ``unused``.

    Raises:
        ModelError: no such model in the folder, or some of its weights are missing or not finite.
    """
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except Exception as e:  # transformers and safetensors raise many kinds
        raise ModelError(f"{folder}: cannot load the model: {' '.join(str(e).split())[:300]}", hint="give its folder") from e
    if missing := sorted(k for k in info["missing_keys"] if not k.startswith(unused)):
        raise ModelError(f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])})", hint="fetch it again")
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ModelError(f"{folder}: {key} holds values that are not finite", hint="fetch it again")
    return model


def digest_of(path: Path, kind: str) -> str:
    """``kind:hex`` of a file."""
    with path.open("rb") as f:
        return f"{kind}:{hashlib.file_digest(f, kind).hexdigest()}"
