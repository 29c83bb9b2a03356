"""The exceptions of this package: one tree, and each is also the builtin it refines."""

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


class RehearsalError(Exception):
    """Anything that this package raises on purpose."""


class ConfigError(RehearsalError, ValueError):
    """The `rehearsal` section cannot be used as it stands; the message names the key."""


class BatchError(RehearsalError, ValueError):
    """A batch cannot become rows of the buffer; the message names the field."""


class StorageError(RehearsalError, OSError):
    """The memory or the file that holds the rows cannot be had."""


class CheckpointError(RehearsalError, ValueError):
    """A checkpoint cannot be written or read; the message names the file."""


class DataError(RehearsalError, ValueError):
    """Rows cannot be made of a file of data, or of a model; the message names it."""


class ExchangeError(RehearsalError, RuntimeError):
    """The exchange with the other ranks failed; the message names rank and step."""


class ExchangeTimeout(ExchangeError, TimeoutError):
    """The exchange did not end within `exchange.timeout_s`."""


class ForgettingError(RehearsalError, RuntimeError):
    """The model forgets more than `guard` allows; the message names the last checkpoint from before."""


class ClosedError(RehearsalError, RuntimeError):
    """A call on something that was closed."""


class MissingDependencyError(RehearsalError, ImportError):
    """An optional framework is needed; the message says what to install."""
