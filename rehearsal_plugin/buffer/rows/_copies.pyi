"""Copies of rows into the slots of a buffer in host memory, and out of them; why they are compiled: `_copies.c`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.core.arrays import IntArray

def scatter(
    rows: NDArray[np.uint8],
    slots: IntArray,
    offsets: list[int],
    columns: list[np.ndarray[Any, Any]],
    places: IntArray | None,
) -> None:
    """Store samples.

    Args:
        rows: `[capacity, row_bytes]`, contiguous.
        slots: `[n]` int64, all different.
        offsets: The byte in a row at which each column begins.
        columns: `[m, ...]` each, contiguous; what they have of a sample makes up its row, or a part of it.
        places: `[n]` int64, which of the samples; None where it is all, in their order.

    Raises:
        IndexError: There is no such slot or place; nothing was written.
        ValueError: Shapes or bytes do not match, or what must be contiguous is not; nothing was written.
    """

def gather(rows: NDArray[np.uint8], slots: IntArray, out: NDArray[np.uint8]) -> None:
    """Copy the rows `[capacity, nbytes]` at `slots` `[n]` int64 into `out` `[n, nbytes]`; all contiguous.

    Raises:
        IndexError: There is no such slot; nothing was read.
        ValueError: Shapes do not match, or what must be contiguous is not; nothing was read.
    """
