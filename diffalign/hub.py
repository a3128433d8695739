"""Paths: a built-in name, a local folder and a hub id mean the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import DiffalignError, ModelError
from diffalign.shapes.assets import ASSETS, asset


def cache_dir() -> Path:
    """Where encoded data is kept between runs: ``DIFFALIGN_CACHE``, or ``~/.cache/diffalign``."""
    return Path(os.environ.get("DIFFALIGN_CACHE") or Path("~/.cache/diffalign").expanduser())


def resolve(path: str, revision: str | None = None, files: Sequence[str] = ()) -> Path:
    """A local folder for a built-in name, a local path or a hub id (downloaded once, ``HF_HUB_OFFLINE`` respected).

    Of a hub repository all is fetched but copies in other formats, or only ``files`` (names or patterns).

    Raises:
        ModelError: no such folder, no such repository, no access, or no network.
    """
    if path in ASSETS:
        return asset(path)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"no such folder: {path}", hint=f"give a folder, a hub id owner/name, or one of {', '.join(ASSETS)}")
    return _download(path, revision, files)


def _download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    skip = ["*.ckpt", "*.bin", "*.onnx*", "*.msgpack", "*.h5", "*.ot", "*.gguf"]  # safetensors only
    try:
        wanted = {"allow_patterns": list(files)} if files else {"ignore_patterns": skip}
        return Path(snapshot_download(repo, revision=revision, **wanted))
    except GatedRepoError as e:
        raise ModelError(f"{repo} is gated", hint="accept its terms on the hub, then log in with `hf auth login`") from e
    except RevisionNotFoundError as e:
        raise ModelError(f"{repo} has no revision {revision!r}") from e
    except RepositoryNotFoundError as e:
        raise ModelError(f"{repo}: no such folder, and no such repository on the hub", hint="check the name, or log in") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise ModelError(f"{repo}: not in the local cache, and the hub cannot be reached", hint="give a local folder") from e
    except (HFValidationError, HfHubHTTPError, OSError) as e:
        raise DiffalignError(f"{repo}: cannot download: {' '.join(str(e).split())[:300]}") from e
