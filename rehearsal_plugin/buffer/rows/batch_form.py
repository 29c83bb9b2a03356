"""How the samples of a batch lie in it: one a row, padded or not, or several rows that belong together.

batch  --samples-->  one entry a sample  --pack-->  rows of the buffer
batch, replayed samples  --join-->  batch with the replayed ones in their places
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.core.tree import FlatBatch

__all__ = ["BatchForm", "GroupForm", "RowForm"]


class BatchForm(Protocol):
    """Finds the samples of a batch, and puts replayed ones into it."""

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """Derive the layout of samples from a first batch, see `RowLayout.infer`; returns its samples, too.

        Raises:
            BatchError: As for that, or the batch is not of this form.
        """

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """The batch with one entry a sample in each field; padded ones may be shorter than those of the layout.

        Raises:
            BatchError: The batch is not of this form.
        """

    def fit(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """A batch and replayed samples, `[r, *shape]` a field, of which each field has one length in both."""

    def join(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """The batch with replayed samples, both from `fit`; see `RowLayout.join`."""

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """Replayed samples as a batch of their own, for a transform of the user."""

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """What `as_batch` gave, and the user has changed, as samples by field."""

    def tokens(self, batch: FlatBatch, new: int) -> int:
        """Tokens in the first `new` samples of a batch; their number where they have no length."""

    def replayed_tokens(self, replayed: Mapping[str, Tensor]) -> int:
        """Tokens in replayed samples; their number where they have no length."""

    def by_row(self, batch: FlatBatch) -> bool:
        """Whether a sample is one row of a batch, so that the model's outputs have one entry a sample."""

    def lengths(self, batch: FlatBatch) -> Tensor | None:
        """Tokens of each sample of a flat row, `[samples]` int64 on the CPU; None where samples are rows."""

    def sums(self, batch: FlatBatch, values: Tensor) -> Tensor | None:
        """The sums of one value a token, `[rows, length]`, over each sample, `[samples]`; None where they lie apart."""


class RowForm:
    """Every row of the batch is a sample.

    Args:
        padding: How rows of different length are padded; None where all have the same.
    """

    def __init__(self, padding: Padding | None) -> None:
        self._padding, self._memory = padding, RecycledMemory()

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """See `BatchForm.infer`."""
        wide = self._widened(batch, only)
        return self._padded(RowLayout.infer(wide, only)), wide

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """See `BatchForm.samples`."""
        return self._limited(batch)

    def fit(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """See `BatchForm.fit`."""
        return (batch, replayed) if self._padding is None else self._padding.alike(batch, replayed)

    def join(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """See `BatchForm.join`."""
        return layout.join(batch, replayed, self._memory, displaced)

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """See `BatchForm.as_batch`."""
        return layout.nesting.with_leaves(replayed)

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """See `BatchForm.as_samples`."""
        return {name: batch[name] for name in names}

    def tokens(self, batch: FlatBatch, new: int) -> int:
        """See `BatchForm.tokens`."""
        return new if self._padding is None else int(self._padding.lengths(batch)[:new].sum())

    def replayed_tokens(self, replayed: Mapping[str, Tensor]) -> int:
        """See `BatchForm.replayed_tokens`."""
        if self._padding is None or not replayed:
            return max(map(len, replayed.values()), default=0)
        return int(self._padding.lengths(replayed).sum())

    def by_row(self, batch: FlatBatch) -> bool:
        """See `BatchForm.by_row`."""
        return True

    def lengths(self, batch: FlatBatch) -> None:
        """See `BatchForm.lengths`."""

    def sums(self, batch: FlatBatch, values: Tensor) -> Tensor | None:
        """See `BatchForm.sums`."""
        return values.sum(1)

    def _widened(self, batch: FlatBatch, only: Collection[str] | None = None) -> FlatBatch:
        return batch if self._padding is None else self._padding.widen(batch, only)

    def _limited(self, batch: FlatBatch) -> FlatBatch:
        return batch if self._padding is None else self._padding.limit(batch)

    def _padded(self, layout: RowLayout) -> RowLayout:
        return layout if self._padding is None else replace(layout, pads=self._padding.values)


class GroupForm(RowForm):
    """Several rows of the batch are a sample.

    Args:
        groups: How they go together.
        padding: See `RowForm`.
    """

    def __init__(self, groups: SampleGroups, padding: Padding | None) -> None:
        super().__init__(padding)
        self._groups = groups

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """See `BatchForm.infer`."""
        layout, samples = self._groups.infer(self._widened(batch, only), only)
        return self._padded(layout), samples

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """See `BatchForm.samples`."""
        return self._groups.grouped(self._limited(batch), layout.names)

    def fit(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """See `BatchForm.fit`."""
        if self._padding is None:
            return batch, replayed
        batch, rows = self._padding.alike(batch, self._groups.rows_of(replayed))
        return batch, self._groups.samples_of(rows)

    def join(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """See `BatchForm.join`."""
        joined = layout.join(self._groups.grouped(batch, layout.names), replayed, self._memory, displaced)
        return self._groups.ungrouped(joined, layout.names)

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """See `BatchForm.as_batch`."""
        return layout.nesting.with_leaves(self._groups.rows_of(replayed))

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """See `BatchForm.as_samples`."""
        return self._groups.samples_of({name: batch[name] for name in names})

    def by_row(self, batch: FlatBatch) -> bool:
        """See `BatchForm.by_row`."""
        return False

    def sums(self, batch: FlatBatch, values: Tensor) -> None:
        """See `BatchForm.sums`."""
