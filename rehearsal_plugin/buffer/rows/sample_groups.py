"""Samples of several batch rows that belong together, such as the chosen and the rejected answer of a preference pair.

With 2 rows a sample, four batch rows are two samples:

| `sample_layout` | batch rows | samples |
|---|---|---|
| `halves` | a0 b0 a1 b1 (first rows of all samples, then second ones) | (a0, a1), (b0, b1) |
| `interleaved` | a0 a1 b0 b1 (sample by sample) | (a0, a1), (b0, b1) |

A sample is stored, drawn and replayed whole. Replayed samples take their places in the same layout: with `halves`, the
batch above and a replayed sample c become a0 b0 c0 a1 b1 c1.

A leaf with one entry a sample, such as the margins of preference pairs, belongs to its sample as it is. It votes for
the rows of its samples where the batch size is told, and `rehearsal.fields` may name it beside leaves of all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
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
        self._alone: frozenset[str] = frozenset()  # fields with one entry a sample

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """Derive the layout of samples from a first batch; returns that batch as samples, too.

        Args:
            batch: Its fields have `count` entries a sample, or one.
            only: See `RowLayout.infer`.

        Raises:
            BatchError: As for that, or the rows are no whole number of samples.
        """
        rows = RowLayout.infer(batch, only, self.count)
        size = rows.size(batch)
        alone = [name for name, entries in rows.lengths.items() if entries and entries * self.count == size]
        self._alone = frozenset(alone if only is None else set(only).intersection(alone))
        samples = self.grouped(batch, rows.names)
        layout = RowLayout.infer(samples, {*rows.names, *self._alone})
        passing = {name: why for name, why in rows.passing.items() if name not in self._alone}
        lengths = {name: rows.lengths[name] for name in passing}
        return replace(
            layout, passing=passing, lengths=lengths, selected=rows.selected, rows_per_sample=self.count
        ), samples

    def grouped(self, batch: FlatBatch, names: Collection[str]) -> FlatBatch:
        """The batch with the fields `names` as samples `[samples, count, ...]`.

        Raises:
            BatchError: The rows are no whole number of samples.
        """
        return batch.with_leaves({name: self._group(name, batch.get(name)) for name in self._together(names)})

    def ungrouped(self, batch: FlatBatch, names: Collection[str]) -> FlatBatch:
        """The batch with the fields `names` as rows again, `[samples * count, ...]`."""
        return batch.with_leaves({name: self._ungroup(batch[name]) for name in self._together(names)})

    def rows_of(self, replayed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The fields of replayed samples `[samples, count, ...]` as rows, sample by sample."""
        return {**replayed, **{name: replayed[name].flatten(0, 1) for name in self._together(replayed)}}

    def samples_of(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `rows_of` gave, as samples again."""
        together = {
            name: rows[name].reshape(len(rows[name]) // self.count, self.count, *rows[name].shape[1:])
            for name in self._together(rows)
        }
        return {**rows, **together}

    def _together(self, names: Collection[str]) -> list[str]:
        """The fields among `names` that have `count` entries a sample."""
        return [name for name in names if name not in self._alone]

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
