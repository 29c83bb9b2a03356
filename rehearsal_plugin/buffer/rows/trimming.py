"""Rows without their padding: what is stored of rows that differ in length.

A row of four positions of which two are padding, and what is kept of it::

    row       id | tokens 5 7 0 0 | labels 5 7 -100 -100
    trimmed   id | tokens 5 7     | labels 5 7               length 2

A position is cut off if it and all behind it hold, byte for byte, the padding of every padded field. So a row that is
padded again is the row that was trimmed, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.copies import find_lengths, pad_rows, trim_rows
from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.runs import Runs
from rehearsal_plugin.core.arrays import ByteArray, IntArray

__all__ = ["RowTrimmer", "TrimmedRows"]


class Strip(NamedTuple):
    """A padded field of one row of a sample: `step` bytes a position from `offset` on, and those of padding."""

    offset: int
    step: int
    padding: ByteArray


class Piece(NamedTuple):
    """Bytes of a row that follow each other: `fixed` ones, or `step` ones a position."""

    offset: int
    fixed: int
    step: int


class RowTrimmer:
    """Trims and pads the rows of one layout; rows of one sample are as long as the longest of them.

    Args:
        layout: Its `pads` name the padded fields.

    Attributes:
        row_bytes: Bytes of a padded row.
        longest: Positions of a padded row.
    """

    def __init__(self, layout: RowLayout) -> None:
        self.row_bytes, self.longest = layout.row_bytes, layout.longest or 0
        self._strips = [strip for field in layout.padded for strip in _strips(field, layout, self.longest)]
        self._pieces = list(_pieces(self._strips, self.longest, self.row_bytes))
        self._offsets, self._fixed, self._steps = (np.array(column) for column in zip(*self._pieces, strict=True))
        self._fixed_bytes, self._step_bytes = int(self._fixed.sum()), int(self._steps.sum())
        self._blank = np.zeros(self.row_bytes, dtype=np.uint8)
        for strip in self._strips:
            self._blank[strip.offset : strip.offset + self.longest * strip.step] = np.tile(strip.padding, self.longest)

    def lengths(self, rows: ByteArray, places: IntArray, bounds: IntArray | None = None) -> IntArray:
        """Positions `[n]` up to the last that is no padding, of the rows at `places` `[n]` of `[m, row_bytes]`.

        `bounds` `[m]` tells from which position on each of the rows is padding; None where nobody knows.
        """
        bounds = np.full(len(rows), self.longest) if bounds is None else bounds
        lengths = np.zeros(len(places), dtype=np.int64)
        for strip in self._strips:
            find_lengths(rows, places, self._blank, strip.offset, strip.step, bounds, lengths)
        return lengths

    def sizes(self, lengths: IntArray) -> IntArray:
        """Bytes `[n]` of trimmed rows of `lengths` `[n]`."""
        return lengths * self._step_bytes + self._fixed_bytes

    def trim(self, rows: ByteArray, places: IntArray, lengths: IntArray, to: Runs) -> None:
        """Copy the padded rows at `places` `[n]` of `[m, row_bytes]`, of `lengths` `[n]`, without their padding."""
        trim_rows(rows, places, lengths, self._offsets, self._fixed, self._steps, to.arrays, to.which, to.starts)

    def pad(self, trimmed: Runs, lengths: IntArray, out: ByteArray, bounds: IntArray | None = None) -> None:
        """Copy trimmed rows of `lengths` `[n]` to `out` `[n, row_bytes]`, contiguous, and pad them.

        `bounds` `[n]` tells from which position on each row of `out` is padding already, and becomes `lengths`; None
        where nobody knows.
        """
        bounds = np.full(len(out), self.longest) if bounds is None else bounds
        pad_rows(
            trimmed.arrays, trimmed.which, trimmed.starts, lengths, self._offsets, self._fixed, self._steps,
            self._blank, out, bounds,
        )  # fmt: skip

    def blank(self, rows: Tensor) -> None:
        """Write padding to all positions of rows `[n, row_bytes]` of zeros."""
        for strip in self._strips:
            if strip.padding.any():  # else it is as fresh memory is
                cells = slice(strip.offset, strip.offset + self.longest * strip.step)
                rows.numpy()[:, cells] = self._blank[cells]


class TrimmedRows:
    """Rows of one layout that lie trimmed in memory, and are padded when they are read.

    It reads as a tensor `[n, row_bytes]` of padded rows does, and takes no more memory than the trimmed ones.

    Args:
        trimmer: Of their layout.
        runs: Where they lie; nobody changes these bytes.
        lengths: `[n]` int64, positions of each.
    """

    def __init__(self, trimmer: RowTrimmer, runs: Runs, lengths: IntArray) -> None:
        self._trimmer, self._runs, self.lengths = trimmer, runs, lengths

    @classmethod
    def of(cls, layout: RowLayout, packed: Tensor, lengths: IntArray) -> TrimmedRows:
        """The rows of a file: `packed` `[bytes]` uint8 holds them without gaps.

        Raises:
            ValueError: The lengths are not those of rows that `packed` can hold.
        """
        if lengths.ndim != 1 or lengths.dtype != np.int64 or packed.dtype != torch.uint8 or packed.ndim != 1:
            raise ValueError("trimmed rows are bytes, and their lengths whole numbers")
        trimmer = RowTrimmer(layout)
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= trimmer.longest:
            raise ValueError(f"rows of up to {lengths.max()} positions, where {trimmer.longest} are the most")
        sizes = trimmer.sizes(lengths)
        if int(sizes.sum()) != len(packed):
            raise ValueError(f"{len(packed)} bytes for rows of {int(sizes.sum())}")
        return cls(trimmer, Runs.packed(packed.numpy(), sizes), lengths)

    @classmethod
    def joined(cls, parts: Sequence[TrimmedRows]) -> TrimmedRows:
        """The rows of all parts of one layout, one after the other; no byte is copied."""
        first = np.cumsum([0, *(len(part._runs.arrays) for part in parts)]).tolist()
        runs = Runs(
            [array for part in parts for array in part._runs.arrays],
            np.concatenate([part._runs.which + start for part, start in zip(parts, first, strict=False)]),
            np.concatenate([part._runs.starts for part in parts]),
        )
        return cls(parts[0]._trimmer, runs, np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of a padded one."""
        return len(self), self._trimmer.row_bytes

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The padded rows at `index`, `[m, row_bytes]` uint8."""
        places = np.arange(len(self))[index] if isinstance(index, slice) else index.numpy()
        out = torch.empty((len(places), self._trimmer.row_bytes), dtype=torch.uint8, device="cpu")
        self.select(places).pad_into(out)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the trimmed rows."""
        return int(self._trimmer.sizes(self.lengths).sum())

    def select(self, index: IntArray) -> TrimmedRows:
        """The rows at `index` `[m]`; no byte is copied."""
        return TrimmedRows(self._trimmer, self._runs.select(index), self.lengths[index])

    def packed(self) -> Tensor:
        """The bytes of all rows without gaps, `[bytes]` uint8: a copy."""
        sizes = self._trimmer.sizes(self.lengths)
        out = np.empty(int(sizes.sum()), dtype=np.uint8)
        self.copy_to(Runs.packed(out, sizes))
        return torch.from_numpy(out)

    def copied(self) -> TrimmedRows:
        """The same rows in memory of their own, without gaps."""
        packed, sizes = self.packed().numpy(), self._trimmer.sizes(self.lengths)
        return TrimmedRows(self._trimmer, Runs.packed(packed, sizes), self.lengths)

    def copy_to(self, to: Runs) -> None:
        """Copy the trimmed rows."""
        self._runs.copy_to(to, self._trimmer.sizes(self.lengths))

    def pad_into(self, out: Tensor, bounds: IntArray | None = None, trimmer: RowTrimmer | None = None) -> None:
        """Write the padded rows to `out` `[n, row_bytes]` uint8 in host memory, contiguous; see `RowTrimmer.pad`.

        Args:
            out: The memory.
            bounds: As in `RowTrimmer.pad`.
            trimmer: That of the same rows with another width, see `narrowing`; None for their own.

        Raises:
            ValueError: A row is longer than that.
        """
        trimmer = trimmer or self._trimmer
        if self.lengths.max(initial=0) > trimmer.longest:
            raise ValueError(
                f"a row of {self.lengths.max()} positions where there is room for {trimmer.longest}; rows that are "
                "written to the buffer by hand must not be longer than those of the batches"
            )
        trimmer.pad(self._runs, self.lengths, out.numpy(), bounds)


def _strips(field: Field, layout: RowLayout, longest: int) -> Iterator[Strip]:
    """The strips of a padded field, one for each row of a sample."""
    value = layout.pads[field.name]
    position = field.shape[1 if layout.rows_per_sample == 1 else 2 :]
    filling = value if field.dtype.is_floating_point else int(value)
    padding = torch.full((1, *position), filling, dtype=field.dtype, device="cpu").reshape(-1).view(torch.uint8).numpy()
    for row in range(layout.rows_per_sample):
        yield Strip(field.offset + row * longest * len(padding), len(padding), padding)


def _pieces(strips: Sequence[Strip], longest: int, row_bytes: int) -> Iterator[Piece]:
    """A row from its first to its last byte: what lies between strips, and these."""
    end = 0
    for strip in strips:
        if strip.offset > end:
            yield Piece(end, strip.offset - end, 0)
        yield Piece(strip.offset, 0, strip.step)
        end = strip.offset + longest * strip.step
    if row_bytes > end:
        yield Piece(end, row_bytes - end, 0)
