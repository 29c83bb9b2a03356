"""One step of the distributed buffer: two collectives, a draw between them.

Exchange k moves the rows that were drawn after exchange k - 1 and gathers the headers from which the next rows
are drawn. So both collectives can be issued at one fixed point of the step, with nothing to wait for in
between, and whoever issues them (the training thread or the background) changes nothing in what is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.census import Census
from rehearsal_plugin.metrics import Metrics
from rehearsal_plugin.pool import RowPool
from rehearsal_plugin.rng import Purpose, generator
from rehearsal_plugin.sampling import Plan, draw, plan
from rehearsal_plugin.shares import IntArray
from rehearsal_plugin.transport import Pending, Transport, wait

__all__ = ["Arrival", "Exchange", "Outgoing", "Posted"]


@dataclass(frozen=True)
class Outgoing:
    """Rows `[sent, row_bytes]` for their readers, on the transport's device, and the plan that they follow."""

    rows: Tensor
    plan: Plan


@dataclass(frozen=True)
class Posted:
    """Both collectives of a step in flight; `rows` is None when no rank draws anything."""

    step: int
    headers: Pending
    rows: Pending | None
    turns: IntArray


@dataclass(frozen=True)
class Arrival:
    """Rows `[received, row_bytes]` uint8 from their owners, and which draw gave each, `[received]` int64."""

    rows: Tensor
    turns: IntArray


class Exchange:
    """Draws rows from the buffers of all ranks of a transport.

    Args:
        buffer: This rank's rows.
        transport: The ranks.
        partitioned: Whether every partition has the same chance, instead of every row.
        turns: Independent draws of a step.
        seed: Keys the draws; the same on all ranks.
        stream: Keys the draws too; ranks that draw from themselves alone use different ones.
        timeout_s: Deadline of the waits of one step.
        metrics: Where bytes and times are counted.
        stopped: Asked while waiting; True gives up.
    """

    def __init__(
        self,
        buffer: RehearsalBuffer,
        transport: Transport,
        *,
        partitioned: bool,
        turns: int,
        seed: int,
        stream: int,
        timeout_s: float,
        metrics: Metrics,
        stopped: Callable[[], bool],
    ) -> None:
        self._buffer, self._transport, self._metrics = buffer, transport, metrics
        self._partitioned, self._turns, self._seed, self._stream = partitioned, turns, seed, stream
        self._timeout_s, self._stopped = timeout_s, stopped
        layout = buffer.layout
        fingerprint = layout.fingerprint ^ seed  # ranks with different seeds would draw different plans
        self._census = Census(transport.rank, transport.size, fingerprint, pairs=64 if partitioned else 1)
        self._sending = RowPool(layout.row_bytes, buffer.device)
        self._receiving = RowPool(layout.row_bytes, transport.device)

    def post(self, step: int, request: int, outgoing: Outgoing | None) -> Posted:
        """Issue the collectives of a step, without waiting.

        Args:
            step: Number of the exchange, the same on all ranks.
            request: Rows that this rank shall get in each turn, two exchanges later.
            outgoing: The rows drawn after the last exchange; None at first.
        """
        rows = self._send(outgoing) if outgoing and outgoing.plan.moved else None
        header = self._census.header(step, request, *self._counts())
        if self._transport.size > 1:
            self._metrics.collectives += 1 + (rows is not None)
        turns = np.empty(0, dtype=np.int64) if outgoing is None else outgoing.plan.turns
        return Posted(step, self._transport.all_gather(torch.from_numpy(header)), rows, turns)

    def prepare(self, posted: Posted) -> Outgoing:
        """Wait for the headers, draw, and read the rows that this rank will send.

        Raises:
            ExchangeError: A peer is gone or at odds with this rank.
            ExchangeTimeout: The headers did not come in time.
        """
        headers = self._wait(posted.headers, posted.step, "headers")
        with self._metrics.timed("drawn_ms"):
            requests = self._census.absorb(headers.numpy())
            rng = generator(self._seed, Purpose.DRAW, posted.step, self._stream)
            draws = draw(self._census.counts, requests, rng, self._turns)
            drawn = plan(draws, self._transport.rank, self._transport.size)
            rows = self._sending.take(len(drawn.index))
            self._buffer.read(self._slots(drawn), rows)
            # Here in the background; and waited for, as the transport may send from host memory at once.
            return Outgoing(rows.to(self._transport.device), drawn)

    def receive(self, posted: Posted) -> Arrival | None:
        """Wait for the rows of this exchange, on the transport's device; None when there are none.

        Raises:
            ExchangeError: A peer is gone.
            ExchangeTimeout: The rows did not come in time.
        """
        return None if posted.rows is None else Arrival(self._wait(posted.rows, posted.step, "rows"), posted.turns)

    def _counts(self) -> tuple[IntArray, IntArray]:
        if self._partitioned:
            return self._buffer.counts()
        return np.zeros(1, dtype=np.int64), np.array([len(self._buffer)])

    def _slots(self, drawn: Plan) -> IntArray:
        # Slots are taken without gaps, so that in a draw over all rows the index is the slot.
        if not self._partitioned:
            return drawn.index
        return self._buffer.slots(self._census.keys[drawn.partition], drawn.index)

    def _send(self, outgoing: Outgoing) -> Pending:
        drawn, rank = outgoing.plan, self._transport.rank
        received = self._receiving.take(sum(drawn.recv_counts))
        rows = outgoing.rows
        sent, got = len(rows) - drawn.send_counts[rank], len(received) - drawn.recv_counts[rank]
        metrics, row_bytes = self._metrics, self._buffer.layout.row_bytes
        metrics.rows_sent += sent
        metrics.rows_received += got
        metrics.bytes_sent += sent * row_bytes
        metrics.bytes_received += got * row_bytes
        return self._transport.all_to_all(rows, drawn.send_counts, received, drawn.recv_counts)

    def _wait(self, pending: Pending, step: int, what: str) -> Tensor:
        where = f"the exchange of {what} on rank {self._transport.rank} at step {step}"
        with self._metrics.timed("exchanged_ms"):
            return wait(pending, time.monotonic() + self._timeout_s, self._stopped, where)
