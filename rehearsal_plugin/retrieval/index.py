"""The index of one rank: the embeddings of its rows, by slot."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.retrieval.approximate import Approximate
from rehearsal_plugin.retrieval.exact import nearest
from rehearsal_plugin.retrieval.filters import Mask, Where
from rehearsal_plugin.retrieval.scores import Scores, lengths_of, normalized, rank_by, scores_of
from rehearsal_plugin.rows import Field, RowLayout
from rehearsal_plugin.shares import IntArray
from rehearsal_plugin.values import FloatArray

__all__ = ["Embed", "Found", "RowIndex", "columns_of"]

Embed: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes embeddings `[n, d]` of rows, given as `{name: [n, ...]}` with dotted names of fields."""

READ_BYTES = 4 << 20
MARGIN = 16  # rows that IVF and HNSW are asked for beyond the k-th


@dataclass(frozen=True)
class Found:
    """Rows of one rank, nearest first.

    Attributes:
        scores: `[q, k]` float64, the higher the nearer; minus infinity where there are fewer than k rows.
        slots: `[q, k]` int64, -1 there.
    """

    scores: Scores
    slots: IntArray


class RowIndex:
    """Finds rows of a buffer by their embedding, in step with what the buffer admits and evicts.

    `sync` may not run while rows are written; `search` may, and goes by what was there at the last `sync`.

    Args:
        buffer: This rank's rows.
        config: The section `rehearsal.retrieval`.
        embed: Makes the embeddings of rows that have none as a field.

    Attributes:
        buffer: As given.
        rows: Rows that can be found.
        skipped: Rows that cannot, as their embedding holds NaN or infinity.
        drift: Mean of 1 - cosine between the new embedding of a row and the one before it, over the rows that got one
            at the last `sync` that brought any.

    Raises:
        BatchError: Rows have no such field, or it is no vector of floating-point numbers.
    """

    def __init__(self, buffer: RehearsalBuffer, config: RetrievalConfig, embed: Embed | None = None) -> None:
        self.buffer, self._config, self._embed = buffer, config, embed
        self._field = None if embed is not None else _embedding_field(buffer.layout, config.embedding)
        self._changes = buffer.follow()
        self._lock = threading.RLock()
        self._l2 = config.metric == "l2"
        self._count, self.rows, self.skipped, self.drift = 0, 0, 0, 0.0
        self._vectors = np.empty((buffer.capacity, 0), dtype=np.float32)
        self._lengths = np.zeros(buffer.capacity)
        self._usable = np.zeros(buffer.capacity, dtype=bool)
        self._keys, self._written, self._origin, self._embedded = (
            np.full(buffer.capacity, -1, dtype=np.int64) for _ in range(4)
        )
        self._approximate: Approximate | None = None
        if self._field is not None:
            self._widen(math.prod(self._field.shape))

    @property
    def width(self) -> int:
        """Numbers of an embedding; 0 while no row had one."""
        return self._vectors.shape[1]

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
            count = len(self.buffer)
            self._usable[count:] = False  # a buffer that was rolled back has fewer rows
            if self._approximate is not None and count < self._count:
                self._approximate.remove(np.arange(count, self._count))
            self._count = count
            changed = self._changes.take(count)
            if len(changed):
                try:
                    self._take_over(changed, now)
                    self._keep_up(changed)
                except BaseException:
                    self._changes.note(changed)  # they are taken over the next time
                    raise
            self.rows = int(np.count_nonzero(self._usable[:count]))
            self.skipped = count - self.rows
            return len(changed)

    def search(self, queries: FloatArray, k: int, where: Where, now: int) -> Found:
        """The nearest rows; of equally near ones, those at the lowest slots.

        Args:
            queries: `[q, width]` float32.
            k: How many for each.
            where: Which rows count.
            now: The step that ages are counted to.
        """
        with self._lock:
            allowed = self._allowed(where, now)
            some = self._count if allowed is None else int(np.count_nonzero(allowed))
            if self._approximate is None or some <= max(self._config.exact_below, k):
                return self._exact(queries, k, allowed)
            return self._approximately(self._approximate, queries, k, allowed, min(k, some))

    def read(self, slots: IntArray) -> tuple[Tensor, IntArray]:
        """Rows that `search` found, and which of them are there no more.

        Args:
            slots: `[n]` int64.

        Returns:
            Rows `[n, row_bytes]` uint8 in host memory, and the slots `[m]` of those that have been replaced since the
            last `sync`; what was read of these is not to be used.
        """
        rows = _rows_at(self.buffer, slots)
        # Who replaces a row notes that first, and writes then: what is unmarked now was whole when it was read.
        return rows, slots[self.buffer.written(slots) != self._written[slots]]

    def forget(self, slots: IntArray) -> None:
        """Do not find the rows at `slots` `[n]` any more, until the next `sync`."""
        with self._lock:
            self._usable[slots] = False
            if self._approximate is not None:
                self._approximate.remove(slots)

    def about(self, slots: IntArray) -> IntArray:
        """Partition, origin, step of admission and step of the embedding of rows at `slots` `[n]`, `[n, 4]` int64."""
        columns = (self._keys, self._origin, self._written, self._embedded)
        return np.stack([column[slots] for column in columns], axis=1)

    def stalest(self, count: int) -> IntArray:
        """The slots `[n]` of the `count` rows whose embeddings are oldest, those that never had one first."""
        return np.sort(np.argsort(self._embedded[: self._count], kind="stable")[:count])

    def store(self, slots: IntArray, vectors: Tensor, now: int) -> None:
        """Take `vectors` `[n, width]` for the embeddings of the rows at `slots` `[n]`, computed at the step `now`.

        Raises:
            BatchError: They are no such vectors.
        """
        with self._lock:
            if self._field is None:
                self._take_over(slots, now, self._checked(vectors, len(slots)))
                self._keep_up(slots)
            else:
                self._check(vectors.flatten(1) if vectors.ndim > 2 else vectors, len(slots))
                shaped = vectors.to(self._field.dtype).reshape(len(vectors), *self._field.shape)
                self.buffer.update_fields(slots, {self._field.name: shaped})
                self.sync(now)
            self._embedded[slots] = now

    def staleness(self, now: int) -> IntArray:
        """Steps since the embedding of each row that can be found was computed, `[rows]` int64."""
        return now - self._embedded[: self._count][self._usable[: self._count]]

    def close(self) -> None:
        """Stop following the buffer."""
        self.buffer.unfollow(self._changes)

    def _allowed(self, where: Where, now: int) -> Mask | None:
        """Which of the slots in use count, `[count]` bool; None for all."""
        used = slice(self._count)
        mask = where.mask(self._keys[used], self._origin[used], self._written[used], now)
        usable = self._usable[used]
        if mask is None:
            return None if usable.all() else usable
        return mask & usable

    def _exact(self, queries: FloatArray, k: int, allowed: Mask | None) -> Found:
        slots = None if allowed is None else np.flatnonzero(allowed)
        vectors, lengths = self._vectors[: self._count], self._lengths[: self._count]
        if slots is not None:
            vectors, lengths = vectors[slots], lengths[slots]
        scores, index = nearest(queries, vectors, lengths, k, squared_distance=self._l2)
        return _filled(scores, index if slots is None else slots[index], k)

    def _approximately(
        self, approximate: Approximate, queries: FloatArray, k: int, allowed: Mask | None, wanted: int
    ) -> Found:
        mask = None
        if allowed is not None:
            mask = np.zeros(self.buffer.capacity, dtype=bool)
            mask[: self._count] = allowed
        slots = approximate.search(queries, k + MARGIN, mask)
        scores = scores_of(queries, self._vectors[slots], squared_distance=self._l2)
        scores[slots < 0] = -np.inf
        order = rank_by(scores, slots)[:, :k]
        scores, slots = np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)
        short = np.flatnonzero((slots >= 0).sum(axis=1) < wanted)  # too few of those that count came in sight
        if len(short):
            exact = self._exact(queries[short], k, allowed)
            scores[short], slots[short] = exact.scores, exact.slots
        return Found(scores, slots)

    def _take_over(self, slots: IntArray, now: int, given: FloatArray | None = None) -> None:
        """Note all about the rows at `slots` `[n]`, whose embeddings may be given `[n, width]`."""
        drifts, chunk = [], max(1, READ_BYTES // self.buffer.layout.row_bytes)
        for start in range(0, len(slots), chunk):
            part = slots[start : start + chunk]
            rows = _rows_at(self.buffer, part)
            self._keys[part] = self.buffer.keys(rows)
            vectors = self._vectors_of(rows) if given is None else given[start : start + chunk].copy()
            usable = np.isfinite(vectors).all(axis=1)
            vectors[~usable] = 0
            if self._config.metric == "cosine":
                vectors = normalized(vectors)
            written = self.buffer.written(part)
            known = (self._written[part] == written) & self._usable[part] & usable
            changed = ~known | (self._vectors[part] != vectors).any(axis=1)
            drifts.append(_drift(self._vectors[part[known & changed]], vectors[known & changed]))
            recorded = np.full(len(part), now) if self._field is None else np.where(known, now, written)
            self._embedded[part[changed]] = np.where(usable, recorded, -1)[changed]
            self._vectors[part], self._usable[part], self._written[part] = vectors, usable, written
            self._lengths[part] = lengths_of(vectors)
            self._origin[part] = self.buffer.origin(part)
        drifted = np.concatenate(drifts)
        if len(drifted):
            self.drift = float(drifted.mean())

    def _vectors_of(self, rows: Tensor) -> FloatArray:
        """The embeddings of packed rows, `[n, width]` float32 of their own."""
        if self._field is not None:
            return _as_floats(self._field.view(rows).reshape(len(rows), -1))
        assert self._embed is not None
        return self._checked(self._embed(columns_of(self.buffer.layout, rows)).detach(), len(rows))

    def _checked(self, vectors: Tensor, rows: int) -> FloatArray:
        """What `embed` gave for so many rows."""
        self._check(vectors, rows)
        if not self.width:
            self._widen(vectors.shape[1])
        return _as_floats(vectors)

    def _check(self, vectors: Tensor, rows: int) -> None:
        if vectors.ndim != 2 or len(vectors) != rows or (self.width and vectors.shape[1] != self.width):
            raise BatchError(
                f"embed() gave a tensor of shape {tuple(vectors.shape)} for {rows} rows; "
                "it has to give one vector a row, all of one length"
            )

    def _widen(self, width: int) -> None:
        self._vectors = np.empty((self.buffer.capacity, width), dtype=np.float32)

    def _keep_up(self, changed: IntArray) -> None:
        """Let IVF or HNSW know of the rows at `changed` `[n]`."""
        if self._config.index == "flat":
            return
        used = np.flatnonzero(self._usable[: self._count])
        if self._approximate is None:
            if len(used) <= self._config.exact_below:
                return
        else:
            gone, new = changed[~self._usable[changed]], changed[self._usable[changed]]
            self._approximate.remove(gone)
            self._approximate.add(self._vectors[new], new)
            if not self._approximate.outdated:
                return
        self._approximate = Approximate(self._config, self._vectors[used], used, self.buffer.capacity)


def _as_floats(vectors: Tensor) -> FloatArray:
    """A copy in single precision, in host memory."""
    floats: FloatArray = vectors.to("cpu", torch.float32, copy=True).numpy()
    return floats


def columns_of(layout: RowLayout, rows: Tensor) -> dict[str, Tensor]:
    """The fields of packed rows `[n, row_bytes]` by dotted name, as views; recorded ones behind those of the batch."""
    columns = {field.name: field.view(rows) for field in layout.state}
    return {**columns, **{field.name: field.view(rows) for field in layout.fields}}


def _rows_at(buffer: RehearsalBuffer, slots: IntArray) -> Tensor:
    """The rows `[n, row_bytes]` uint8 at `slots` `[n]`, in host memory."""
    rows = torch.empty((len(slots), buffer.layout.row_bytes), dtype=torch.uint8, device=buffer.device)
    buffer.read(slots, rows)
    return rows.cpu()


def _drift(before: FloatArray, after: FloatArray) -> Scores:
    """1 - cosine of vectors `[n, d]` one by one, `[n]` float64."""
    return np.asarray(1 - (normalized(before).astype(np.float64) * normalized(after)).sum(axis=1))


def _filled(scores: Scores, slots: IntArray, k: int) -> Found:
    """Columns for the rows that there are not, up to `k`."""
    missing = ((0, 0), (0, k - scores.shape[1]))
    return Found(np.pad(scores, missing, constant_values=-np.inf), np.pad(slots, missing, constant_values=-1))


def _embedding_field(layout: RowLayout, name: str) -> Field:
    known = {field.name: field for field in (*layout.state, *layout.fields)}
    if name not in known:
        raise BatchError(
            f"rehearsal.retrieval.embedding names '{name}', and rows have {sorted(known)}; name the field that holds "
            "an embedding, or give a function that makes embeddings of rows"
        )
    field = known[name]
    if not field.dtype.is_floating_point or not field.nbytes:
        raise BatchError(
            f"rehearsal.retrieval.embedding names '{name}', which has {field.dtype} of shape {field.shape} a sample; "
            "an embedding is a vector of floating-point numbers"
        )
    return field
