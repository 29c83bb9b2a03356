"""A distributed rehearsal buffer for continual learning under DeepSpeed and Horovod."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import (
    BatchError,
    CheckpointError,
    ClosedError,
    ConfigError,
    DataError,
    ExchangeError,
    ExchangeTimeout,
    ForgettingError,
    MissingDependencyError,
    RehearsalError,
    StorageError,
)
from rehearsal_plugin.integrations import Handle, attach
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.rows import RowLayout
from rehearsal_plugin.transport import HorovodTransport, LocalTransport, TorchDistributedTransport, Transport

__all__ = [
    "BatchError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "DataError",
    "ExchangeError",
    "ExchangeTimeout",
    "ForgettingError",
    "Handle",
    "HorovodTransport",
    "LocalTransport",
    "MissingDependencyError",
    "Rehearsal",
    "RehearsalBuffer",
    "RehearsalConfig",
    "RehearsalError",
    "RowLayout",
    "StorageError",
    "TorchDistributedTransport",
    "Transport",
    "attach",
    "initialize",
]

__version__ = "0.1.0"


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Drop-in for `deepspeed.initialize` that attaches a rehearsal buffer; see `integrations.deepspeed`."""
    from rehearsal_plugin.integrations import deepspeed

    return deepspeed.initialize(*args, **kwargs)


def __getattr__(name: str) -> Any:
    """`RehearsalCallback` needs transformers, which is imported only then."""
    if name == "RehearsalCallback":
        from rehearsal_plugin.integrations.transformers import RehearsalCallback

        return RehearsalCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
