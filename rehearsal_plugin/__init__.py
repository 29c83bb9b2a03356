"""A distributed rehearsal buffer for continual learning under DeepSpeed and Horovod.

Names are imported when they are first used: `import rehearsal_plugin` alone takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback as RehearsalCallback
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

_HOMES = {
    "BatchError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "ExchangeError": "errors",
    "ExchangeTimeout": "errors",
    "ForgettingError": "errors",
    "Handle": "integrations",
    "HorovodTransport": "distributed.transport",
    "LocalTransport": "distributed.transport",
    "MissingDependencyError": "errors",
    "Rehearsal": "rehearsal",
    "RehearsalBuffer": "buffer.buffer",
    "RehearsalCallback": "integrations.transformers.callback",  # needs transformers, so it is not in __all__
    "RehearsalConfig": "config",
    "RehearsalError": "errors",
    "RowLayout": "buffer.rows.layout",
    "StorageError": "errors",
    "TorchDistributedTransport": "distributed.transport",
    "Transport": "distributed.transport",
    "attach": "integrations",
}
"""Where each public name is defined."""

_PACKAGES = frozenset({
    "buffer", "checkpoint", "config", "distributed", "errors", "evaluation", "integrations", "rehearsal", "retrieval",
    "strategies",
})  # fmt: skip


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Drop-in for `deepspeed.initialize` that attaches a rehearsal buffer; see `integrations.deepspeed`."""
    from rehearsal_plugin.integrations.deepspeed import engine as deepspeed

    return deepspeed.initialize(*args, **kwargs)


def __getattr__(name: str) -> Any:
    """A public name, or a package, on its first use (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
