"""One search over the rows of all ranks: three collectives, and rows travel straight from owner to asker.

Every rank gathers the queries of all, finds the nearest of its own rows, and gathers what the others found: scores and
slots. As scores are computed alike everywhere (see `scores`), all ranks merge them to the same answer without another
word, the one that a search over all rows would give; equally near rows come in the order of their ranks and slots. So
every rank knows which of its rows to send to whom.
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
from rehearsal_plugin.retrieval.wire import Request, agreed, needed

__all__ = ["DistributedSearch"]

ABOUT = 4
"""Numbers that travel with a row; see `RowIndex.about`."""

FIRST_ROOM = 512  # words of a request


@dataclass(frozen=True)
class Own:
    """What one rank has for the queries of all, `[queries, most]` each, and the rows behind it.

    Attributes:
        scores: Of its nearest rows.
        slots: Where they are.
        distinct: `[rows]` int64, all those slots in ascending order.
        rows: `[rows, row_bytes]` uint8, what is there.
    """

    scores: Float64Array
    slots: IntArray
    distinct: IntArray
    rows: Tensor


class DistributedSearch:
    """Searches that all ranks of a transport make together, equally often and in the same order.

    Args:
        transport: The ranks.
        timeout_s: Deadline of each wait.
        stopped: Asked while waiting; True gives up.

    Attributes:
        searches: How many there were.
        collectives: Collectives issued.
        rows_received: Rows that came from other ranks.
    """

    def __init__(self, transport: Transport, timeout_s: float, stopped: Callable[[], bool]) -> None:
        self._transport, self._timeout_s, self._stopped = transport, timeout_s, stopped
        self._room = FIRST_ROOM
        self._failure: Exception | None = None
        self.searches = self.collectives = self.rows_received = 0

    def __call__(
        self, index: RowIndex | None, queries: Float32Array, k: int, where: Where, now: int, **told: str
    ) -> Retrieved:
        """Search.

        Args:
            index: This rank's; None where it has no rows yet.
            queries: `[n, width]` float32, prepared for the metric; n may be 0.
            k: Rows for each.
            where: Which rows count for them.
            now: The present step; ages go by that of the rank that is furthest.
            told: See `Request`: `metric`, and `error` where the rank cannot take part.

        Raises:
            ExchangeError: The ranks cannot be brought together; every later search says so.
            ExchangeTimeout: A rank did not come in time.
        """
        if self._failure is not None:
            raise ExchangeError(f"an earlier search failed: {self._failure}") from self._failure
        layout = None if index is None else index.buffer.layout
        width, fingerprint = (0, 0) if index is None else (index.width, index.buffer.layout.fingerprint)
        own = Request(queries, k, where, now, width, fingerprint, **told)
        try:
            return self._answer(index, layout, self._requests(own))
        finally:
            self.searches += 1

    def _requests(self, own: Request) -> list[Request]:
        """Those of all ranks; twice where one is larger than all before it."""
        while True:
            gathered = self._gather(own.words(self.searches, self._room), "queries")
            room, self._room = self._room, max(self._room, needed(gathered))
            if room == self._room:
                return agreed(gathered, self._transport.rank, self.searches)

    def _answer(self, index: RowIndex | None, layout: RowLayout | None, requests: Sequence[Request]) -> Retrieved:
        me, most = self._transport.rank, max(request.k for request in requests)
        counts = [len(request.queries) for request in requests]
        asked = requests[me]
        if not sum(counts) or index is None:  # all ranks have rows, or none has
            return Retrieved.nothing(len(asked.queries), asked.k, layout)
        own = self._own(index, requests, most)
        gathered = self._gather(np.concatenate((own.scores.view(np.int64).ravel(), own.slots.ravel())), "scores")
        scores, ranks, slots = _merged(gathered, sum(counts), most, requests)
        first = sum(counts[:me])
        mine = slice(first, first + counts[me])
        rows, about = self._fetch(index, own, ranks, slots, counts)
        owners, k = ranks[mine], asked.k  # as rows arrive: grouped by owner, and then in the order of the queries
        order = np.argsort(owners, axis=None, kind="stable")[np.count_nonzero(owners < 0) :]
        told = np.full((owners.size, ABOUT), -1, dtype=np.int64)
        told[order] = about
        partition, origin, written, embedded = told.reshape(*owners.shape, ABOUT)[:, :k].transpose(2, 0, 1)
        packed = rows.new_zeros((owners.size, rows.shape[1]))
        packed[torch.from_numpy(order)] = rows
        return Retrieved(
            scores=scores[mine][:, :k],
            rank=owners[:, :k],
            slot=slots[mine][:, :k],
            partition=partition,
            origin=origin,
            written=written,
            embedded=embedded,
            rows=packed.view(*owners.shape, rows.shape[1])[:, :k].reshape(len(owners) * k, rows.shape[1]),
            layout=layout,
        )

    def _own(self, index: RowIndex, requests: Sequence[Request], most: int) -> Own:
        """This rank's nearest rows; none that is replaced before it was read."""
        now = max(request.now for request in requests)
        while True:
            found = [
                index.search(request.queries, most, request.where, now) for request in requests if len(request.queries)
            ]
            scores, slots = (np.concatenate([getattr(one, name) for one in found]) for name in ("scores", "slots"))
            distinct = np.unique(slots[slots >= 0])
            rows, gone = index.read(distinct)
            if not len(gone):
                return Own(scores, slots, distinct, rows)
            index.forget(gone)

    def _fetch(
        self, index: RowIndex, own: Own, ranks: IntArray, slots: IntArray, counts: Sequence[int]
    ) -> tuple[Tensor, IntArray]:
        """Send this rank's rows to those who want them; the rows that it wants, and about them, grouped by owner."""
        transport, reader = self._transport, np.repeat(np.arange(len(counts)), counts)
        sent = ranks == transport.rank
        rows = own.rows[torch.from_numpy(np.searchsorted(own.distinct, slots[sent]))]
        about = index.about(slots[sent]).view(np.uint8).reshape(len(rows), 8 * ABOUT)
        packed = torch.cat((rows, torch.from_numpy(about)), dim=1).to(transport.device)
        send = np.bincount(np.repeat(reader, sent.sum(axis=1)), minlength=transport.size)
        wanted = ranks[reader == transport.rank]
        receive = np.bincount(wanted[wanted >= 0], minlength=transport.size)
        room = packed.new_empty((int(receive.sum()), packed.shape[1]))
        if (ranks >= 0).any() and transport.size > 1:
            pending = transport.all_to_all(packed, send.tolist(), room, receive.tolist())
            packed = self._wait(pending, "rows").cpu()
            self.collectives += 1
            self.rows_received += int(receive.sum() - receive[transport.rank])
        numbers = np.ascontiguousarray(packed[:, -8 * ABOUT :].numpy()).view(np.int64)
        return packed[:, : -8 * ABOUT], numbers.reshape(len(packed), ABOUT)

    def _gather(self, words: IntArray, what: str) -> Tensor:
        self.collectives += self._transport.size > 1
        return self._wait(self._transport.all_gather(torch.from_numpy(words)), what)

    def _wait(self, pending: Pending, what: str) -> Tensor:
        where = f"the exchange of {what} on rank {self._transport.rank} at search {self.searches}"
        try:
            return wait(pending, time.monotonic() + self._timeout_s, self._stopped, where)
        except (ExchangeError, ClosedError) as error:
            self._failure = error
            raise


def _merged(
    gathered: Tensor, queries: int, most: int, requests: Sequence[Request]
) -> tuple[Float64Array, IntArray, IntArray]:
    """The nearest rows of all ranks: scores, ranks and slots, `[queries, most]` each; rank and slot -1 for none."""
    size = len(gathered)
    both = gathered.numpy().reshape(size, 2, queries, most).transpose(1, 2, 0, 3).reshape(2, queries, size * most)
    scores, slots = np.ascontiguousarray(both[0]).view(np.float64), both[1]
    ranks = np.broadcast_to(np.repeat(np.arange(size), most), slots.shape)
    order = rank_by(scores, ranks, slots)[:, :most]
    scores, ranks, slots = (np.take_along_axis(part, order, axis=1) for part in (scores, ranks, slots))
    k = np.repeat([request.k for request in requests], [len(request.queries) for request in requests])
    none = (slots < 0) | (np.arange(most) >= k[:, None])
    return np.where(none, -np.inf, scores), np.where(none, -1, ranks), np.where(none, -1, slots)
