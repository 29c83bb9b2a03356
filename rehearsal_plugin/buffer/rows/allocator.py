"""Host memory: it begins with a line of the cache, and that of batches is used again.

To touch fresh pages takes longer than to copy a batch there, and whether the allocator of C asks the kernel for them
depends on what else the process does.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rehearsal_plugin.buffer.rows._copies import scatter
from rehearsal_plugin.buffer.rows.fields import as_array

__all__ = ["RecycledMemory", "zeros"]

LINE = 64  # bytes of a line of the cache
LARGE = 1 << 17  # bytes from which on the allocator of C may ask the kernel
KEPT = 16  # blocks that wait to be used again: those of a batch of many fields


def zeros(nbytes: int) -> NDArray[np.uint8]:
    """`[nbytes]` that begin with a line of the cache: rows of whole lines are then written without reading any."""
    memory = np.zeros(nbytes + LINE, dtype=np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


class RecycledMemory:
    """Blocks of host memory, each lent to one tensor, and free again once nothing refers to the tensor's storage.

    That may happen on any thread, and in the midst of anything: so a look at the free blocks is a list of their keys,
    which nothing interrupts, and a block is taken by whoever gets it from the dict.
    """

    def __init__(self) -> None:
        self._free: dict[int, NDArray[np.uint8]] = {}  # by their `id`, the last that came back at its end

    def rows(self, like: Tensor, count: int) -> Tensor:
        """Room for `count` rows `[count, row_bytes]` uint8 of any content, where the rows `[n, row_bytes]` are."""
        nbytes = count * like.shape[1]
        if not like.is_cpu or nbytes < LARGE:
            return like.new_empty((count, like.shape[1]))
        return self._lend(nbytes).view(count, -1)

    def cat(self, first: Tensor, second: Tensor) -> Tensor:
        """`torch.cat` of two tensors; in recycled memory where they are large, in host memory, and without history.

        Such a result cannot be made larger in place (`resize_`).
        """
        nbytes = first.nbytes + second.nbytes
        if nbytes < LARGE or not _alike(first, second):
            return torch.cat((first, second))
        joined = self._lend(nbytes).view(len(first) + len(second), -1)
        scatter(joined.numpy(), np.arange(len(first)), [0], [as_array(first)], None)
        batch = joined.view(first.dtype).view(len(joined), *first.shape[1:])
        batch[len(first) :] = second
        return batch

    def _lend(self, nbytes: int) -> Tensor:
        """`[nbytes]` uint8."""
        block = self._block(nbytes)
        lent = block[:nbytes]  # only the tensor's storage refers to this view
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)

    def _block(self, nbytes: int) -> NDArray[np.uint8]:
        """A free block that is neither too small nor twice as large as it must be, or a new one."""
        for key in reversed(list(self._free)):
            block = self._free.get(key)
            if block is not None and nbytes <= len(block) <= 2 * nbytes and self._free.pop(key, None) is not None:
                return block
        return zeros(nbytes)

    def _give_back(self, block: NDArray[np.uint8]) -> None:
        self._free[id(block)] = block
        for key in list(self._free)[:-KEPT]:
            self._free.pop(key, None)


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are plain numbers in host memory, rows of one kind, and the first in the usual order."""
    both = (first, second)
    return (
        all(type(one) is Tensor and one.is_cpu and one.ndim and not one.requires_grad for one in both)
        and first.dtype == second.dtype
        and first.shape[1:] == second.shape[1:]
        and first.is_contiguous()
    )
