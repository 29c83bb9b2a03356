"""Counts the messages of a rank at its transport."""

from __future__ import annotations

from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport import Pending, Transport

__all__ = ["CountsMessages"]


class CountsMessages(Transport):
    """A base in front of a transport.

    Attributes:
        messages: Messages with rows that were sent or received, and those of headers: one to and from each other rank.
    """

    messages = 0

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        self.messages += 2 * (self.size - 1)
        return super().all_gather(send)  # type: ignore[safe-super]  # of the transport behind

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """See `Transport.all_to_all`."""
        for counts in (send_counts, recv_counts):
            self.messages += int((counts > 0).sum() - (counts[self.rank] > 0))
        return super().all_to_all(  # type: ignore[safe-super]
            send, send_counts, recv, recv_counts, channel=channel
        )
