"""The partition key and the score of each row, read from its fields."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.scores import bounded_scores
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.core.arrays import Float32Array, IntArray
from rehearsal_plugin.errors import BatchError

__all__ = ["KeysAndScores"]


class KeysAndScores:
    """Finds the partition key and the score of a row.

    Args:
        layout: Of the rows.
        config: `partition_by` names the field of the key, `score_by` that of the score.

    Attributes:
        key_field: Holds the key; None where rows are not partitioned.
        score_field: Holds the score; None where rows have none.
        width: Numbers in a score; 0 where rows have none.
        features: Whether scores are features, of which a policy wants the means.

    Raises:
        BatchError: `partition_by` names no field that can be a key, or `score_by` none that can be a score.
    """

    def __init__(self, layout: RowLayout, config: BufferConfig) -> None:
        self.key_field = None if config.partition_by is None else _find_key_field(layout, config.partition_by)
        self.score_field = None if config.score_by is None else _find_score_field(layout, config)
        self.width = 0 if self.score_field is None else math.prod(self.score_field.shape)
        self.features = config.by_features
        self._fields = layout.fields

    def of_rows(self, rows: Tensor) -> tuple[IntArray, Float32Array | None]:
        """Keys and scores of packed rows `[n, row_bytes]`; see `keys` and `scores`."""
        return self.keys(rows), self.scores(rows)

    def of_columns(self, columns: list[Tensor]) -> tuple[IntArray, Float32Array | None]:
        """Keys and scores of samples whose fields lie in `columns`, `[n, *shape]` each."""
        keys = None if self.key_field is None else _to_array(self._column(columns, self.key_field), torch.int64)
        scores = None if self.score_field is None else _to_array(self._column(columns, self.score_field), torch.float32)
        count = columns[0].shape[0]
        return _as_keys(keys, count), self._as_scores(scores, count)

    def keys(self, rows: Tensor) -> IntArray:
        """The partition keys `[n]` int64 of packed rows `[n, row_bytes]`; zeros without partitions."""
        keys = None if self.key_field is None else _read_field(self.key_field, rows, torch.int64)
        return _as_keys(keys, rows.shape[0])

    def scores(self, rows: Tensor) -> Float32Array | None:
        """The scores `[n, width]` float32 of packed rows `[n, row_bytes]`; None where rows have none."""
        scores = None if self.score_field is None else _read_field(self.score_field, rows, torch.float32)
        return self._as_scores(scores, rows.shape[0])

    def _column(self, columns: list[Tensor], field: Field) -> Tensor:
        return columns[self._fields.index(field)]

    def _as_scores(self, numbers: NDArray[Any] | None, count: int) -> Float32Array | None:
        return (
            None
            if numbers is None
            else bounded_scores(numbers.astype(np.float32, copy=False).reshape(count, self.width))
        )


def _as_keys(numbers: NDArray[Any] | None, count: int) -> IntArray:
    """Partition keys `[count]`; zeros without any."""
    return np.zeros(count, np.int64) if numbers is None else numbers.astype(np.int64, copy=False).reshape(count)


def _read_field(field: Field, rows: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """A field of packed rows `[n, row_bytes]`; see `_to_array`. All calls of numpy are faster than one of torch."""
    if field.numpy_dtype is None or not rows.is_cpu:
        return _to_array(field.view(rows), dtype)
    return rows.numpy()[:, field.offset : field.offset + field.nbytes].view(field.numpy_dtype)


def _to_array(column: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """A tensor in host memory; of `dtype` where numpy does not have its own."""
    try:
        return column.numpy()
    except (RuntimeError, TypeError):  # on a device, with a history, or of a dtype that numpy lacks
        return column.detach().to("cpu", dtype).numpy()


def _find_key_field(layout: RowLayout, name: str) -> Field:
    field = layout.field(name, "rehearsal.buffer.partition_by")
    if field.dtype.is_floating_point or field.dtype.is_complex or field.nbytes != field.dtype.itemsize:
        raise BatchError(
            f"rehearsal.buffer.partition_by names '{name}', which has {field.dtype} of shape {field.shape} a sample; "
            "a partition key is one integer a sample"
        )
    return field


def _find_score_field(layout: RowLayout, config: BufferConfig) -> Field:
    name = config.score_by or ""
    field = layout.field(ROW_LOSS if config.by_loss else name, "rehearsal.buffer.score_by")
    if not field.dtype.is_floating_point or not field.nbytes:
        raise BatchError(
            f"rehearsal.buffer.score_by names '{name}', which has {field.dtype} of shape {field.shape} a sample; "
            "rows are judged by floating-point numbers"
        )
    if not config.by_features and math.prod(field.shape) != 1:
        raise BatchError(
            f"rehearsal.buffer.score_by names '{name}' of shape {field.shape} a sample; a score is one number a sample"
        )
    return field
