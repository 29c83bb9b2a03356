"""Double buffers of rows, allocated once: one is filled while the other is read."""

from __future__ import annotations

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["RowPool", "Staging"]


class RowPool:
    """Two buffers of rows: one may still be read while the other is filled.

    Args:
        row_bytes: Bytes a row.
        device: Where the buffers live.
    """

    def __init__(self, row_bytes: int, device: torch.device) -> None:
        self._device = device
        self._buffers = [_zero_rows(0, row_bytes, device) for _ in range(2)]
        self._turn = 0

    def take(self, rows: int) -> Tensor:
        """`[rows, row_bytes]` uint8 of the buffer whose turn it is; grows by doubling, then stays."""
        self._turn = 1 - self._turn
        return self.grow(rows)

    def grow(self, rows: int, keep: int = 0) -> Tensor:
        """The current buffer with room for `rows`, its first `keep` rows kept."""
        buffer = self._buffers[self._turn]
        if buffer.shape[0] < rows:  # cheaper than len() of a tensor
            larger = _zero_rows(1 << (rows - 1).bit_length(), buffer.shape[1], self._device)
            larger[:keep] = buffer[:keep]
            self._buffers[self._turn] = buffer = larger
        return buffer[:rows]


class Staging:
    """Candidates on their way into the buffer: copied at once, so that the caller may change the batch.

    All calls come from the training thread. The background reads the rows that `flush` returned while the next ones
    are staged in the other buffer.
    """

    def __init__(self, row_bytes: int, device: torch.device) -> None:
        self._pool = RowPool(row_bytes, device)
        self._count = 0

    @property
    def count(self) -> int:
        """Rows staged so far."""
        return self._count

    def reserve(self, rows: int) -> Tensor:
        """`[rows, row_bytes]` uint8 behind what is staged already, to be filled."""
        start = self._count
        reserved = self._pool.grow(start + rows, keep=start)[start:]
        self._count += rows
        return reserved

    def give_back(self, rows: int) -> None:
        """Take back the last `rows` that were reserved, as they could not be filled."""
        self._count -= rows

    def keep(self, places: IntArray) -> None:
        """Keep the rows at `places` `[n]` only, which are in ascending order."""
        if len(places) and places[-1] != len(places) - 1:  # else they are the first ones
            staged = self.staged()
            staged[: len(places)] = staged[torch.from_numpy(places).to(staged.device)]
        self._count = len(places)

    def staged(self) -> Tensor:
        """All rows staged so far, `[n, row_bytes]`."""
        return self._pool.grow(self._count)

    def flush(self) -> Tensor:
        """All staged rows `[n, row_bytes]`, untouched until the next flush; staging starts anew."""
        staged = self._pool.grow(self._count)
        self._pool.take(0)
        self._count = 0
        return staged


def _zero_rows(rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """`[rows, row_bytes]` zeros: the padding between fields, never written, is sent to other ranks and saved."""
    if device.type == "cpu" and rows:  # zeroed by the kernel, where torch would have several threads go over it
        return torch.from_numpy(zeros(rows * row_bytes)).view(rows, row_bytes)
    return torch.zeros((rows, row_bytes), dtype=torch.uint8, device=device)
