"""diffalign aligns text-to-image diffusion models with preferences."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

try:
    __version__ = version("diffalign")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

if TYPE_CHECKING:
    from diffalign.api import (
        CPOConfig,
        CPOTrainer,
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        MaPOConfig,
        MaPOTrainer,
        ORPOConfig,
        ORPOTrainer,
        SFTConfig,
        SFTTrainer,
        Trainer,
        TrainerConfig,
        evaluate,
        generate,
    )
    from diffalign.grpo import GRPOConfig, GRPOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "evaluate",
    "generate",
]


def __getattr__(name: str) -> object:
    """Import the Python interface on first use: ``import diffalign`` stays instant."""
    if name in __all__:
        from diffalign import api, grpo

        return getattr(grpo if name.startswith("GRPO") else api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
