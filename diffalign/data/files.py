"""Atomic writes: a file is whole or it is not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffalign.errors import DiffalignError


def atomic(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises:
        DiffalignError: the disk is full or the folder is read-only; nothing is left behind.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with tmp.open("rb+") as f:
            os.fsync(f.fileno())
        tmp.replace(path)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk in its own way
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise _cannot_write(path, e) from e
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    return path


def atomic_folder(folder: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary folder inside ``folder``, then move what it holds up, single files last.

    Raises:
        DiffalignError: the disk is full or the folder is read-only; what was there before is untouched.
    """
    tmp = folder / f".{os.getpid()}.tmp"
    try:
        tmp.mkdir(parents=True)
        write(tmp)
        for made in sorted(tmp.iterdir(), key=lambda p: (p.is_file(), p.name)):
            if (old := folder / made.name).is_dir():
                shutil.rmtree(old)
            made.replace(old)
    except (OSError, SafetensorError) as e:
        raise _cannot_write(folder, e) from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def _cannot_write(path: Path, e: Exception) -> DiffalignError:
    why = getattr(e, "strerror", None) or e
    return DiffalignError(f"cannot write {path}: {why}", hint="free some space or choose another folder")


def write_text(path: Path, text: str) -> Path:
    """Write text atomically."""
    return atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write JSON atomically; NaN is refused, since it is no JSON."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
