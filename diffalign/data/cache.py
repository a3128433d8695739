"""Tensors that are computed once: latents and text embeddings, by content and by what made them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.data.files import atomic

log = logging.getLogger(__name__)

SHARD, BATCH = 256, 32


class TensorCache:
    """A folder of safetensors shards; an entry is a few named tensors under one content key.

    Entries are views of their files, which the system reads as they are asked for and may forget again: memory holds the
    keys, whatever the size of the dataset. A damaged shard is dropped and its entries are made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self._where: dict[str, tuple[Any, list[str]]] = {}
        """The open shard of a key, and the names of its tensors."""
        for shard in sorted(folder.glob("*.safetensors")):
            self._open(shard)

    def _open(self, shard: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            stored: Any = safe_open(shard, "pt")
        except (SafetensorError, OSError, ValueError) as e:
            log.warning("dropping the damaged cache shard %s (%s); its entries are made again", shard, e)
            shard.unlink(missing_ok=True)
            return
        names: list[str] = stored.keys()
        for name in names:
            key, _, part = name.partition("/")
            if key not in self._where or self._where[key][0] is not stored:
                self._where[key] = stored, []
            self._where[key][1].append(part)

    def fill(
        self, keys: Sequence[str], make: Callable[[list[int]], dict[str, Tensor]], batch: int = BATCH, unit: str | None = None
    ) -> None:
        """Compute the entries of ``keys`` that are missing: ``make`` gets positions in ``keys`` and returns named stacks.

        With a ``unit``, what an entry is of, a bar shows how far it is.
        """
        from safetensors.torch import save_file
        from tqdm import tqdm

        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in self._where:
                first.setdefault(key, i)
        missing = list(first.values())
        hidden = unit is None or not missing
        bar = tqdm(total=len(missing), desc="encode", unit=unit or "", disable=hidden, dynamic_ncols=True)
        for start in range(0, len(missing), SHARD):
            rows = missing[start : start + SHARD]
            new: dict[str, dict[str, Tensor]] = {}
            for at in range(0, len(rows), batch):
                some = rows[at : at + batch]
                stacks = make(some)
                for j, row in enumerate(some):
                    new[keys[row]] = {part: stack[j].cpu().clone() for part, stack in stacks.items()}
                bar.update(len(some))
            flat = {f"{key}/{part}": tensor for key, parts in new.items() for part, tensor in parts.items()}
            name = hashlib.sha256("".join(sorted(new)).encode()).hexdigest()[:16]
            shard = self.folder / f"{name}.safetensors"
            atomic(shard, partial(save_file, flat))
            self._open(shard)
            self.made += len(rows)
        bar.close()

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        shard, parts = self._where[key]
        return {part: shard.get_tensor(f"{key}/{part}") for part in parts}
