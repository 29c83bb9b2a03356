"""The vector index of one rank: finds rows by their embedding, in step with the buffer."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.vector_index.approximate import Approximate
from rehearsal_plugin.buffer.vector_index.exact import nearest_vectors
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.known_rows import Embed, KnownRows, rows_at
from rehearsal_plugin.buffer.vector_index.similarity import rank_by, scores_of
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray, Mask

__all__ = ["Found", "RowIndex"]

MARGIN = 16  # rows that IVF and HNSW are asked for beyond the k-th
FEW = 256  # excluded rows that an exact search passes over one by one


@dataclass(frozen=True)
class Found:
    """Rows of one rank, nearest first.

    Attributes:
        scores: `[q, k]` float64, the higher the nearer; minus infinity where there are fewer than k rows.
        slots: `[q, k]` int64, -1 there.
    """

    scores: Float64Array
    slots: IntArray


class RowIndex:
    """Finds rows of a buffer by their embedding, in step with what the buffer admits and evicts.

    One lock covers the index; it is not held while rows are read.

    | call | thread |
    |---|---|
    | `sync` | wherever no row is being written: training with no job in flight, or a job after its own writes |
    | `store` | training, no job in flight |
    | `search`, `read`, `forget` | any; a search goes by the rows of the last `sync`, and `read` says which are gone |

    Args:
        buffer: This rank's rows.
        config: The section `rehearsal.retrieval`.
        embed: Makes the embeddings of rows that have none as a field.

    Attributes:
        buffer: As given.
        rows: Rows that can be found.
        skipped: Rows that cannot, as their embedding holds NaN or infinity.

    Raises:
        BatchError: Rows have no such field, or it is no vector of floating-point numbers.
    """

    def __init__(self, buffer: RehearsalBuffer, config: RetrievalConfig, embed: Embed | None = None) -> None:
        self.buffer, self._config = buffer, config
        self._known = KnownRows(buffer, config, embed)
        self._changes = buffer.follow()
        self._lock = threading.RLock()
        self._l2 = config.metric == "l2"
        self.rows = self.skipped = 0
        self._approximate: Approximate | None = None

    @property
    def width(self) -> int:
        """Numbers of an embedding; 0 while no row had one."""
        return self._known.width

    @property
    def drift(self) -> float:
        """See `KnownRows.drift`."""
        return self._known.drift

    def sync(self, now: int) -> int:
        """Take over what changed in the buffer.

        Args:
            now: The present step.

        Returns:
            Rows that changed.

        Raises:
            BatchError: `embed` gave something else than a vector for each row.
        """
        with self._lock:
            count, known = len(self.buffer), self._known
            if self._approximate is not None and count < known.count:
                self._approximate.remove(np.arange(count, known.count))
            known.resize(count)
            changed = self._changes.take(count)
            if len(changed):
                try:
                    known.take_over(changed, now)
                    self._update_approximate(changed)
                except BaseException:
                    self._changes.note(changed)  # they are taken over the next time
                    raise
            self.rows = int(np.count_nonzero(known.usable[:count]))
            self.skipped = count - self.rows
            return len(changed)

    def embeddings(self, rows: Tensor) -> Float32Array:
        """The embeddings of packed rows `[n, row_bytes]`, `[n, width]` float32.

        Raises:
            BatchError: `embed` gave something else than a vector for each row.
        """
        return self._known.embeddings(rows)

    def search(self, queries: Float32Array, k: int, where: Where, now: int) -> Found:
        """The nearest rows; of equally near ones, those at the lowest slots.

        Args:
            queries: `[q, width]` float32.
            k: How many for each.
            where: Which rows count.
            now: The step that ages are counted to.
        """
        with self._lock:
            allowed = self._known.allowed_slots(where, now)
            searchable = self._known.count if allowed is None else int(np.count_nonzero(allowed))
            if self._approximate is None or searchable <= max(self._config.exact_below, k):
                return self._search_exactly(queries, k, allowed)
            return self._search_approximately(self._approximate, queries, k, allowed, min(k, searchable))

    def read(self, slots: IntArray) -> tuple[Tensor, IntArray]:
        """Rows at slots that `search` returned, and the slots that other rows have taken since.

        Args:
            slots: `[n]` int64.

        Returns:
            Rows `[n, row_bytes]` uint8 in host memory, and the slots `[m]` of those that have been replaced since the
            last `sync`; what was read of these is not to be used.
        """
        rows = rows_at(self.buffer, slots)
        # An admission notes the new step first and writes the row later: without a new step, the row read was whole.
        return rows, slots[self.buffer.written(slots) != self._known.written[slots]]

    def forget(self, slots: IntArray) -> None:
        """Do not find the rows at `slots` `[n]` any more, until the next `sync`."""
        with self._lock:
            self._known.usable[slots] = False
            if self._approximate is not None:
                self._approximate.remove(slots)

    def about(self, slots: IntArray) -> IntArray:
        """Partition, origin, step of admission and step of the embedding of rows at `slots` `[n]`, `[n, 4]` int64."""
        return self._known.about(slots)

    def stalest(self, count: int) -> IntArray:
        """The slots `[n]` of the `count` rows whose embeddings are oldest, those that never had one first."""
        return self._known.stalest(count)

    def store(self, slots: IntArray, vectors: Tensor, now: int) -> None:
        """Take `vectors` `[n, width]` for the embeddings of the rows at `slots` `[n]`, computed at the step `now`.

        Raises:
            BatchError: They are no such vectors.
        """
        with self._lock:
            known = self._known
            if known.field is None:
                known.take_over(slots, now, known.checked_embeddings(vectors, len(slots)))
                self._update_approximate(slots)
            else:
                known.check_embeddings(vectors.flatten(1) if vectors.ndim > 2 else vectors, len(slots))
                shaped = vectors.to(known.field.dtype).reshape(len(vectors), *known.field.shape)
                self.buffer.update_fields(slots, {known.field.name: shaped})
                self.sync(now)
            known.note_refreshed(slots, now)

    def staleness(self, now: int) -> IntArray:
        """Steps since the embedding of each row that can be found was computed, `[rows]` int64."""
        return self._known.staleness(now)

    def close(self) -> None:
        """Stop following the buffer."""
        self.buffer.unfollow(self._changes)

    def _search_exactly(self, queries: Float32Array, k: int, allowed: Mask | None) -> Found:
        used = slice(self._known.count)
        vectors, lengths = self._known.vectors[used], self._known.lengths[used]
        if allowed is None:
            return _pad_columns(*nearest_vectors(queries, vectors, lengths, k, squared_distance=self._l2), k)
        slots = np.flatnonzero(allowed)
        excluded = len(vectors) - len(slots)
        if excluded > FEW:
            scores, index = nearest_vectors(queries, vectors[slots], lengths[slots], k, squared_distance=self._l2)
            return _pad_columns(scores, slots[index], k)
        # Too few to copy all others for it. Search for as many more, and move the allowed ones to the front.
        scores, index = nearest_vectors(queries, vectors, lengths, k + excluded, squared_distance=self._l2)
        order = np.argsort(~allowed[index], axis=1, kind="stable")[:, : min(k, len(slots))]
        return _pad_columns(np.take_along_axis(scores, order, 1), np.take_along_axis(index, order, 1), k)

    def _search_approximately(
        self, approximate: Approximate, queries: Float32Array, k: int, allowed: Mask | None, wanted: int
    ) -> Found:
        mask = None
        if allowed is not None:
            mask = np.zeros(self.buffer.capacity, dtype=bool)
            mask[: self._known.count] = allowed
        slots = approximate.search(queries, k + MARGIN, mask)
        scores = scores_of(queries, self._known.vectors, slots, squared_distance=self._l2)
        scores[slots < 0] = -np.inf
        order = rank_by(scores, slots)[:, :k]
        scores, slots = np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)
        short = np.flatnonzero((slots >= 0).sum(axis=1) < wanted)  # of allowed rows
        if len(short):
            exact = self._search_exactly(queries[short], k, allowed)
            scores[short], slots[short] = exact.scores, exact.slots
        return Found(scores, slots)

    def _update_approximate(self, changed: IntArray) -> None:
        """Let IVF or HNSW know of the rows at `changed` `[n]`."""
        if self._config.index == "flat":
            return
        known = self._known
        used = np.flatnonzero(known.usable[: known.count])
        if self._approximate is None:
            if len(used) <= self._config.exact_below:
                return
        else:
            gone, new = changed[~known.usable[changed]], changed[known.usable[changed]]
            self._approximate.remove(gone)
            self._approximate.add(known.vectors[new], new)
            if not self._approximate.outdated:
                return
        self._approximate = Approximate(self._config, known.vectors[used], used, self.buffer.capacity)


def _pad_columns(scores: Float64Array, slots: IntArray, k: int) -> Found:
    """Scores and slots `[q, k]`, with minus infinity and -1 where there are fewer than k rows."""
    missing = ((0, 0), (0, k - scores.shape[1]))
    return Found(np.pad(scores, missing, constant_values=-np.inf), np.pad(slots, missing, constant_values=-1))
