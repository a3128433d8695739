"""Count what a computation takes, on real tensors or on fake ones that have only shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active: bytes of the storages that were made and still live, their highest sum, and floating-point operations.

    What operations were given from outside (weights, inputs) is not counted. Memory that a kernel takes and gives back
    within one operation is not seen. A multiplication and an addition are two operations, as in
    :class:`torch.utils.flop_counter.FlopCounterMode`, whose formulas these are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, 0)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._see(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known and self._known[key]() is storage:
            return

        def freed(ref: object) -> None:
            self.live -= size
            if self._known.get(key) is ref:
                del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_iter(tree) if isinstance(x, Tensor))


@contextmanager
def cuda_precision() -> Iterator[None]:
    """While active, autocast on the CPU has norms and softmax in fp32, as it does on CUDA.

    The functions are replaced: a mode of PyTorch's would not be there when a checkpoint computes them again.
    """
    functional = nn.functional
    places = [(functional, "layer_norm"), (functional, "group_norm"), (functional, "softmax"), (torch, "softmax")]
    plain = [(owner, name, getattr(owner, name)) for owner, name in [*places, (Tensor, "softmax")]]
    try:
        for owner, name, function in plain:
            setattr(owner, name, _in_fp32(function))
        yield
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)


def _in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return widened


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({id(s): s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())
