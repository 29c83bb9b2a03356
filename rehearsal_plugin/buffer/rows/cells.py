"""The cells of a row: what it holds of one field, for each row of a sample where that has several.

A sample of two rows of up to 5 positions, out of a batch that is 3 wide. The columns fill the begin of each cell; what
lies behind is padding, which only has to be written where something else was before::

    column  [n, 2, 3]      cells    5 7 0 | 0 0    2 4 6 | 0 0
                                    row 0          row 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field, copy_rows, put

__all__ = ["Cell", "blank", "cells_of", "copy_cells", "pack_columns", "pad_behind", "width_of"]


@dataclass(frozen=True)
class Cell:
    """One field of a row.

    Attributes:
        column: Which of the columns fills it.
        row: Which row of a sample; None where the column is not split.
        field: Where it lies; its shape is `[longest, ...]` where it is padded.
        padding: With which number; None where it is not.
    """

    column: int
    row: int | None
    field: Field
    padding: float | None

    def of(self, columns: Sequence[Tensor]) -> Tensor:
        """What goes to this cell, `[n, positions, ...]`, perhaps fewer positions than the cell has."""
        column = columns[self.column]
        return column if self.row is None else column[:, self.row]

    @property
    def is_zero(self) -> bool:
        """Whether padding is bytes of zero, as fresh memory is."""
        return self.padding == 0 and math.copysign(1, self.padding) > 0

    def fill(self, rows: Tensor, start: int, stop: int) -> None:
        """Write padding to the positions from `start` to `stop` of rows `[n, row_bytes]`."""
        if self.padding is not None:
            self.field.view(rows)[:, start:stop].fill_(self.padding)


def cells_of(fields: Sequence[Field], pads: Mapping[str, float], rows: int) -> Iterator[Cell]:
    """The cells of fields of which `pads` are padded, in samples of so many `rows`."""
    for column, field in enumerate(fields):
        value = pads.get(field.name)
        if value is not None and not field.dtype.is_floating_point:
            value = int(value)
        if value is None or rows == 1:
            yield Cell(column, None, field, value)
            continue
        nbytes = field.nbytes // rows
        for row in range(rows):
            offset = field.offset + row * nbytes
            yield Cell(column, row, replace(field, shape=field.shape[1:], offset=offset, nbytes=nbytes), value)


def pack_columns(cells: Sequence[Cell], columns: Sequence[Tensor], out: Tensor, index: Tensor | None) -> None:
    """See `RowLayout.pack`."""
    parts = [cell.of(columns) for cell in cells]
    if out.is_cpu and all(part.is_cpu for part in parts):
        fields = [cell.field for cell in cells]
        put(out.numpy(), np.arange(out.shape[0]), fields, parts, None if index is None else index.numpy())
    else:
        copy_cells(cells, parts, out, index)


def copy_cells(cells: Sequence[Cell], parts: Sequence[Tensor], out: Tensor, index: Tensor | None) -> None:
    """The same of the part of each cell, on any device."""
    with torch.no_grad():
        for cell, part in zip(cells, parts, strict=True):
            if part.numel():
                view = cell.field.view(out)
                copy_rows(part, view if cell.padding is None else view[:, : part.shape[1]], index)


def pad_behind(cells: Sequence[Cell], columns: Sequence[Tensor], rows: Tensor, stop: int) -> None:
    """Write padding from the end of each column up to the position `stop` of rows `[n, row_bytes]`."""
    for cell in cells:
        if cell.padding is not None:
            width = cell.of(columns).shape[1]
            if width < stop:
                cell.fill(rows, width, stop)


def width_of(cells: Sequence[Cell], columns: Sequence[Tensor]) -> int:
    """Positions of the widest padded column; 0 without any."""
    return max((cell.of(columns).shape[1] for cell in cells if cell.padding is not None), default=0)


def blank(cells: Sequence[Cell], rows: Tensor) -> None:
    """Write padding to all positions of rows `[n, row_bytes]` of zeros."""
    for cell in cells:
        if cell.padding is not None and not cell.is_zero:
            cell.fill(rows, 0, cell.field.shape[0])
