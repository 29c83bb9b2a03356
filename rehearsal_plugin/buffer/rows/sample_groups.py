"""Samples of several batch rows that belong together, such as the chosen and the rejected answer of a preference pair.

With 2 rows a sample, four batch rows are two samples:

| `sample_layout` | batch rows | samples |
|---|---|---|
| `halves` | a0 b0 a1 b1 (first rows of all samples, then second ones) | (a0, a1), (b0, b1) |
| `interleaved` | a0 a1 b0 b1 (sample by sample) | (a0, a1), (b0, b1) |

A sample is stored, drawn and replayed whole. Replayed samples take their places in the same layout: with `halves`, the
batch above and a replayed sample c become a0 b0 c0 a1 b1 c1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from rehearsal_plugin.buffer.rows.leaves import as_column
from rehearsal_plugin.config.names import SampleLayout
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["SampleGroups"]


class SampleGroups:
    """Groups the rows of a batch to samples, and back.

    Args:
        count: Rows of a sample, at least 2.
        layout: How the rows of samples stand in a batch; see the table.
    """

    def __init__(self, count: int, layout: SampleLayout) -> None:
        self.count, self._halves = count, layout == "halves"

    def grouped(self, batch: FlatBatch, names: Collection[str]) -> FlatBatch:
        """The batch with the fields `names` as samples `[samples, count, ...]`.

        Raises:
            BatchError: The rows are no whole number of samples.
        """
        return batch.with_leaves({name: self._group(name, batch.get(name)) for name in names})

    def ungrouped(self, batch: FlatBatch, names: Collection[str]) -> FlatBatch:
        """The batch with the fields `names` as rows again, `[samples * count, ...]`."""
        return batch.with_leaves({name: self._ungroup(batch[name]) for name in names})

    def rows_of(self, replayed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The fields of replayed samples `[samples, count, ...]` as rows, sample by sample."""
        return {name: column.flatten(0, 1) for name, column in replayed.items()}

    def samples_of(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `rows_of` gave, as samples again."""
        return {
            name: column.reshape(len(column) // self.count, self.count, *column.shape[1:])
            for name, column in rows.items()
        }

    def _group(self, name: str, leaf: object) -> object:
        column = as_column(leaf)
        if column is None or not column.ndim:
            return leaf  # refused by its name, as a field that has changed
        if len(column) % self.count:
            raise BatchError(
                f"batch field '{name}' has {len(column)} rows, which are no whole number of samples: "
                f"rehearsal.rows_per_sample is {self.count}"
            )
        samples = len(column) // self.count
        if self._halves:
            return column.reshape(self.count, samples, *column.shape[1:]).transpose(0, 1)
        return column.reshape(samples, self.count, *column.shape[1:])

    def _ungroup(self, samples: Tensor) -> Tensor:
        return (samples.transpose(0, 1) if self._halves else samples).flatten(0, 1)
