"""How ranks reach each other: one small interface, one file a library."""

from __future__ import annotations

import torch.distributed as dist

from rehearsal_plugin.distributed.transport.base import Pending, Transport, wait
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport
from rehearsal_plugin.distributed.transport.local import LocalTransport
from rehearsal_plugin.distributed.transport.torch_distributed import TorchDistributedTransport

__all__ = [
    "HorovodTransport",
    "LocalTransport",
    "Pending",
    "TorchDistributedTransport",
    "Transport",
    "default_transport",
    "wait",
]


def default_transport(backend: str, timeout_s: float) -> Transport:
    """All ranks of torch.distributed if that is initialised, else this process alone."""
    if dist.is_available() and dist.is_initialized():
        return TorchDistributedTransport(backend=backend, timeout_s=timeout_s)
    return LocalTransport()
