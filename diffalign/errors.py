"""Errors that the command line prints as one line: what is wrong, where, and what to do."""

from __future__ import annotations


class DiffalignError(Exception):
    """Something failed at run time: a full disk, a lost connection, a loss that is not finite."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message, self.hint = message, hint
        super().__init__(message if hint is None else f"{message} ({hint})")


class ConfigError(DiffalignError):
    """A configuration that cannot run: names the key, the value and the remedy."""

    exit_status = 2


class DataError(DiffalignError):
    """Input data that cannot be used: names the file, the row and the remedy."""

    exit_status = 2


class ModelError(DiffalignError):
    """A model that cannot be loaded or trained: names the path or the tensor and the remedy."""

    exit_status = 2
