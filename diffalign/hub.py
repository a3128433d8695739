"""Paths: a built-in name, a local folder and a hub id mean the same everywhere; and the way back, to the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError, DataError, DiffalignError, ModelError
from diffalign.shapes.assets import ASSETS, LICENCE, asset

WEIGHTS = re.compile(r".+/[^./]+?(-\d+-of-\d+)?(\.(?P<variant>[^./]+?))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)")
"""``unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors``; older files have the variant after the number."""
OTHERS = (".ckpt", ".onnx", ".onnx_data", ".msgpack", ".h5", ".ot", ".gguf")
"""Weights for other programs."""


def cache_dir() -> Path:
    """Where encoded data is kept between runs: ``DIFFALIGN_CACHE``, or ``~/.cache/diffalign``."""
    return Path(os.environ.get("DIFFALIGN_CACHE") or Path("~/.cache/diffalign").expanduser())


def is_hub_id(path: str) -> bool:
    """Whether a path names a repository of the hub: owner/name, and nothing local or built in."""
    here = path in ASSETS or Path(path).expanduser().exists()
    return not here and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def resolve(path: str, revision: str | None = None, variant: str | None = None, files: Sequence[str] = ()) -> Path:
    """A local folder for a built-in name, a local path or a hub id (downloaded once, ``HF_HUB_OFFLINE`` respected).

    Of a pipeline only what loads it is fetched: the folders of its parts, as safetensors where there are any, in the
    ``variant`` asked for. Of any other repository all is fetched but copies in other formats, or only ``files`` (names
    or patterns).

    Raises:
        ModelError: no such folder, no such repository, no access, or no network.
    """
    if path in ASSETS:
        return asset(path)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not is_hub_id(path):
        raise ModelError(f"no such folder: {path}", hint=f"give a folder, a hub id owner/name, or one of {', '.join(ASSETS)}")
    return _download(path, revision, variant, files)


def resolve_data(path: str, files: Sequence[str]) -> Path:
    """A local file or folder, or the ``files`` (patterns) of a hub dataset.

    Raises:
        DataError: no such file, and no such dataset.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not is_hub_id(path):
        raise DataError(f"no such file or folder: {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=list(files)))
    except Exception as e:  # the client raises many kinds
        raise DataError(f"{path}: neither here nor on the hub: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e


def licence(path: str, revision: str | None = None, kind: str = "model", fetch: bool = False) -> str | None:
    """The licence that a model or a dataset states in its card, here or in the hub's cache; None where it states none.

    With ``fetch`` a card that is not in the cache is downloaded, so that the first run says the same as all later ones.
    """
    import yaml
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    if path in ASSETS:
        return LICENCE
    card = Path(path).expanduser() / "README.md"
    if is_hub_id(path):
        if fetch:
            with suppress(Exception):  # no card, no such repository, no network
                hf_hub_download(path, "README.md", revision=revision, repo_type=kind)
        cached = try_to_load_from_cache(path, "README.md", revision=revision, repo_type=kind)
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return None
    try:
        stated = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # it is there, and cannot be read
        return None
    named = stated.get("license_name") if stated.get("license") == "other" else None
    found = named or stated.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else found


def push(folder: Path, files: Sequence[Path], repo: str, private: bool, kind: str = "model") -> str:
    """Upload these files of a folder to a repository of this kind, made if there is none; returns its address.

    Raises:
        ModelError: not logged in, or no such name.
        DiffalignError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if get_token() is None:
        raise ModelError(f"{repo}: not logged in to the hub", hint="log in with `hf auth login`")
    names = [str(f.relative_to(folder)) for f in files]
    try:
        address = HfApi().create_repo(repo, private=private, exist_ok=True, repo_type=kind)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message="Upload by diffalign", repo_type=kind
        )
    except HFValidationError as e:
        raise ModelError(f"{repo}: no name of a repository", hint="it is owner/name") from e
    except OSError as e:  # refused, or no connection
        raise DiffalignError(f"{repo}: cannot upload: {' '.join(str(e).split())[:300]}") from e
    return str(address)


def exported(folder: Path) -> list[Path]:
    """The files of a run, or of an export, that are its model as stock diffusers loads it.

    Raises:
        ConfigError: there are none.
    """
    index = folder / "model_index.json"
    if index.is_file():
        parts = [folder / name for name in json.loads(index.read_text()) if (folder / name).is_dir()]
        return [index, *(f for part in parts for f in sorted(part.rglob("*")) if f.is_file())]
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")])
    if not files:
        raise ConfigError(f"{folder} is not a finished run: it holds no trained weights", hint="give the output_dir of a run")
    return files


def pipeline_files(index: Mapping[str, Any], names: Sequence[str], variant: str | None) -> list[str]:
    """Which files of a repository load its pipeline, whose ``model_index.json`` is ``index``; and its card, for the licence.

    Of each part's weights one kind: safetensors before pickles, the variant before those without one.

    Raises:
        ModelError: no part has weights of this variant.
    """
    wanted = [name for name in names if name in ("model_index.json", "README.md")]
    seen: set[str | None] = {None}
    for part in (key for key, made_by in index.items() if isinstance(made_by, list) and made_by[0] is not None):
        kinds: dict[tuple[bool, bool], list[str]] = {}
        for name in (n for n in names if n.startswith(f"{part}/") and not n.endswith(OTHERS)):
            weights = WEIGHTS.fullmatch(name)
            if weights is None:
                wanted.append(name)
            elif weights["variant"] in (None, variant):
                seen.add(weights["variant"])
                kinds.setdefault((weights["kind"] == "bin", weights["variant"] != variant), []).append(name)
        if kinds:
            wanted += kinds[min(kinds)]
    if variant not in seen:
        raise ModelError(f"model.variant: no weights of the variant {variant!r}", hint="leave it out")
    return wanted


def _download(repo: str, revision: str | None, variant: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if files:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
        try:
            index = Path(hf_hub_download(repo, "model_index.json", revision=revision))
        except EntryNotFoundError:  # an adapter or a scorer; or it is not in the cache, which the next line will say
            return Path(snapshot_download(repo, revision=revision, ignore_patterns=[f"*{end}" for end in (".bin", *OTHERS)]))
        try:
            names = HfApi().list_repo_files(repo, revision=revision)
        except HfHubHTTPError:
            raise
        except Exception:  # offline or no connection, which each version of the client says in its own way
            return index.parent
        wanted = pipeline_files(json.loads(index.read_text()), names, variant)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError as e:
        raise ModelError(f"{repo} is gated", hint="accept its terms on the hub, then log in with `hf auth login`") from e
    except RevisionNotFoundError as e:
        raise ModelError(f"{repo} has no revision {revision!r}") from e
    except RepositoryNotFoundError as e:
        raise ModelError(f"{repo}: no such folder, and no such repository on the hub", hint="check the name, or log in") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise ModelError(f"{repo}: not in the local cache, and the hub cannot be reached", hint="give a local folder") from e
    except (ValueError, OSError) as e:  # a bad name or variant; the connection
        raise DiffalignError(f"{repo}: cannot download: {' '.join(str(e).split())[:300]}") from e
