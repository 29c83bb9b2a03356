"""Rows packed with fewer positions than the longest row can have: how they travel between ranks.

A layout has room for the longest row that may ever come. While all rows are shorter, what lies behind them is padding
in all of them, and need not travel. Two padded fields with room for six positions, of which the rows use up to three::

    packed      id | tokens 5 7 8 0 0 0 | labels 5 7 8 -100 -100 -100
    narrowed    id | tokens 5 7 8       | labels 5 7 8                      width 3

Widths come in steps of `ALIGNMENT` positions, counted from the longest. So all fields stay aligned, the gaps between
them stay as they are, and a trimmed row (see `trimming`) is the same for all widths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import ALIGNMENT, Field
from rehearsal_plugin.buffer.rows.layout import RowLayout

__all__ = ["cut", "narrowed", "widened", "width_for"]

STEPS_AN_OCTAVE = 4
"""Widths from one power of two to the next: a row that is a little longer than the others seldom needs another one."""


def width_for(needed: int, longest: int) -> int:
    """The width for rows of up to `needed` positions, where a row can have `longest`: the same on all ranks.

    >>> [width_for(needed, 4096) for needed in (0, 12, 100, 2048, 2049, 4000)]
    [16, 16, 112, 2048, 2560, 4096]
    """
    needed = max(1, needed)
    step = max(ALIGNMENT, (1 << (needed - 1).bit_length()) // 2 // STEPS_AN_OCTAVE)
    rounded = -(-needed // step) * step
    return longest - max(0, longest - rounded) // ALIGNMENT * ALIGNMENT


def narrowed(layout: RowLayout, width: int | None) -> RowLayout:
    """The layout of the same rows with `width` positions, which comes from `width_for`; None for the layout itself.

    Raises:
        ValueError: Rows of this layout cannot have this width.
    """
    if width is None or width == layout.longest:
        return layout
    removed = (layout.longest or 0) - width
    if width < 1 or removed < 0 or removed % ALIGNMENT:
        raise ValueError(f"rows of up to {layout.longest} positions cannot be packed with {width}")
    fields, before = [], 0
    for field in layout.fields:
        shorter = _shorter(field, removed, layout) if field.name in layout.pads else field
        fields.append(replace(shorter, offset=field.offset - before))
        before += field.nbytes - shorter.nbytes
    state = [replace(field, offset=field.offset - before) for field in layout.state]
    return replace(layout, fields=tuple(fields), state=tuple(state), row_bytes=layout.row_bytes - before)


def cut(rows: Tensor, layout: RowLayout, to: RowLayout) -> Tensor:
    """Rows `[n, row_bytes]` of a layout as they are in a narrower one, on their device: a copy."""
    out = rows.new_zeros((len(rows), to.row_bytes))
    values = layout.views(rows, to.longest) | layout.unpack_state(rows)
    for field in (*to.fields, *to.state):
        field.view(out).copy_(values[field.name])
    return out


def widened(rows: Tensor, packed: RowLayout, to: RowLayout) -> dict[str, Tensor]:
    """The fields of packed rows by name with all positions of the layout `to`, padded as `packed` says: copies."""
    values = packed.views(rows)
    for field in to.fields:
        if field.name in packed.pads:
            value = packed.pads[field.name]
            filling = value if field.dtype.is_floating_point else int(value)
            whole = torch.full((len(rows), *field.shape), filling, dtype=field.dtype, device=rows.device)
            axis = 1 if packed.rows_per_sample == 1 else 2
            whole.narrow(axis, 0, values[field.name].shape[axis]).copy_(values[field.name])
            values[field.name] = whole
    return values


def _shorter(field: Field, removed: int, layout: RowLayout) -> Field:
    axis = 0 if layout.rows_per_sample == 1 else 1
    positions = field.shape[axis]
    shape = (*field.shape[:axis], positions - removed, *field.shape[axis + 1 :])
    return replace(field, shape=shape, nbytes=field.nbytes // positions * (positions - removed))
