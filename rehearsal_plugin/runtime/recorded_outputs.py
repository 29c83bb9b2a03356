"""Outputs of a model that are stored beside rows have one shape, so they need rows of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.config import PaddingConfig
from rehearsal_plugin.errors import BatchError

__all__ = ["check_recorded"]


def check_recorded(need: str, state: Mapping[str, Tensor], columns: Sequence[Tensor], layout: RowLayout) -> None:
    """Refuse outputs by position, `[rows, length, ...]`, of a first batch whose rows differ in length.

    The next batch would have another length, and its outputs no place.

    Args:
        need: Why outputs are stored, for a person.
        state: What is to be stored beside the rows, by name.
        columns: The rows, `[rows, longest, ...]` where they are padded, in the order of `layout.fields`.
        layout: Of the rows, without state.

    Raises:
        BatchError: There is such an output.
    """
    by_position = {name: value.shape[1] for name, value in state.items() if value.ndim > 2}
    if not layout.pads or not by_position or not len(columns[0]):
        return
    fields = {field.name: column for field, column in zip(layout.fields, columns, strict=True)}
    lengths = Padding(PaddingConfig(values=dict(layout.pads))).lengths(fields)
    longest = int(lengths.max())
    names = sorted(name for name, width in by_position.items() if width == longest)
    if names and int(lengths.min()) < longest:
        raise BatchError(
            f"{need}, and {names} has one for each of up to {longest} positions of rows that differ in length; outputs "
            "are stored in one shape, so pad all batches to one width and leave rehearsal.padding out, name outputs "
            "without positions in rehearsal.strategy.outputs, or set rehearsal.strategy.name to 'er'"
        )
