"""Double buffers of rows, allocated once: one is filled while the other is read.

Rows of different length lie in them as long as the longest can be, and most of each is padding. It is written once.
From then on every row has a bound, the position from which on it is padding; a shorter row that takes its place needs
padding up to there alone. Three steps of one row, the x at its bound::

    5 7 3 . . . . x          5 7 3 . x . . .          5 7 x . . . . .
    before: bound 7          batch of width 4         batch of width 2: two positions are padded again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.cells import blank, pad_behind, width_of
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["BoundedRows", "RowPool", "Staging"]


class BoundedRows(NamedTuple):
    """Rows, and how long each is at most.

    Attributes:
        rows: `[n, row_bytes]` uint8.
        bounds: `[n]` int64, the position from which on each is padding; 0 where none has padding.
    """

    rows: Tensor
    bounds: IntArray


class RowPool:
    """Two buffers of rows: one may still be read while the other is filled.

    Args:
        row_bytes: Bytes a row.
        device: Where the buffers live.
        blank: Writes padding to all positions of rows of zeros.
    """

    def __init__(self, row_bytes: int, device: torch.device, blank: Callable[[Tensor], None] | None = None) -> None:
        self._device, self._blank = device, blank
        self._buffers = [BoundedRows(_zero_rows(0, row_bytes, device), np.zeros(0, dtype=np.int64)) for _ in range(2)]
        self._turn = 0

    def take(self, rows: int) -> Tensor:
        """`[rows, row_bytes]` uint8 of the buffer whose turn it is; grows by doubling, then stays."""
        self._turn = 1 - self._turn
        return self.grow(rows)

    def grow(self, rows: int, keep: int = 0) -> Tensor:
        """The current buffer with room for `rows`, its first `keep` rows kept."""
        buffer, bounds = self._buffers[self._turn]
        if buffer.shape[0] < rows:  # cheaper than len() of a tensor
            larger = _zero_rows(1 << (rows - 1).bit_length(), buffer.shape[1], self._device)
            if self._blank is not None:
                self._blank(larger)
            larger[:keep] = buffer[:keep]
            larger_bounds = np.zeros(larger.shape[0], dtype=np.int64)
            larger_bounds[:keep] = bounds[:keep]
            self._buffers[self._turn] = BoundedRows(larger, larger_bounds)
            buffer = larger
        return buffer[:rows]

    @property
    def bounds(self) -> IntArray:
        """Of all rows of the current buffer, kept up to date by its user; see `BoundedRows`."""
        return self._buffers[self._turn].bounds

    def forget_bounds(self, longest: int) -> None:
        """Take all rows for ones of `longest` positions."""
        for _, bounds in self._buffers:
            bounds[:] = longest


class Staging:
    """Candidates on their way into the buffer: copied at once, so that the caller may change the batch.

    All calls come from the training thread. The background reads the rows that `flush` returned while the next ones
    are staged in the other buffer.

    Args:
        layout: Of the rows.
        device: Where they live.
    """

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self._layout = layout
        self._pool = RowPool(layout.row_bytes, device, lambda rows: blank(self._layout.cells, rows))
        self._count = 0

    @property
    def count(self) -> int:
        """Rows staged so far."""
        return self._count

    def reserve(self, rows: int) -> Tensor:
        """`[rows, row_bytes]` uint8 behind what is staged already, to be filled with rows of any length."""
        start = self._count
        reserved = self._pool.grow(start + rows, keep=start)[start:]
        self._count += rows
        self._pool.bounds[start : self._count] = self._layout.longest or 0
        return reserved

    def restore(self, rows: Tensor, bounds: IntArray | None) -> None:
        """Stage packed rows `[n, row_bytes]`, with `bounds` as in `BoundedRows`; None where they are to be found."""
        start = self._count
        self.reserve(len(rows)).copy_(rows)
        if bounds is None and self._layout.pads and rows.is_cpu:
            bounds = RowTrimmer(self._layout).lengths(rows.numpy(), np.arange(len(rows)))
        if bounds is not None:
            self._pool.bounds[start : self._count] = bounds

    def pack(self, columns: list[Tensor], layout: RowLayout, rows: int, index: Tensor | None = None) -> None:
        """Copy samples (see `RowLayout.pack`) behind what is staged already; nothing is staged where that fails."""
        self._follow(layout)
        start, stop = self._count, self._count + rows
        packed = self._pool.grow(stop, keep=start)[start:]
        bounds = self._pool.bounds[start:stop]
        before, width = int(bounds.max(initial=0)), width_of(layout.cells, columns)
        bounds[:] = max(before, width)
        layout.pack(columns, packed, index)
        pad_behind(layout.cells, columns, packed, before)
        bounds[:] = width
        self._count = stop

    def replace(self, places: IntArray, columns: list[Tensor], layout: RowLayout, index: Tensor) -> None:
        """Copy samples to `places` `[n]`, all different; those that nobody has follow each other behind the others."""
        self._follow(layout)
        count = max(self._count, int(places.max(initial=-1)) + 1)
        staged = self._pool.grow(count, keep=self._count)
        rows = staged.new_zeros((len(places), layout.row_bytes))
        blank(layout.cells, rows)
        layout.pack(columns, rows, index)
        staged[torch.from_numpy(places).to(staged.device)] = rows
        self._pool.bounds[places] = width_of(layout.cells, columns)
        self._count = count

    def keep(self, places: IntArray) -> None:
        """Keep the rows at `places` `[n]` only, in that order."""
        if not np.array_equal(places, np.arange(len(places))):  # else they are the first ones
            staged, bounds = self.staged()
            staged[: len(places)] = staged[torch.from_numpy(places).to(staged.device)]
            bounds[: len(places)] = bounds[places]
        self._count = len(places)

    def staged(self) -> BoundedRows:
        """All rows staged so far."""
        return BoundedRows(self._pool.grow(self._count), self._pool.bounds[: self._count])

    def flush(self) -> BoundedRows:
        """All staged rows, untouched until the next flush; staging starts anew."""
        staged = self.staged()
        self._pool.take(0)
        self._count = 0
        return staged

    def _follow(self, layout: RowLayout) -> None:
        """Go by the padding of `layout`: the batches of a job that goes on may be padded in another way."""
        if layout is self._layout:
            return
        if layout.pads != self._layout.pads:
            self._pool.forget_bounds(layout.longest or 0)
        self._layout = layout


def _zero_rows(rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """`[rows, row_bytes]` zeros: the padding between fields, never written, is sent to other ranks and saved."""
    if device.type == "cpu" and rows:  # zeroed by the kernel, where torch would have several threads go over it
        return torch.from_numpy(zeros(rows * row_bytes)).view(rows, row_bytes)
    return torch.zeros((rows, row_bytes), dtype=torch.uint8, device=device)
