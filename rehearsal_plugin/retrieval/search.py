"""One search over the rows of all ranks, in three collectives.

    1 all_gather   requests: the queries of every rank, with k and filter (see `wire`)
                   each rank finds the nearest of its own rows for all queries
    2 all_gather   scores and slots of these rows
                   each rank merges them; all ranks get the same answer
    3 all_to_all   rows, straight from the rank that holds them to the rank that asked

Scores are computed in the same way on every rank (see `vector_index.similarity`). So the merge needs no further
message, and its answer is that of one search over all rows. Equally near rows are in the order of ranks and slots.

Three rows for one query with k = 2, and the merge of their scores:

    rank 0: slot 4 scores .9, slot 1 scores .2       rank 1: slot 7 scores .5
    answer: rank 0 slot 4, rank 1 slot 7             so rank 0 sends slot 4, and rank 1 sends slot 7
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.index import RowIndex
from rehearsal_plugin.buffer.vector_index.similarity import rank_by
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray
from rehearsal_plugin.distributed.transport import Pending, Transport, wait
from rehearsal_plugin.errors import ClosedError, ExchangeError
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.wire import Request, checked_requests, words_needed

__all__ = ["DistributedSearch"]

ABOUT = 4
"""Int64 numbers that travel behind each row: partition, origin, step admitted, step embedded; see `RowIndex.about`."""

FIRST_ROOM = 512
"""Words of a request before a larger one has been seen."""


@dataclass(frozen=True)
class LocalAnswer:
    """The nearest rows of one rank for the queries of all ranks.

    Attributes:
        scores: `[queries, most]` float64, scores of its nearest rows.
        slots: `[queries, most]` int64, their slots; -1 for none.
        distinct: `[rows]` int64, all those slots, ascending.
        rows: `[rows, row_bytes]` uint8, the rows at `distinct`.
    """

    scores: Float64Array
    slots: IntArray
    distinct: IntArray
    rows: Tensor


class DistributedSearch:
    """Collective search: all ranks of a transport call it equally often and in the same order.

    Args:
        transport: Connection between the ranks.
        timeout_s: Seconds that each collective may take.
        stopped: Called while waiting; True ends the wait with a ClosedError.

    Attributes:
        searches: Searches so far.
        collectives: Collectives so far.
        rows_received: Rows received from other ranks.
    """

    def __init__(self, transport: Transport, timeout_s: float, stopped: Callable[[], bool]) -> None:
        self._transport, self._timeout_s, self._stopped = transport, timeout_s, stopped
        self._room = FIRST_ROOM
        self._failure: Exception | None = None
        self.searches = self.collectives = self.rows_received = 0

    def __call__(
        self,
        index: RowIndex | None,
        queries: Float32Array,
        k: int,
        where: Where,
        now: int,
        *,
        metric: str,
        error: str = "",
    ) -> Retrieved:
        """Search.

        Args:
            index: Index of this rank; None before its first row.
            queries: `[n, width]` float32, prepared for the metric; n may be 0.
            k: Rows for each query.
            where: Filter of the rows.
            now: The present step; ages count from the latest step of all ranks.
            metric: Metric of the index.
            error: Why this rank cannot take part; empty if it can.

        Raises:
            ExchangeError: A collective failed, and every later search fails too; or the requests do not fit together.
            ExchangeTimeout: A rank did not answer in time.
        """
        if self._failure is not None:
            raise ExchangeError(f"an earlier search failed: {self._failure}") from self._failure
        layout = None if index is None else index.buffer.layout
        width, fingerprint = (0, 0) if index is None else (index.width, index.buffer.layout.fingerprint)
        request = Request(queries, k, where, now, width, fingerprint, metric, error)
        try:
            return self._answer_requests(index, layout, self._gather_requests(request))
        finally:
            self.searches += 1

    def _gather_requests(self, request: Request) -> list[Request]:
        """The requests of all ranks, by rank; gathered twice if one exceeds the room, which grows for good."""
        while True:
            gathered = self._gather_words(request.to_words(self.searches, self._room), "queries")
            room, self._room = self._room, max(self._room, words_needed(gathered))
            if room == self._room:
                return checked_requests(gathered, self._transport.rank, self.searches)

    def _answer_requests(
        self, index: RowIndex | None, layout: RowLayout | None, requests: Sequence[Request]
    ) -> Retrieved:
        """Search this rank's rows, merge the answers of all ranks, and fetch the rows for this rank's queries."""
        me, most = self._transport.rank, max(request.k for request in requests)
        counts = [len(request.queries) for request in requests]
        mine = requests[me]
        if not sum(counts) or index is None:  # all ranks have rows, or none has
            return Retrieved.empty(len(mine.queries), mine.k, layout)
        local = self._search_local(index, requests, most)
        gathered = self._gather_words(
            np.concatenate((local.scores.view(np.int64).ravel(), local.slots.ravel())), "scores"
        )
        scores, ranks, slots = _merge_answers(gathered, sum(counts), most, requests)
        first = sum(counts[:me])
        span = slice(first, first + counts[me])
        rows, about = self._fetch_rows(index, local, ranks, slots, counts)
        owners, k = ranks[span], mine.k
        # Rows arrive grouped by owner, in the order of the queries within a group; -1 is no row and sorts first.
        order = np.argsort(owners, axis=None, kind="stable")[np.count_nonzero(owners < 0) :]
        numbers = np.full((owners.size, ABOUT), -1, dtype=np.int64)
        numbers[order] = about
        partition, origin, written, embedded = numbers.reshape(*owners.shape, ABOUT)[:, :k].transpose(2, 0, 1)
        packed = rows.new_zeros((owners.size, rows.shape[1]))
        packed[torch.from_numpy(order)] = rows
        return Retrieved(
            scores=scores[span][:, :k],
            rank=owners[:, :k],
            slot=slots[span][:, :k],
            partition=partition,
            origin=origin,
            written=written,
            embedded=embedded,
            rows=packed.view(*owners.shape, rows.shape[1])[:, :k].reshape(len(owners) * k, rows.shape[1]),
            layout=layout,
        )

    def _search_local(self, index: RowIndex, requests: Sequence[Request], most: int) -> LocalAnswer:
        """The nearest rows of this rank; searched again if one was replaced before it could be read."""
        now = max(request.now for request in requests)
        while True:
            results = [
                index.search(request.queries, most, request.where, now) for request in requests if len(request.queries)
            ]
            scores, slots = (
                np.concatenate([getattr(result, name) for result in results]) for name in ("scores", "slots")
            )
            distinct = np.unique(slots[slots >= 0])
            rows, replaced = index.read(distinct)
            if not len(replaced):
                return LocalAnswer(scores, slots, distinct, rows)
            index.forget(replaced)

    def _fetch_rows(
        self, index: RowIndex, local: LocalAnswer, ranks: IntArray, slots: IntArray, counts: Sequence[int]
    ) -> tuple[Tensor, IntArray]:
        """Send rows of this rank to the ranks that asked; returns the rows that it asked for, and `ABOUT`, by owner."""
        transport, asker = self._transport, np.repeat(np.arange(len(counts)), counts)
        sent = ranks == transport.rank
        rows = local.rows[torch.from_numpy(np.searchsorted(local.distinct, slots[sent]))]
        about = index.about(slots[sent]).view(np.uint8).reshape(len(rows), 8 * ABOUT)
        packed = torch.cat((rows, torch.from_numpy(about)), dim=1).to(transport.device)
        send = np.bincount(np.repeat(asker, sent.sum(axis=1)), minlength=transport.size)
        owners = ranks[asker == transport.rank]
        receive = np.bincount(owners[owners >= 0], minlength=transport.size)
        room = packed.new_empty((int(receive.sum()), packed.shape[1]))
        if (ranks >= 0).any() and transport.size > 1:
            pending = transport.all_to_all(packed, send, room, receive)
            packed = self._wait_for(pending, "rows").cpu()
            self.collectives += 1
            self.rows_received += int(receive.sum() - receive[transport.rank])
        numbers = np.ascontiguousarray(packed[:, -8 * ABOUT :].numpy()).view(np.int64)
        return packed[:, : -8 * ABOUT], numbers.reshape(len(packed), ABOUT)

    def _gather_words(self, words: IntArray, what: str) -> Tensor:
        self.collectives += self._transport.size > 1
        return self._wait_for(self._transport.all_gather(torch.from_numpy(words)), what)

    def _wait_for(self, pending: Pending, what: str) -> Tensor:
        where = f"the exchange of {what} on rank {self._transport.rank} at search {self.searches}"
        try:
            return wait(pending, time.monotonic() + self._timeout_s, self._stopped, where)
        except (ExchangeError, ClosedError) as error:
            self._failure = error
            raise


def _merge_answers(
    gathered: Tensor, queries: int, most: int, requests: Sequence[Request]
) -> tuple[Float64Array, IntArray, IntArray]:
    """Merge the answers of all ranks: scores, ranks and slots, `[queries, most]` each; rank and slot -1 for none."""
    size = len(gathered)
    both = gathered.numpy().reshape(size, 2, queries, most).transpose(1, 2, 0, 3).reshape(2, queries, size * most)
    scores, slots = np.ascontiguousarray(both[0]).view(np.float64), both[1]
    ranks = np.broadcast_to(np.repeat(np.arange(size), most), slots.shape)
    order = rank_by(scores, ranks, slots)[:, :most]
    scores, ranks, slots = (np.take_along_axis(part, order, axis=1) for part in (scores, ranks, slots))
    k = np.repeat([request.k for request in requests], [len(request.queries) for request in requests])
    none = (slots < 0) | (np.arange(most) >= k[:, None])
    return np.where(none, -np.inf, scores), np.where(none, -1, ranks), np.where(none, -1, slots)
