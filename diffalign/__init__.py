"""diffalign aligns text-to-image diffusion models with preferences."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffalign")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"
