"""Attention kernels by name, refused where they cannot run."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.errors import ModelError


def set_attention(net: Any, name: str) -> None:
    """Let a diffusers network compute attention with the backend ``name``.

    Networks of the newer design (FLUX) take every backend that diffusers knows. The older ones (the UNets, SD3, PixArt)
    have PyTorch's own attention or xformers'; diffusers would accept another name for them and change nothing.

    Raises:
        ModelError: no such backend, not for this network, or it cannot run on this machine.
    """
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    takes_any = any(module is not net and hasattr(module, "set_attention_backend") for module in net.modules())
    if name == "native" and not takes_any:
        return
    try:
        if takes_any:
            with attention_backend():  # the library would make it the default of every other model too
                net.set_attention_backend(name)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            q = torch.zeros(1, 16, 1, 64, device=device, dtype=torch.bfloat16)
            dispatch_attention_fn(q, q, q, backend=name)
        elif name == "xformers":
            net.enable_xformers_memory_efficient_attention()
        else:
            raise ValueError(f"{type(net).__name__} has only native and xformers")
    except Exception as e:  # each backend fails in its own way: imports, missing kernels, the wrong device
        said = " ".join(str(e).split())[:300]
        raise ModelError(f"model.attention: {name} cannot run here: {said}", hint="leave it out for PyTorch's own") from e
