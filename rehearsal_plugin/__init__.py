"""A distributed rehearsal buffer for continual learning under DeepSpeed and Horovod."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.transport import (
    HorovodTransport,
    LocalTransport,
    TorchDistributedTransport,
    Transport,
)
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
    from rehearsal_plugin.integrations.deepspeed import engine as deepspeed

    return deepspeed.initialize(*args, **kwargs)


def __getattr__(name: str) -> Any:
    """`RehearsalCallback` needs transformers, which is imported only then."""
    if name == "RehearsalCallback":
        from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback

        return RehearsalCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
