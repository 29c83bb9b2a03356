"""Host memory that begins with a cache line, and memory of batches that is used again.

Touching fresh pages takes longer than copying a batch there, and whether `malloc` asks the kernel for fresh pages
depends on everything else that the process does.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rehearsal_plugin.buffer.rows.copies import scatter
from rehearsal_plugin.buffer.rows.fields import as_array

__all__ = ["RecycledMemory", "zeros"]

LINE = 64  # bytes of a cache line
LARGE = 1 << 17  # bytes from which on `malloc` may ask the kernel for pages
KEPT = 16  # free blocks at most: as many as a batch of many fields needs


def zeros(nbytes: int) -> NDArray[np.uint8]:
    """`[nbytes]` that begin with a cache line: rows of whole lines are then written without reading any."""
    memory = np.zeros(nbytes + LINE, dtype=np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


class RecycledMemory:
    """A free list of host memory: a block is lent to one tensor, and free again once its storage is.

        rows()  ->  block out of `_free`, or new  ->  numpy view  ->  tensor
                                                      | nothing refers to the tensor's storage any more
        `_free` <-  _give_back(block)             <-  the view is finalized

    Invariant: a block is in `_free`, or lent to one tensor, never both.

    | call | thread |
    |---|---|
    | `rows`, `cat` | that of the owner: training for batches, background for rows that arrive |
    | `_give_back` | any, in the midst of anything: that of the last reference, or of the garbage collector |

    So there is no lock, which a finalizer could find taken by its own thread. The free blocks are looked through by
    a list of their keys, one atomic operation, and `dict.pop` hands a block to one taker only.
    """

    def __init__(self) -> None:
        self._free: dict[int, NDArray[np.uint8]] = {}  # by `id`; the last to come back is the last

    def rows(self, like: Tensor, count: int) -> Tensor:
        """Room for `count` rows `[count, row_bytes]` uint8 of any content, on the device of `like` `[n, row_bytes]`."""
        nbytes = count * like.shape[1]
        if not like.is_cpu or nbytes < LARGE:
            return like.new_empty((count, like.shape[1]))
        return self._lend_tensor(nbytes).view(count, -1)

    def cat(self, first: Tensor, second: Tensor) -> Tensor:
        """`torch.cat` of two tensors; in recycled memory where they are large, in host memory, and without history.

        Such a result cannot be made larger in place (`resize_`).
        """
        nbytes = first.nbytes + second.nbytes
        if nbytes < LARGE or not _can_join(first, second):
            return torch.cat((first, second))
        joined = self._lend_tensor(nbytes).view(first.shape[0] + second.shape[0], -1)
        scatter(joined.numpy(), np.arange(first.shape[0]), [0], [as_array(first)], None)
        batch = joined.view(first.dtype).view(-1, *first.shape[1:])
        batch[first.shape[0] :] = second
        return batch

    def _lend_tensor(self, nbytes: int) -> Tensor:
        """A tensor `[nbytes]` uint8 whose storage gives its block back when it ends."""
        block = self._take_block(nbytes)
        lent = block[:nbytes]  # only the tensor's storage refers to this view
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)

    def _take_block(self, nbytes: int) -> NDArray[np.uint8]:
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


def _can_join(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are plain numbers in host memory, rows of one kind, and the first in the usual order."""
    both = (first, second)
    return (
        all(type(one) is Tensor and one.is_cpu and one.ndim and not one.requires_grad for one in both)
        and first.dtype == second.dtype
        and first.shape[1:] == second.shape[1:]
        and first.is_contiguous()
    )
