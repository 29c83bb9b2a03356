"""Result of a search: rows with their scores and origins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.vector_index.known_rows import columns_of
from rehearsal_plugin.core.arrays import Float64Array, IntArray

__all__ = ["Retrieved"]


@dataclass(frozen=True)
class Retrieved:
    """The nearest rows of each query, the nearest first.

    If there are fewer than `k` rows, the last places have the score minus infinity, -1 everywhere else, and zeros as
    their row.

    Attributes:
        scores: `[n, k]` float64, higher is nearer: inner product, cosine, or negative squared distance.
        rank: `[n, k]` int64, the rank that holds the row.
        slot: `[n, k]` int64, its slot there.
        partition: `[n, k]` int64, the key of its partition; 0 without partitions.
        origin: `[n, k]` int64, the rank on which it was admitted.
        written: `[n, k]` int64, the step in which it was admitted.
        embedded: `[n, k]` int64, the step in which its embedding was computed.
        rows: `[n * k, row_bytes]` uint8, the packed rows.
        layout: Layout of the rows; None where no rank has rows.
    """

    scores: Float64Array
    rank: IntArray
    slot: IntArray
    partition: IntArray
    origin: IntArray
    written: IntArray
    embedded: IntArray
    rows: Tensor
    layout: RowLayout | None

    @property
    def found(self) -> IntArray:
        """Number of rows found for each query, `[n]` int64."""
        return np.asarray((self.slot >= 0).sum(axis=1))

    def fields(self) -> dict[str, Tensor]:
        """The fields of the rows by dotted name, `[n, k, ...]`, as views."""
        if self.layout is None:
            return {}
        columns = columns_of(self.layout, self.rows)
        return {name: column.view(*self.scores.shape, *column.shape[1:]) for name, column in columns.items()}

    @classmethod
    def empty(cls, queries: int, k: int, layout: RowLayout | None) -> Retrieved:
        """A result without rows."""
        minus_one = np.full((queries, k), -1, dtype=np.int64)
        row_bytes = 0 if layout is None else layout.row_bytes
        return cls(
            scores=np.full((queries, k), -np.inf),
            rank=minus_one,
            slot=minus_one.copy(),
            partition=minus_one.copy(),
            origin=minus_one.copy(),
            written=minus_one.copy(),
            embedded=minus_one.copy(),
            rows=torch.zeros((queries * k, row_bytes), dtype=torch.uint8, device="cpu"),
            layout=layout,
        )
