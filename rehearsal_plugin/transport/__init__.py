"""How ranks reach each other: one small interface, one file a library."""

from __future__ import annotations

from rehearsal_plugin.transport.base import Pending, Transport, wait
from rehearsal_plugin.transport.horovod import HorovodTransport
from rehearsal_plugin.transport.local import LocalTransport
from rehearsal_plugin.transport.torch_distributed import TorchDistributedTransport

__all__ = ["HorovodTransport", "LocalTransport", "Pending", "TorchDistributedTransport", "Transport", "wait"]
