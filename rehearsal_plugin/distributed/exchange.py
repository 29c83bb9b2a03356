"""One step of the distributed buffer: two collectives, a draw between them, a third where rows get new state.

Exchange k moves the rows that were drawn after exchange k - 1 and gathers the headers from which the next rows
are drawn. So all collectives can be issued at one fixed point of the step, with nothing to wait for in
between, and whoever issues them (the training thread or the background) changes nothing in what is drawn.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.staging import BoundedRows
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.absent_partitions import ABSENT_AFTER, warn_of_absent_partitions
from rehearsal_plugin.distributed.census import Census
from rehearsal_plugin.distributed.draw import Moves, Numbers, Plan, draw, draw_from_stream, joined, plan
from rehearsal_plugin.distributed.global_counts import counts_partitions
from rehearsal_plugin.distributed.groups import RankGroup
from rehearsal_plugin.distributed.header import Headers, Notes
from rehearsal_plugin.distributed.header_round import Holdings
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing, Posted, Refresh
from rehearsal_plugin.distributed.mixture import Weights
from rehearsal_plugin.distributed.nearest_draw import NearestDraw
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.distributed.row_width import RowWidth
from rehearsal_plugin.distributed.transport import Pending, wait

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
        group: The ranks.
        config: The `rehearsal` section. By its `sampling.weights`, rows are drawn with the same chance for every row
            (`uniform`) or partition (`balanced`), or for every row that any rank was ever offered (`stream`); in
            proportion to a row's score (`score`), so that a row can come several times in one draw; in part because
            they are near to new rows (`retrieved`); or with a weight by partition.
        rank: Of this process; keys which of its rows it sends.
        draws: Independent draws of a step.
        metrics: Where bytes and times are counted.
        stopped: Asked while waiting; True gives up.
        run: This rank's number for the run, see `Opening`.

    Attributes:
        census: What ranks hold and want.
        nearest_draw: Finds rows near to the new ones; None for other weights than `retrieved`.
        device: Where rows to be sent live.
    """

    def __init__(
        self,
        buffer: RehearsalBuffer,
        group: RankGroup,
        config: RehearsalConfig,
        *,
        rank: int,
        draws: int,
        metrics: Metrics,
        stopped: Callable[[], bool],
        run: int = 0,
    ) -> None:
        self._buffer, self._transport, self._metrics = buffer, group.transport, metrics
        self._many = self._transport.size > 1 or group.everyone is not None
        self._always_sends = group.everyone is not None and group.transport.numbered
        self._memory = RecycledMemory()
        self._draws, self._stream, self._rank = draws, group.stream, rank
        self._numbers = RandomStream(config.seed, Purpose.DRAW)
        self._own_numbers = RandomStream(config.seed, Purpose.PICK)
        sampling = config.sampling
        self._by_score, self._by_partition = sampling.weights == "score", counts_partitions(config)
        self._by_stream = sampling.weights == "stream"
        self.nearest_draw: NearestDraw | None = None
        if sampling.weights == "retrieved":
            self.nearest_draw = NearestDraw(buffer, config, self._transport.rank, self._transport.size, draws)
        self._timeout_s, self._stopped = config.exchange.timeout_s, stopped
        self.device = self._transport.device
        # Ranks with different seeds or weights would draw different plans.
        weights = json.dumps(config.drawn_by, sort_keys=True)
        fingerprint = buffer.layout.fingerprint ^ config.seed ^ zlib.crc32(weights.encode())
        self._config = config
        self._exchanges, self._warned = 0, False  # exchanges since absent partitions were looked for
        self.census = Census(group, config, fingerprint, run)
        self._width = RowWidth(buffer)

    def post(
        self,
        step: int,
        request: Request,
        outgoing: Outgoing | None,
        staged: BoundedRows,
        refresh: Refresh | None = None,
        notes: Notes = NO_NOTES,
        proposed: Weights | None = None,
    ) -> Posted:
        """Issue the collectives of a step, without waiting.

        Args:
            step: Number of the exchange, the same on all ranks.
            request: Rows that this rank shall get in each draw, two exchanges later; those promised where it has no
                headers.
            outgoing: The rows drawn after the last exchange; None at first.
            staged: The new rows of this step.
            refresh: New state for rows that arrived earlier; None on all ranks or on none.
            notes: What this rank tells the others beside it; the mixture is added here.
            proposed: The weights by partition that this rank wants; see `Mixture`.
        """
        rows = self._send_rows(outgoing) if outgoing and (outgoing.plan.moved or self._always_sends) else None
        back = None if refresh is None else self._send_state_back(refresh)
        nearest = None if self.nearest_draw is None else self.nearest_draw.ask(staged.rows, request.rows, step)
        headers = self.census.post(step, request, self._holdings(staged), notes, proposed, nearest)
        if self._many:
            self._metrics.collectives += headers.count + (rows is not None) + (back is not None)
        refreshed = None if refresh is None else refresh.source
        return Posted(step, headers, rows, outgoing, back, refreshed)

    def prepare(self, posted: Posted) -> Outgoing:
        """Wait for the headers, draw, and read the rows that this rank will send.

        Raises:
            ExchangeError: A peer is gone or at odds with this rank.
            ExchangeTimeout: The headers did not come in time.
        """
        headers = self._hear(posted)
        with self._metrics.timed("drawn_ms"):
            drawn = plan(self._draw(headers, posted.step), self._transport.size)
            slots = self._slots_of(drawn)
            layout, sending = self._width.packing(self.census.width)
            rows = sending.read(slots)
            written = self._buffer.written(slots) if self._buffer.layout.state else slots[:0]
            # Here in the background; and waited for, as the transport may send from host memory at once.
            return Outgoing(rows.to(self._transport.device), layout, drawn, slots, written)

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

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows and told, as arrays and numbers."""
        neighbours = None if self.nearest_draw is None else self.nearest_draw.state_dict()
        return {
            "census": self.census.state_dict(),
            "mixture": self.census.mixture.state_dict(),
            "neighbours": neighbours,
            "row_width": self._width.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank of as many, or what an earlier release did.

        Raises:
            ValueError: It contradicts itself, or is that of other ranks.
        """
        self.census.load_state_dict(state["census"], state["mixture"])
        if self.nearest_draw is not None:
            self.nearest_draw.load_state_dict(state["neighbours"])
        if "row_width" in state:
            self._width.load_state_dict(state["row_width"])

    def close(self) -> None:
        """Leave the buffer alone from now on, when nothing is under way any more."""
        if self.nearest_draw is not None:
            self.nearest_draw.close()

    def _hear(self, posted: Posted) -> Headers | None:
        """Take in the headers of this exchange, if it has any; returns those of the ranks that draw from each other."""
        headers, changed = self.census.hear(
            posted.headers, posted.step, lambda pending: self._wait(pending, posted.step, "headers").numpy()
        )
        if changed and self._exchanges >= ABSENT_AFTER:
            self._exchanges, self._warned = 0, True
        self._exchanges += 1
        if self._exchanges == ABSENT_AFTER and self._transport.rank == 0:
            self._warn_of_absent_partitions()
        return headers

    def _draw(self, headers: Headers | None, step: int) -> Moves:
        """The rows that this rank sends and gets in the next exchange, by the last headers of all ranks."""
        table, requests, rank = self.census.table, self.census.requests(step), self._transport.rank
        numbers = Numbers(self._numbers.at(step, self._stream), self._own_numbers.at(step, self._rank))
        if self._by_stream:
            return draw_from_stream(table.counts, table.offers, requests, rank, numbers, self._draws)
        if self.nearest_draw is None:
            return draw(table.counts, requests, rank, numbers, self._draws, self.census.weights())
        assert headers is not None  # they have questions and answers in every exchange
        nearest, missing = self.nearest_draw.draw(headers.nearest, table.counts, requests, step, numbers.shared)
        self._metrics.rows_retrieved += len(nearest.owner)
        return joined(nearest, draw(table.counts, missing, rank, numbers, self._draws))

    def admissible(self, staged: BoundedRows, step: int) -> BoundedRows:
        """Those of the new rows of a step that other ranks can be sent, as far as they are told; see `RowWidth`."""
        return self._width.admissible(staged, self.census.width) if self.census.is_silent(step) else staged

    def _holdings(self, staged: BoundedRows) -> Holdings:
        keys, sizes = self._count_rows()
        index = self._buffer.slot_index
        is_settled = index.count >= index.capacity and not (self._by_partition or self._by_score or self._by_stream)
        return Holdings(keys, sizes, self._count_offers(), is_settled, self._width.tell(staged))

    def _count_rows(self) -> tuple[IntArray, IntArray]:
        """Partition keys and rows of each on this rank; one count where rows are not drawn by partition."""
        if self._by_partition:
            return self._buffer.counts()
        count = self._buffer.slot_index.tickets if self._by_score else len(self._buffer)
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
        keys, holder = self.census.table.keys, "no rank has held a row"
        if not self._by_partition:  # ranks do not tell each other's partitions
            keys, holder = self._buffer.counts()[0], "rank 0 holds no row"
        warn_of_absent_partitions(self._config, self.census.mixture.in_force, keys, holder, mixture_only=self._warned)

    def _slots_of(self, drawn: Plan) -> IntArray:
        if self._by_partition:
            return self._buffer.slots(self.census.table.keys[drawn.partition], drawn.index)
        if self._by_score:
            return self._buffer.slot_index.holders(drawn.index)
        return drawn.index  # slots are taken without gaps, so in a draw over all rows the index is the slot

    def _send_rows(self, outgoing: Outgoing) -> Pending:
        drawn, rank = outgoing.plan, self._transport.rank
        rows = outgoing.rows
        received = self._memory.rows(rows, int(drawn.recv_counts.sum()))  # whoever gets them may hold on to them
        metrics, row_bytes = self._metrics, rows.shape[1]
        rows_sent = len(rows) - int(drawn.send_counts[rank])
        rows_received = len(received) - int(drawn.recv_counts[rank])
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
