"""Quantisation of a frozen network while it loads, through diffusers' own configurations; refused where it cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.base import ModelSpec

LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes"}


def quantizer(spec: ModelSpec, net_name: str) -> Any:
    """What ``DiffusionPipeline.from_pretrained`` takes to load the part ``net_name`` as ``spec.quantization`` says.

    int8 is torchao's per-row weights, which run on any device; int4 is the nf4 of QLoRA (Dettmers et al. 2023), whose
    kernels need CUDA. Both compute in ``spec.dtype``.

    Raises:
        ModelError: the library or the device is missing.
    """
    name, library = spec.quantization, LIBRARIES[spec.quantization]
    if find_spec(library) is None:
        raise ModelError(f"model.quantization: {name} needs {library}", hint=f"pip install {library}, or quantization=none")
    if name == "int4" and not torch.cuda.is_available():
        raise ModelError("model.quantization: int4 needs a CUDA device", hint="use none or int8 on this machine")
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    config: Any
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, spec.dtype)
        )
    return PipelineQuantizationConfig(quant_mapping={net_name: config})


def quantized_bytes(name: str, weight: Tensor) -> float:
    """Bytes of a (rows, columns) weight once quantised: torchao scales each row, in the weight's own dtype; nf4 scales each
    64 values, in fp32.
    """
    n = weight.numel()
    return n + len(weight) * weight.element_size() if name == "int8" else n / 2 + 4 * -(-n // 64)
