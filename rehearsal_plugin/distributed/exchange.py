"""One step of the distributed buffer: two collectives, a draw between them, a third where rows get new state.

Exchange k moves the rows that were drawn after exchange k - 1 and gathers the headers from which the next rows
are drawn. So all collectives can be issued at one fixed point of the step, with nothing to wait for in
between, and whoever issues them (the training thread or the background) changes nothing in what is drawn.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.staging import RowPool
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.absent_partitions import ABSENT_AFTER, warn_of_absent_partitions
from rehearsal_plugin.distributed.draw import Draws, Plan, draw, draw_from_stream, joined, plan
from rehearsal_plugin.distributed.global_counts import GlobalCounts, counts_partitions, least_pairs
from rehearsal_plugin.distributed.header import NOTES, Headers, Notes, Word, compose
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing, Posted, Refresh
from rehearsal_plugin.distributed.mixture import Mixture, Weights
from rehearsal_plugin.distributed.nearest_draw import NearestDraw
from rehearsal_plugin.distributed.opening import Opening
from rehearsal_plugin.distributed.transport import Pending, Transport, wait

__all__ = ["Exchange"]

NO_NOTES = Notes()


class Exchange:
    """Draws rows from the buffers of all ranks of a transport.

    | call | thread |
    |---|---|
    | `post` | training with NCCL, Horovod and `launch: inline`, else background |
    | `apply`, `prepare`, `receive` | background |
    | attributes, `close` | training, while nothing runs in the background |

    Args:
        buffer: This rank's rows.
        transport: The ranks.
        config: The `rehearsal` section. By its `sampling.weights`, rows are drawn with the same chance for every row
            (`uniform`) or partition (`balanced`), or for every row that any rank was ever offered (`stream`); in
            proportion to a row's score (`score`), so that a row can come several times in one draw; in part because
            they are near to new rows (`retrieved`); or with a weight by partition.
        draws: Independent draws of a step.
        stream: Keys the draws; ranks that draw from themselves alone use different ones.
        metrics: Where bytes and times are counted.
        stopped: Asked while waiting; True gives up.
        run: This rank's number for the run, see `Opening`.

    Attributes:
        global_counts: What all ranks hold.
        mixture: The share of each partition.
        notes: `[ranks, NOTES]` int64, the words of other layers in the last headers; see `header`.
        nearest_draw: Finds rows near to the new ones; None for other weights than `retrieved`.
        device: Where rows to be sent live.
        run: The run of all ranks; None before the first exchange.
    """

    def __init__(
        self,
        buffer: RehearsalBuffer,
        transport: Transport,
        config: RehearsalConfig,
        *,
        draws: int,
        stream: int,
        metrics: Metrics,
        stopped: Callable[[], bool],
        run: int = 0,
    ) -> None:
        self._buffer, self._transport, self._metrics = buffer, transport, metrics
        self._memory = RecycledMemory()
        self._draws, self._stream, self._numbers = draws, stream, RandomStream(config.seed, Purpose.DRAW)
        sampling = config.sampling
        self._by_score, self._by_partition = sampling.weights == "score", counts_partitions(config)
        self._by_stream = sampling.weights == "stream"
        self.mixture = Mixture(sampling)
        self.nearest_draw: NearestDraw | None = None
        if sampling.weights == "retrieved":
            self.nearest_draw = NearestDraw(buffer, config, transport.rank, transport.size, draws)
        self._timeout_s, self._stopped = config.exchange.timeout_s, stopped
        self.device = transport.device
        # Ranks with different seeds or weights would draw different plans.
        weights = json.dumps(config.drawn_by, sort_keys=True)
        self._fingerprint = buffer.layout.fingerprint ^ config.seed ^ zlib.crc32(weights.encode())
        self._config = config
        self._exchanges, self._warned = 0, False  # exchanges since absent partitions were looked for
        self._opening: Opening | None = Opening(config, run)
        self.run: int | None = None
        self.global_counts = GlobalCounts(
            transport.rank, transport.size, least_pairs(config), with_offers=self._by_stream
        )
        self.notes = np.zeros((transport.size, NOTES), dtype=np.int64)
        self._sending = RowPool(buffer.layout.row_bytes, buffer.device)

    def post(
        self,
        step: int,
        request: int,
        outgoing: Outgoing | None,
        staged: Tensor,
        refresh: Refresh | None = None,
        notes: Notes = NO_NOTES,
        proposed: Weights | None = None,
    ) -> Posted:
        """Issue the collectives of a step, without waiting.

        Args:
            step: Number of the exchange, the same on all ranks.
            request: Rows that this rank shall get in each draw, two exchanges later.
            outgoing: The rows drawn after the last exchange; None at first.
            staged: `[n, row_bytes]` uint8, the new rows of this step.
            refresh: New state for rows that arrived earlier; None on all ranks or on none.
            notes: What this rank tells the others beside it; the mixture is added here.
            proposed: The weights by partition that this rank wants; see `Mixture`.
        """
        rows = self._send_rows(outgoing) if outgoing and outgoing.plan.moved else None
        back = None if refresh is None else self._send_state_back(refresh)
        changes, pairs = self.global_counts.changes(*self._count_rows(), self._count_offers())
        nearest = None if self.nearest_draw is None else self.nearest_draw.ask(staged, request, step)
        notes = replace(notes, mixture=Mixture.digest(proposed))
        room = self.global_counts.room
        opening = None if self._opening is None else self._opening.words
        header = compose(self._fingerprint, step, request, changes, notes, pairs, room, nearest, opening)
        if self._transport.size > 1:
            self._metrics.collectives += 1 + (rows is not None) + (back is not None)
        headers = self._transport.all_gather(torch.from_numpy(header))
        refreshed = None if refresh is None else refresh.source
        return Posted(step, headers, rows, outgoing, back, refreshed, proposed)

    def prepare(self, posted: Posted) -> Outgoing:
        """Wait for the headers, draw, and read the rows that this rank will send.

        Raises:
            ExchangeError: A peer is gone or at odds with this rank.
            ExchangeTimeout: The headers did not come in time.
        """
        gathered = self._wait(posted.headers, posted.step, "headers")
        with self._metrics.timed("drawn_ms"):
            opening = 0 if self._opening is None else len(self._opening.words)
            headers = Headers(gathered.numpy(), self.global_counts.room, opening)
            drawn = plan(self._draw(headers, posted), self._transport.rank, self._transport.size)
            slots = self._slots_of(drawn)
            rows = self._sending.take(len(slots))
            self._buffer.read(slots, rows)
            written = self._buffer.written(slots) if self._buffer.layout.state else slots[:0]
            # Here in the background; and waited for, as the transport may send from host memory at once.
            return Outgoing(rows.to(self._transport.device), drawn, slots, written)

    def receive(self, posted: Posted) -> Arrival | None:
        """Wait for the rows of this exchange, on the transport's device; None when there are none.

        Raises:
            ExchangeError: A peer is gone.
            ExchangeTimeout: The rows did not come in time.
        """
        if posted.rows is None or posted.source is None:
            return None
        return Arrival(self._wait(posted.rows, posted.step, "rows"), posted.source)

    def apply(self, posted: Posted) -> None:
        """Wait for the new state that readers sent back, and store it, unless a row has been replaced since.

        Raises:
            ExchangeError: A peer is gone.
            ExchangeTimeout: The state did not come in time.
        """
        if posted.refresh is None or posted.refreshed is None:
            return
        packed = self._wait(posted.refresh, posted.step, "state").to(self._buffer.device)
        slots = posted.refreshed.slots
        current = (self._buffer.written(slots) == posted.refreshed.written) & packed[:, -1].bool().cpu().numpy()
        packed = packed[torch.from_numpy(np.flatnonzero(current)).to(packed.device)]
        self._buffer.update_fields(slots[current], self._buffer.layout.state_of(packed))

    def close(self) -> None:
        """Leave the buffer alone from now on, when nothing is under way any more."""
        if self.nearest_draw is not None:
            self.nearest_draw.close()

    def _draw(self, headers: Headers, posted: Posted) -> Draws:
        """The rows of all ranks that move in the next exchange, by the headers of all ranks."""
        if self._opening is not None:
            self.run, self._opening = self._opening.agree(headers.opening, self._transport.rank), None
        headers.check(self._transport.rank)
        self.global_counts.absorb(headers)
        self.notes = headers.notes
        if self.mixture.agree(headers.of(Word.MIXTURE), posted.proposed) and self._exchanges >= ABSENT_AFTER:
            self._exchanges, self._warned = 0, True
        self._exchanges += 1
        if self._exchanges == ABSENT_AFTER and self._transport.rank == 0:
            self._warn_of_absent_partitions()
        counts, requests = self.global_counts.counts, headers.of(Word.REQUEST)
        rng = self._numbers.at(posted.step, self._stream)
        if self._by_stream:
            return draw_from_stream(counts, self.global_counts.offers, requests, rng, self._draws)
        if self.nearest_draw is None:
            return draw(counts, requests, rng, self._draws, self.mixture.weights(self.global_counts.keys))
        nearest, missing = self.nearest_draw.draw(headers.nearest, counts, requests, posted.step, rng)
        self._metrics.rows_retrieved += int(np.count_nonzero(nearest.reader == self._transport.rank))
        return joined(nearest, draw(counts, missing, rng, self._draws))

    def _count_rows(self) -> tuple[IntArray, IntArray]:
        """Partition keys and rows of each on this rank; one count where rows are not drawn by partition."""
        if self._by_partition:
            return self._buffer.counts()
        count = self._buffer.tickets if self._by_score else len(self._buffer)
        return np.zeros(1, dtype=np.int64), np.array([count])

    def _count_offers(self) -> IntArray | None:
        """Rows offered so far of each partition in the order of `_count_rows`; None where nobody asks for them."""
        if not self._by_stream:
            return None
        index = self._buffer.slot_index
        if self._by_partition and index.partitions is not None:
            return index.partitions.offered
        return np.array([index.offered])

    def _warn_of_absent_partitions(self) -> None:
        keys, holder = self.global_counts.keys, "no rank has held a row"
        if not self._by_partition:  # ranks do not tell each other's partitions
            keys, holder = self._buffer.counts()[0], "rank 0 holds no row"
        warn_of_absent_partitions(self._config, self.mixture.in_force, keys, holder, mixture_only=self._warned)

    def _slots_of(self, drawn: Plan) -> IntArray:
        if self._by_partition:
            return self._buffer.slots(self.global_counts.keys[drawn.partition], drawn.index)
        if self._by_score:
            return self._buffer.holders(drawn.index)
        return drawn.index  # slots are taken without gaps, so in a draw over all rows the index is the slot

    def _send_rows(self, outgoing: Outgoing) -> Pending:
        drawn, rank = outgoing.plan, self._transport.rank
        rows = outgoing.rows
        received = self._memory.rows(rows, sum(drawn.recv_counts))  # whoever gets them may hold on to them
        metrics, row_bytes = self._metrics, self._buffer.layout.row_bytes
        rows_sent, rows_received = len(rows) - drawn.send_counts[rank], len(received) - drawn.recv_counts[rank]
        metrics.rows_sent += rows_sent
        metrics.rows_received += rows_received
        metrics.bytes_sent += rows_sent * row_bytes
        metrics.bytes_received += rows_received * row_bytes
        return self._transport.all_to_all(rows, drawn.send_counts, received, drawn.recv_counts)

    def _send_state_back(self, refresh: Refresh) -> Pending:
        """The way of the rows, backwards: readers send, owners receive."""
        drawn, packed = refresh.source.plan, refresh.packed.to(self._transport.device)
        received = packed.new_empty((len(refresh.source.slots), packed.shape[1]))
        return self._transport.all_to_all(packed, drawn.recv_counts, received, drawn.send_counts, channel="state")

    def _wait(self, pending: Pending, step: int, what: str) -> Tensor:
        where = f"the exchange of {what} on rank {self._transport.rank} at step {step}"
        with self._metrics.timed("exchanged_ms"):
            return wait(pending, time.monotonic() + self._timeout_s, self._stopped, where)
