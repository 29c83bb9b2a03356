"""A rank of several in one process, for jobs whose ranks exchange no rows."""

from __future__ import annotations

from torch import Tensor

from rehearsal_plugin.distributed.transport import LocalTransport, Pending
from rehearsal_plugin.distributed.transport.local import Finished

__all__ = ["Seat"]


class Seat(LocalTransport):
    """A rank among others that never talks to them: the scope is local. They would say what it says.

    Args:
        rank: This rank.
        size: Ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        return Finished(send.repeat(self.size, *[1] * send.ndim))
