"""Copies of rows into the slots of a buffer in host memory, and out of them; why they are compiled: `copies.c`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.shares import IntArray

def scatter(cells: NDArray[np.uint8], slots: IntArray, column: np.ndarray[Any, Any], places: IntArray | None) -> None:
    """Store samples.

    Args:
        cells: `[capacity, nbytes]`, one field of all rows; the rows may lie apart, the bytes of a cell may not.
        slots: `[n]` int64, all different.
        column: `[m, ...]` contiguous, `nbytes` a sample.
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
