"""The copies of `_copies` in numpy, for installations without a compiler: the same bytes and errors, and more time.

`_copies.pyi` says what each function does.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.core.arrays import ByteArray, IntArray, Mask

__all__ = ["copy_runs", "find_lengths", "gather", "pad_rows", "scatter", "trim_rows"]

COMPARED = 4 << 20
"""Bytes of rows that are compared with the blank row at a time."""


def scatter(
    rows: ByteArray, slots: IntArray, offsets: list[int], columns: list[NDArray[Any]], places: IntArray | None
) -> None:
    """See `_copies.pyi`."""
    _check_bytes(rows, "rows", written=True)
    _check_index(slots, "slots", len(rows))
    cells = _cells_of(columns, offsets, rows.shape[1])
    samples = len(cells[0][1])
    if places is not None:
        _check_index(places, "places", samples)
    chosen = samples if places is None else len(places)
    if len(slots) != chosen:
        raise ValueError(f"{chosen} samples are not what {len(slots)} slots need")
    for offset, cell in cells:
        rows[slots, offset : offset + cell.shape[1]] = cell if places is None else cell[places]


def gather(rows: ByteArray, slots: IntArray, out: ByteArray) -> None:
    """See `_copies.pyi`."""
    _check_bytes(rows, "rows")
    _check_index(slots, "slots", len(rows))
    _check_bytes(out, "out", written=True)
    if out.shape != (len(slots), rows.shape[1]):
        raise ValueError(f"out is {list(out.shape)} and {len(slots)} rows of {rows.shape[1]} bytes are wanted")
    np.take(rows, slots, axis=0, out=out, mode="clip")  # which are in range; "raise" would copy once more


def copy_runs(
    to: list[ByteArray],
    to_array: IntArray,
    to_start: IntArray,
    source: list[ByteArray],
    from_array: IntArray,
    from_start: IntArray,
    sizes: IntArray,
) -> None:
    """See `_copies.pyi`."""
    _check_index(sizes, "sizes", sys.maxsize)
    targets = _runs_of(to, to_array, to_start, sizes, written=True)
    for target, run in zip(targets, _runs_of(source, from_array, from_start, sizes), strict=True):
        target[:] = run


def find_lengths(
    rows: ByteArray,
    places: IntArray,
    blank: ByteArray,
    offset: int,
    step: int,
    bounds: IntArray,
    lengths: IntArray,
) -> None:
    """See `_copies.pyi`."""
    _check_bytes(rows, "rows")
    _check_index(places, "places", len(rows))
    if offset < 0 or step < 1 or offset > rows.shape[1] or blank.nbytes != rows.shape[1]:
        raise ValueError("the field does not fit the rows")
    _check_index(bounds, "bounds", (rows.shape[1] - offset) // step + 1)
    if len(bounds) != len(rows) or lengths.nbytes != 8 * len(places):
        raise ValueError("the bounds or the lengths do not fit the number of rows")
    longest = int(bounds[places].max(initial=0))
    field = slice(offset, offset + longest * step)
    part = max(1, COMPARED // max(1, longest * step))
    for start in range(0, len(places), part):
        chosen = places[start : start + part]
        differing = rows[chosen, field] != blank.reshape(-1)[field]
        ends = _last_position(differing.reshape(len(chosen), longest, step).any(axis=2), bounds[chosen])
        np.maximum(lengths[start : start + part], ends, out=lengths[start : start + part])


def trim_rows(
    rows: ByteArray,
    places: IntArray,
    lengths: IntArray,
    offsets: IntArray,
    fixed: IntArray,
    steps: IntArray,
    to: list[ByteArray],
    which: IntArray,
    starts: IntArray,
) -> None:
    """See `_copies.pyi`."""
    _check_bytes(rows, "rows")
    _check_index(places, "places", len(rows))
    pieces = _pieces_of(lengths, (offsets, fixed, steps), 0, rows.shape[1])
    if len(lengths) != len(places):
        raise ValueError("there must be one length of each row")
    targets = _runs_of(to, which, starts, int(fixed.sum()) + lengths * int(steps.sum()), written=True)
    for place, length, target in zip(places.tolist(), lengths.tolist(), targets, strict=True):
        begin = 0
        for offset, size, step in pieces:
            nbytes = size + length * step
            target[begin : begin + nbytes] = rows[place, offset : offset + nbytes]
            begin += nbytes


def pad_rows(
    source: list[ByteArray],
    which: IntArray,
    starts: IntArray,
    lengths: IntArray,
    offsets: IntArray,
    fixed: IntArray,
    steps: IntArray,
    blank: ByteArray,
    out: ByteArray,
    bounds: IntArray,
) -> None:
    """See `_copies.pyi`."""
    _check_bytes(out, "out", written=True)
    if blank.nbytes != out.shape[1] or bounds.nbytes != 8 * len(out):
        raise ValueError("the blank row or the bounds do not fit the rows")
    pieces = _pieces_of(lengths, (offsets, fixed, steps), int(bounds.max(initial=0)), out.shape[1])
    if len(lengths) != len(out):
        raise ValueError("there must be one length of each row")
    runs = _runs_of(source, which, starts, int(fixed.sum()) + lengths * int(steps.sum()))
    padding = blank.reshape(-1)
    for row, run, length, bound in zip(out, runs, lengths.tolist(), bounds.tolist(), strict=True):
        begin = 0
        for offset, size, step in pieces:
            nbytes, behind = size + length * step, offset + size + length * step
            row[offset:behind] = run[begin : begin + nbytes]
            begin += nbytes
            if step and bound > length:
                end = behind + (bound - length) * step
                row[behind:end] = padding[behind:end]
    bounds[:] = lengths


def _last_position(differing: Mask, bounds: IntArray) -> IntArray:
    """Positions `[n]` up to the last that differs `[n, longest]`, of those before a row's bound."""
    if not differing.size:
        return np.zeros(len(differing), dtype=np.int64)
    longest = differing.shape[1]
    before = differing & (np.arange(longest) < bounds[:, None])
    ends: IntArray = np.where(before.any(axis=1), longest - before[:, ::-1].argmax(axis=1), 0)
    return ends


def _cells_of(columns: list[NDArray[Any]], offsets: list[int], row_bytes: int) -> list[tuple[int, ByteArray]]:
    """The place in a row and the bytes `[samples, nbytes]` of each column."""
    lists = isinstance(columns, list) and isinstance(offsets, list)
    if not lists or not columns or len(columns) != len(offsets):
        raise ValueError("offsets and columns must be lists of one length, at least 1")
    cells = [_cell_of(column, offset, row_bytes) for column, offset in zip(columns, offsets, strict=True)]
    if len({len(cell) for _, cell in cells}) > 1:
        raise ValueError("columns must have one number of samples")
    return cells


def _cell_of(column: NDArray[Any], given: int, row_bytes: int) -> tuple[int, ByteArray]:
    offset = operator.index(given)
    if abs(offset) > sys.maxsize:
        raise OverflowError(f"an offset of {offset}")
    if not isinstance(column, np.ndarray):
        raise TypeError(f"a column is an array, and not of type {type(column).__name__}")
    if not column.flags.c_contiguous:
        raise ValueError("a column is not C-contiguous")
    nbytes = column.nbytes // len(column) if column.ndim and len(column) else 0
    if not column.ndim or not 0 <= offset <= row_bytes - nbytes:
        raise ValueError(f"a column of {nbytes} bytes a sample does not fit at {offset} in rows of {row_bytes} bytes")
    return offset, column.reshape(-1).view(np.uint8).reshape(len(column), nbytes)


def _pieces_of(
    lengths: IntArray, pieces: Sequence[IntArray], longest: int, row_bytes: int
) -> list[tuple[int, int, int]]:
    """Offset, fixed bytes and step of each piece of a row that has up to `longest` positions, or those of `lengths`."""
    for name, numbers in zip(("lengths", "offsets", "fixed", "steps"), (lengths, *pieces), strict=True):
        _check_index(numbers, name, row_bytes + 1)
    if len({len(numbers) for numbers in pieces}) > 1:
        raise ValueError("pieces must have an offset, fixed bytes and a step each")
    longest = max(longest, int(lengths.max(initial=0)))
    listed = list(zip(*(numbers.tolist() for numbers in pieces), strict=True))
    if any(offset + size + longest * step > row_bytes for offset, size, step in listed):
        raise ValueError("a piece does not fit the rows")
    return listed


def _runs_of(
    arrays: list[ByteArray], which: IntArray, starts: IntArray, sizes: IntArray, *, written: bool = False
) -> list[ByteArray]:
    """Views of the runs of `sizes` bytes that begin at `starts` of the arrays `which`."""
    if not isinstance(arrays, list):
        raise ValueError("arrays must be a list")
    _check_index(which, "arrays", len(arrays))
    _check_index(starts, "starts", sys.maxsize)
    if not len(which) == len(starts) == len(sizes):
        raise ValueError("there must be one array, one start and one size of each run")
    flat = {number: _flat(arrays[number], written=written) for number in set(which.tolist())}
    runs = []
    for number, start, size in zip(which.tolist(), starts.tolist(), sizes.tolist(), strict=True):
        array = flat[number]
        if start > len(array) or size > len(array) - start:
            raise IndexError(f"a run of {size} bytes from {start} on in an array of {len(array)}")
        runs.append(array[start : start + size])
    return runs


def _flat(array: NDArray[Any], *, written: bool) -> ByteArray:
    """The bytes of an array, as a view."""
    if not array.flags.c_contiguous:
        raise ValueError("an array is not C-contiguous")
    if written and not array.flags.writeable:
        raise ValueError("an array is read-only")
    return array.reshape(-1).view(np.uint8)


def _check_bytes(array: NDArray[Any], name: str, *, written: bool = False) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} are not C-contiguous")
    if written and not array.flags.writeable:
        raise ValueError(f"{name} are read-only")
    if array.ndim != 2 or array.itemsize != 1:
        raise ValueError(f"{name} must be rows of bytes")


def _check_index(index: NDArray[Any], name: str, bound: int) -> None:
    if index.ndim != 1 or index.itemsize != 8:
        raise ValueError(f"{name} must have one dimension and items of 8 bytes")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= bound):
        raise IndexError(f"{name} has {int(index.min())} to {int(index.max())} of {bound}")
