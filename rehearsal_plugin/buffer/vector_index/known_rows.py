"""Embeddings of a buffer's rows, and everything that filters look at, by slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.similarity import lengths_of, normalized
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray, Mask
from rehearsal_plugin.errors import BatchError

__all__ = ["Embed", "KnownRows", "columns_of", "rows_at"]

Embed: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes embeddings `[n, d]` of rows, given as `{name: [n, ...]}` with dotted names of fields."""

READ_BYTES = 4 << 20


class KnownRows:
    """Embeddings of a buffer's rows, and where and when these were admitted, as of when each was taken over.

    Args:
        buffer: This rank's rows.
        config: The section `rehearsal.retrieval`.
        embed: Makes the embeddings of rows that have none as a field.

    Attributes:
        field: Holds the embeddings; None where `embed` makes them.
        count: Slots in use.
        vectors: `[capacity, width]` float32; of length 1 where cosines are compared.
        lengths: `[capacity]` float64, theirs.
        usable: `[capacity]` bool, which rows can be found.
        written: `[capacity]` int64, the step in which each row was admitted.
        drift: Mean of 1 - cosine between the new embedding of a row and the one before it, over the rows that got one
            when last any did.

    Raises:
        BatchError: Rows have no such field, or it is no vector of floating-point numbers.
    """

    def __init__(self, buffer: RehearsalBuffer, config: RetrievalConfig, embed: Embed | None) -> None:
        self._buffer, self._embed, self._cosine = buffer, embed, config.metric == "cosine"
        self.field = None if embed is not None else _embedding_field(buffer.layout, config.embedding)
        self.count, self.drift = 0, 0.0
        self.lengths = np.zeros(buffer.capacity)
        self.usable = np.zeros(buffer.capacity, dtype=bool)
        self._keys, self.written, self._origin, self._embedded = (
            np.full(buffer.capacity, -1, dtype=np.int64) for _ in range(4)
        )
        self._widen(0 if self.field is None else math.prod(self.field.shape))

    @property
    def width(self) -> int:
        """Numbers of an embedding; 0 while no row had one."""
        return int(self.vectors.shape[1])

    def resize(self, count: int) -> None:
        """Go by the first `count` slots; a buffer that was rolled back has fewer rows."""
        self.usable[count:] = False
        self.count = count

    def take_over(self, slots: IntArray, now: int, embeddings: Float32Array | None = None) -> None:
        """Note everything about the rows at `slots` `[n]`; their `embeddings` `[n, width]` are read or made if None."""
        drifts, chunk = [], max(1, READ_BYTES // self._buffer.layout.row_bytes)
        for start in range(0, len(slots), chunk):
            part = slots[start : start + chunk]
            rows = rows_at(self._buffer, part)
            vectors = self.embeddings(rows) if embeddings is None else embeddings[start : start + chunk].copy()
            drifts.append(self._note_rows(part, rows, vectors, now))
        drifted = np.concatenate(drifts)
        if len(drifted):
            self.drift = float(drifted.mean())

    def _note_rows(self, slots: IntArray, rows: Tensor, vectors: Float32Array, now: int) -> Float64Array:
        """Note rows `[n, row_bytes]` at `slots` `[n]`, and their `vectors` `[n, width]`, which are changed in place.

        Returns:
            `[m]` float64, the drift of each row whose embedding has changed.
        """
        usable = np.isfinite(vectors).all(axis=1)
        vectors[~usable] = 0
        if self._cosine:
            vectors = normalized(vectors)
        written = self._buffer.written(slots)
        kept = (self.written[slots] == written) & self.usable[slots] & usable  # the row, with an embedding before
        changed = ~kept | (self.vectors[slots] != vectors).any(axis=1)
        drifts = _embedding_drift(self.vectors[slots[kept & changed]], vectors[kept & changed])
        # A field came with its row, unless it changed since. A vector of `embed` is as old as this call.
        embedded = np.full(len(slots), now) if self.field is None else np.where(kept, now, written)
        self._embedded[slots[changed]] = np.where(usable, embedded, -1)[changed]
        self.vectors[slots], self.usable[slots], self.written[slots] = vectors, usable, written
        self.lengths[slots] = lengths_of(vectors)
        self._keys[slots], self._origin[slots] = self._buffer.keys(rows), self._buffer.origin(slots)
        return drifts

    def embeddings(self, rows: Tensor) -> Float32Array:
        """See `RowIndex.embeddings`; memory of their own."""
        if self.field is not None:
            return _as_floats(self.field.view(rows).unsqueeze(1).flatten(1))
        assert self._embed is not None
        return self.checked_embeddings(self._embed(columns_of(self._buffer.layout, rows)).detach(), len(rows))

    def allowed_slots(self, where: Where, now: int) -> Mask | None:
        """Which of the slots in use count, `[count]` bool; None for all."""
        used = slice(self.count)
        mask = where.mask(self._keys[used], self._origin[used], self.written[used], now)
        usable = self.usable[used]
        if mask is None:
            return None if usable.all() else usable
        return mask & usable

    def about(self, slots: IntArray) -> IntArray:
        """See `RowIndex.about`."""
        columns = (self._keys, self._origin, self.written, self._embedded)
        return np.stack([column[slots] for column in columns], axis=1)

    def note_refreshed(self, slots: IntArray, now: int) -> None:
        """Note that embeddings of the rows at `slots` `[n]` were computed anew, even if they are the same."""
        self._embedded[slots] = now

    def stalest(self, count: int) -> IntArray:
        """See `RowIndex.stalest`."""
        return np.sort(np.argsort(self._embedded[: self.count], kind="stable")[:count])

    def staleness(self, now: int) -> IntArray:
        """See `RowIndex.staleness`."""
        return now - self._embedded[: self.count][self.usable[: self.count]]

    def check_embeddings(self, vectors: Tensor, rows: int) -> None:
        """Refuse what `embed` gave for so many rows if it is no embedding of each.

        Raises:
            BatchError: It is not.
        """
        if vectors.ndim != 2 or len(vectors) != rows or (self.width and vectors.shape[1] != self.width):
            raise BatchError(
                f"embed() gave a tensor of shape {tuple(vectors.shape)} for {rows} rows; "
                "it has to give one vector a row, all of one length"
            )

    def checked_embeddings(self, vectors: Tensor, rows: int) -> Float32Array:
        """What `embed` gave for so many rows; see `check_embeddings`."""
        self.check_embeddings(vectors, rows)
        if not self.width:
            self._widen(vectors.shape[1])
        return _as_floats(vectors)

    def _widen(self, width: int) -> None:
        self.vectors: Float32Array = np.empty((self._buffer.capacity, width), dtype=np.float32)


def columns_of(layout: RowLayout, rows: Tensor) -> dict[str, Tensor]:
    """The fields of packed rows `[n, row_bytes]` by dotted name, as views; recorded ones behind those of the batch."""
    columns = {field.name: field.view(rows) for field in layout.state}
    return {**columns, **{field.name: field.view(rows) for field in layout.fields}}


def rows_at(buffer: RehearsalBuffer, slots: IntArray) -> Tensor:
    """The rows `[n, row_bytes]` uint8 at `slots` `[n]`, in host memory."""
    rows = torch.empty((len(slots), buffer.layout.row_bytes), dtype=torch.uint8, device=buffer.device)
    buffer.read(slots, rows)
    return rows.cpu()


def _as_floats(vectors: Tensor) -> Float32Array:
    """A copy in single precision, in host memory."""
    floats: Float32Array = vectors.to("cpu", torch.float32, copy=True).numpy()
    return floats


def _embedding_drift(before: Float32Array, after: Float32Array) -> Float64Array:
    """1 - cosine of vectors `[n, d]` one by one, `[n]` float64."""
    return np.asarray(1 - (normalized(before).astype(np.float64) * normalized(after)).sum(axis=1))


def _embedding_field(layout: RowLayout, name: str) -> Field:
    fields = {field.name: field for field in (*layout.state, *layout.fields)}
    if name not in fields:
        raise BatchError(
            f"rehearsal.retrieval.embedding names '{name}', and rows have {sorted(fields)}; name the field that holds "
            "an embedding, or give a function that makes embeddings of rows"
        )
    if all(name in {field.name for field in part} for part in (layout.state, layout.fields)):
        raise BatchError(
            f"rehearsal.retrieval.embedding names '{name}', which is both a field of the batch and recorded beside it; "
            "give what is recorded, or the field, another name"
        )
    field = fields[name]
    if not field.dtype.is_floating_point or not field.nbytes:
        raise BatchError(
            f"rehearsal.retrieval.embedding names '{name}', which has {field.dtype} of shape {field.shape} a sample; "
            "an embedding is a vector of floating-point numbers"
        )
    return field
