"""One rank alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport.base import Pending, Transport

__all__ = ["LocalTransport"]


class Finished:
    """A collective of one rank: over when it begins."""

    def __init__(self, received: Tensor) -> None:
        self._received = received

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        return True

    def result(self) -> Tensor:
        """See `Pending.result`."""
        return self._received


class LocalTransport(Transport):
    """A group of one, for one process or for `sampling.scope: local`."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        return Finished(send[None])

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """See `Transport.all_to_all`."""
        if recv.device.type == "cpu":
            np.copyto(recv.numpy(), send.numpy())  # on this thread alone, unlike torch
            return Finished(recv)
        return Finished(recv.copy_(send))

    def close(self) -> None:
        """See `Transport.close`."""
