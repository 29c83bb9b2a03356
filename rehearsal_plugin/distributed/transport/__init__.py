"""How ranks reach each other: one small interface, one file a library."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from rehearsal_plugin.config.registries import TRANSPORTS
from rehearsal_plugin.distributed.transport.base import Pending, Transport, register, wait
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport
from rehearsal_plugin.distributed.transport.local import LocalTransport
from rehearsal_plugin.distributed.transport.start import announcing_failure
from rehearsal_plugin.distributed.transport.torch_distributed import TorchDistributedTransport

__all__ = [
    "HorovodTransport",
    "LocalTransport",
    "Pending",
    "TorchDistributedTransport",
    "Transport",
    "announcing_failure",
    "open_transport",
    "register",
    "wait",
]


def open_transport(backend: str, timeout_s: float, group: dist.ProcessGroup | Sequence[int] | None = None) -> Transport:
    """Connect this rank with the others of a group.

    Args:
        backend: A registered name. Those of torch take this process alone where torch.distributed is not initialised.
        timeout_s: Seconds after which the library itself gives up.
        group: The ranks, as a group of torch.distributed or by their numbers; None takes all.

    Raises:
        ConfigError: No transport is registered by that name.
        ExchangeError: A rank did not connect in time.
    """
    transport: Transport = TRANSPORTS[backend](group, timeout_s)
    return transport
