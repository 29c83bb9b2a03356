"""What a search gives: rows with their scores, and where they come from."""

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
    """The nearest rows of each query, from the nearest on.

    Where there are fewer rows than were asked for, the last places have the score minus infinity, -1 everywhere else,
    and zeros as their row.

    Attributes:
        scores: `[n, k]` float64, the higher the nearer: inner product, cosine, or negative squared distance.
        rank: `[n, k]` int64, the rank that holds the row.
        slot: `[n, k]` int64, its slot there.
        partition: `[n, k]` int64, the key of its partition; 0 without partitions.
        origin: `[n, k]` int64, the rank on which it was admitted.
        written: `[n, k]` int64, the step in which it was.
        embedded: `[n, k]` int64, the step of its embedding.
        rows: `[n * k, row_bytes]` uint8, the rows packed.
        layout: Theirs; None where no rank has any.
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
        """Rows of each query, `[n]` int64."""
        return np.asarray((self.slot >= 0).sum(axis=1))

    def fields(self) -> dict[str, Tensor]:
        """The fields of the rows by dotted name, `[n, k, ...]`, as views."""
        if self.layout is None:
            return {}
        columns = columns_of(self.layout, self.rows)
        return {name: column.view(*self.scores.shape, *column.shape[1:]) for name, column in columns.items()}

    @classmethod
    def nothing(cls, queries: int, k: int, layout: RowLayout | None) -> Retrieved:
        """No row for any query."""
        none = np.full((queries, k), -1, dtype=np.int64)
        row_bytes = 0 if layout is None else layout.row_bytes
        return cls(
            scores=np.full((queries, k), -np.inf),
            rank=none,
            slot=none.copy(),
            partition=none.copy(),
            origin=none.copy(),
            written=none.copy(),
            embedded=none.copy(),
            rows=torch.zeros((queries * k, row_bytes), dtype=torch.uint8),
            layout=layout,
        )
