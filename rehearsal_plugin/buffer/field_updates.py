"""New values for some fields of stored rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.policies.base import last_writers
from rehearsal_plugin.buffer.rows.fields import named_fields
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["updated_rows"]


def updated_rows(
    layout: RowLayout, slots: IntArray, values: Mapping[str, Tensor], read_rows: Callable[[IntArray], Tensor]
) -> tuple[IntArray, Tensor]:
    """Stored rows with new values in some fields, to be written back.

    Args:
        layout: Of the rows.
        slots: `[n]` int64; where a slot stands twice, the last one counts.
        values: `[n, ...]` by field name, of the batch or of the state.
        read_rows: Returns copies `[m, row_bytes]` of the rows at slots `[m]`.

    Returns:
        Different slots `[m]` int64, and the rows `[m, row_bytes]` uint8 for them.

    Raises:
        BatchError: There is no such field, or dtype or shape are not its own.
    """
    fields = named_fields((*layout.fields, *layout.state), values, len(slots))
    last = last_writers(slots) >= 0
    index = torch.from_numpy(np.flatnonzero(last))
    rows = read_rows(slots[last])
    for name, value in values.items():
        fields[name].view(rows).copy_(value[index.to(value.device)])
    return slots[last], rows
