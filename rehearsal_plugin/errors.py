"""The exceptions of this package: one tree, each also a subclass of the builtin that it refines."""

from __future__ import annotations

__all__ = [
    "BatchError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "DataError",
    "ExchangeError",
    "ExchangeTimeout",
    "ForgettingError",
    "MissingDependencyError",
    "RehearsalError",
    "StorageError",
]


BEGIN_EMPTY = "remove the checkpoint's rehearsal-* files to start with an empty buffer"
"""The cure that several messages give."""


class RehearsalError(Exception):
    """Base of all exceptions of this package."""


class ConfigError(RehearsalError, ValueError):
    """The `rehearsal` section cannot be used as it stands; the message names the key."""


class BatchError(RehearsalError, ValueError):
    """A batch cannot become rows of the buffer; the message names the field."""


class StorageError(RehearsalError, OSError):
    """The memory or the file for the rows is not available."""


class CheckpointError(RehearsalError, ValueError):
    """A checkpoint cannot be written or read; the message names the file."""


class DataError(RehearsalError, ValueError):
    """A file of data or a model yields no rows; the message names it."""


class ExchangeError(RehearsalError, RuntimeError):
    """The exchange with the other ranks failed; the message names rank and step."""


class ExchangeTimeout(ExchangeError, TimeoutError):
    """The exchange did not end within `exchange.timeout_s`."""


class ForgettingError(RehearsalError, RuntimeError):
    """The model forgets more than `guard` allows; the message names the last checkpoint from before."""


class ClosedError(RehearsalError, RuntimeError):
    """A call on a closed object."""


class MissingDependencyError(RehearsalError, ImportError):
    """An optional framework is missing; the message says what to install."""
