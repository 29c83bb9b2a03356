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

def copy_runs(
    to: list[NDArray[np.uint8]],
    to_array: IntArray,
    to_start: IntArray,
    source: list[NDArray[np.uint8]],
    from_array: IntArray,
    from_start: IntArray,
    sizes: IntArray,
) -> None:
    """Copy n runs of bytes that do not overlap.

    Args:
        to: Arrays that are written, contiguous.
        to_array: `[n]` int64, the array that each run is copied to, by its place in `to`.
        to_start: `[n]` int64, the byte at which it begins there.
        source: Arrays that are read, contiguous.
        from_array: `[n]` int64, the array that each run comes from.
        from_start: `[n]` int64, the byte at which it begins there.
        sizes: `[n]` int64, bytes of each.

    Raises:
        IndexError: There is no such array or byte; nothing was written.
        ValueError: Lengths do not match, or what must be contiguous is not; nothing was written.
    """

def find_lengths(
    rows: NDArray[np.uint8],
    places: IntArray,
    blank: NDArray[np.uint8],
    offset: int,
    step: int,
    bounds: IntArray,
    lengths: IntArray,
) -> None:
    """Raise `lengths` `[n]` int64 to the positions of a field up to its last that differs from the blank row.

    Args:
        rows: `[m, row_bytes]`, contiguous.
        places: `[n]` int64, which of them.
        blank: `[row_bytes]`, a row of padding.
        offset: First byte of the field.
        step: Bytes of a position.
        bounds: `[m]` int64, the position from which on each row is known to be blank.
        lengths: Changed in place.

    Raises:
        IndexError: There is no such row or position; nothing was written.
        ValueError: The field or the lengths do not fit; nothing was written.
    """

def trim_rows(
    rows: NDArray[np.uint8],
    places: IntArray,
    lengths: IntArray,
    offsets: IntArray,
    fixed: IntArray,
    steps: IntArray,
    to: list[NDArray[np.uint8]],
    which: IntArray,
    starts: IntArray,
) -> None:
    """Copy the pieces of rows one after the other, without what lies behind their length.

    Args:
        rows: `[m, row_bytes]`, contiguous.
        places: `[n]` int64, which of them.
        lengths: `[n]` int64, positions of each.
        offsets: `[pieces]` int64, the byte of a row at which each piece begins.
        fixed: `[pieces]` int64, bytes of each that do not depend on the length.
        steps: `[pieces]` int64, bytes of each for a position.
        to: Arrays that are written, contiguous.
        which: `[n]` int64, the array that each row is copied to.
        starts: `[n]` int64, the byte at which it begins there.

    Raises:
        IndexError: There is no such row, position, array or byte; nothing was written.
        ValueError: Lengths or pieces do not match, or what must be contiguous is not; nothing was written.
    """

def pad_rows(
    source: list[NDArray[np.uint8]],
    which: IntArray,
    starts: IntArray,
    lengths: IntArray,
    offsets: IntArray,
    fixed: IntArray,
    steps: IntArray,
    blank: NDArray[np.uint8],
    out: NDArray[np.uint8],
    bounds: IntArray,
) -> None:
    """Copy what `trim_rows` wrote back to whole rows, and the blank row behind each length, up to its bound.

    Args:
        source: Arrays that are read, contiguous.
        which: See `trim_rows`.
        starts: See `trim_rows`.
        lengths: See `trim_rows`.
        offsets: See `trim_rows`.
        fixed: See `trim_rows`.
        steps: See `trim_rows`.
        blank: `[row_bytes]`, a row of padding.
        out: `[n, row_bytes]`, contiguous.
        bounds: `[n]` int64, the position from which on each row of `out` is blank already; becomes `lengths`.

    Raises:
        IndexError: There is no such position, array or byte; nothing was written.
        ValueError: Lengths or pieces do not match, or what must be contiguous is not; nothing was written.
    """
