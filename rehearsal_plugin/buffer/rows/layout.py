"""Batches as packed byte rows, and back.

A batch is any nesting of mappings, lists and tuples whose leaves are tensors or anything else. The tensors
that share the batch dimension are its fields; one sample across all fields becomes one contiguous byte row,
each field aligned to 16 bytes so that every dtype can be viewed in place. Whatever the number of fields, a
step then costs one gather, one exchange and one scatter, and reading a row back copies nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.batch_size import entries_of, size_of
from rehearsal_plugin.buffer.rows.cells import Cell, cells_of, pack_columns
from rehearsal_plugin.buffer.rows.fields import ALIGNMENT, Field, find_field, lay_out
from rehearsal_plugin.buffer.rows.leaves import as_column, classify, like
from rehearsal_plugin.buffer.rows.passing_leaves import refuse_entries_of_rows
from rehearsal_plugin.buffer.rows.rows_in_lists import refuse_rows_of_lists
from rehearsal_plugin.core.tree import FlatBatch, flatten
from rehearsal_plugin.errors import BatchError

__all__ = ["Packed", "RowLayout"]


@dataclass(frozen=True)
class Packed:
    """Packed rows and the batch that lies in them.

    Attributes:
        rows: `[n, row_bytes]` uint8.
        batch: Views of them, in the nesting of the batch.
    """

    rows: Tensor
    batch: Any


@dataclass(frozen=True)
class RowLayout:
    """How a sample's fields share one byte row.

    Attributes:
        fields: The fields, in the order in which the batch was walked.
        row_bytes: Bytes of a row, padding included; a multiple of 16.
        passing: Why each leaf that is not part of a row passes through untouched, by name.
        lengths: Entries of each of these in the first batch; None for a value without entries.
        nesting: The first batch without its leaves: what rows are unpacked into.
        selected: Whether the fields were named, so that any other leaf may come and go.
        rows_per_sample: Batch rows of a row of the buffer.
        state: Fields that are not part of the batch: what a strategy stores beside it.
        pads: What rows that are shorter than the longest are padded with, by field; empty where all have one length.
        constants: Fields that no batch has, and what new rows hold in them.
    """

    fields: tuple[Field, ...]
    row_bytes: int
    passing: Mapping[str, str]
    lengths: Mapping[str, int | None]
    nesting: FlatBatch
    selected: bool = False
    rows_per_sample: int = 1
    state: tuple[Field, ...] = ()
    pads: Mapping[str, float] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def infer(cls, batch: Any, only: Collection[str] | None = None, rows_per_sample: int = 1) -> RowLayout:
        """Derive the layout of single rows from a first batch.

        Args:
            batch: Any nesting of mappings, lists and tuples. The batch size is the length that most leaves have; see
                `batch_size` for the rule. Every leaf of that length is a field.
            only: Names of the fields that make up a row; None takes every leaf with one entry a row.
            rows_per_sample: See `classify`.

        Raises:
            BatchError: No field at all, two leaves of one name, a name in `only` that is not there, a batch whose size
                cannot be told, or a leaf with one entry a row that cannot be stored.
        """
        flat = flatten(batch)
        leaves = classify(flat, only, rows_per_sample)
        fields, row_bytes = lay_out(leaves.columns, 0)
        nesting = flat.with_leaves(dict.fromkeys(flat.names))
        selected = only is not None
        return cls(fields, max(row_bytes, ALIGNMENT), leaves.passing, leaves.lengths, nesting, selected=selected)

    def with_state(self, state: Mapping[str, Tensor]) -> RowLayout:
        """This layout with fields for state `[n, ...]` by name behind those of the batch."""
        fields, row_bytes = lay_out(state, self.row_bytes)
        return replace(self, state=fields, row_bytes=row_bytes)

    def with_constant(self, name: str, value: int) -> RowLayout:
        """This layout with an int64 field in which all new rows hold `value`."""
        added, row_bytes = lay_out({name: torch.empty(0, dtype=torch.int64, device="cpu")}, self.row_bytes)
        return replace(self, fields=(*self.fields, *added), row_bytes=row_bytes, constants={name: value})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields of a batch."""
        return tuple(field.name for field in self._of_batch)

    @cached_property
    def _of_batch(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.name not in self.constants)

    @property
    def padded(self) -> tuple[Field, ...]:
        """The fields that are padded, `[length, ...]` each, or `[rows, length, ...]` in a sample of several rows."""
        return tuple(field for field in self.fields if field.name in self.pads)

    @property
    def longest(self) -> int | None:
        """Positions of a padded row; None where no field is padded."""
        return self.padded[0].shape[self._positions_axis - 1] if self.padded else None

    @property
    def _positions_axis(self) -> int:  # of a padded column
        return 1 if self.rows_per_sample == 1 else 2

    @property
    def fingerprint(self) -> int:
        """A 63-bit digest of the fields; ranks compare it before they exchange rows."""
        text = repr([(f.name, str(f.dtype), f.shape) for f in (*self.fields, *self.state)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def field(self, name: str, named_by: str = "") -> Field:
        """The field called `name`, of the batch or of the state; see `find_field`."""
        return find_field((*self.fields, *self.state), name, named_by, offered=len(self.fields))

    def columns(self, batch: Any, *, narrow: bool = False) -> list[Tensor]:
        """The batch's tensors in the order of `fields`, each `[b, *shape]`, checked.

        Args:
            batch: Samples.
            narrow: Whether padded fields may have fewer positions.

        Raises:
            BatchError: A field is missing, new, or of another dtype or shape than in the first batch.
        """
        flat = flatten(batch)
        places = self._places_in(flat)
        size = 0 if places[0] is None else entries_of(flat.leaves[places[0]]) or 0
        constants = {name: torch.full((size,), value, device="cpu") for name, value in self.constants.items()}
        if not self.selected and (self.lengths or flat.structure is not self.nesting.structure):
            self._refuse_new(flat, size * self.rows_per_sample)
        return [
            field.check(
                constants.get(field.name) if place is None else _tensor(flat.leaves[place], field),
                size,
                self._positions_axis if narrow and field.name in self.pads else None,
            )
            for field, place in zip(self.fields, places, strict=True)
        ]

    def _places_in(self, flat: FlatBatch) -> tuple[int | None, ...]:
        """Which leaf of a batch each field is; None for a field that is missing."""
        if flat.structure is self.nesting.structure:
            return self._places
        return tuple(flat.structure.places.get(field.name) for field in self.fields)

    @cached_property
    def _places(self) -> tuple[int | None, ...]:
        return tuple(self.nesting.structure.places.get(field.name) for field in self.fields)

    def _refuse_new(self, flat: FlatBatch, size: int) -> None:
        """Raise `BatchError` if a leaf that passes through, or a new one, may belong to the rows after all."""
        refuse_entries_of_rows(flat, size, self.lengths)
        if flat.structure is self.nesting.structure:
            return
        refuse_rows_of_lists(flat, size)
        for name in set(flat.names) - self._names:
            if size_of(flat[name]) == size:
                raise BatchError(
                    f"batch field '{name}' was not in the first batch; every batch needs the same fields "
                    "(or name the fields of a row in rehearsal.fields)"
                )

    def size(self, batch: Any) -> int:
        """Samples in a batch, checked as by `columns`."""
        return len(self.columns(batch)[0])

    def pack(self, columns: list[Tensor], out: Tensor, index: Tensor | None = None) -> None:
        """Copy samples into packed rows.

        Args:
            columns: The result of `columns`, followed by that of `state_columns` if rows have state.
            out: `[n, row_bytes]` uint8, overwritten but for what lies behind narrow columns; see `pad_behind`.
            index: `[n]` int64 in host memory, which samples; None takes all, and then n is the batch size.
        """
        pack_columns(self.cells, columns, out, index)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Where each column of a row goes."""
        return tuple(cells_of((*self.fields, *self.state), self.pads, self.rows_per_sample))

    def state_columns(self, state: Mapping[str, Tensor], size: int) -> list[Tensor]:
        """The state of `size` rows in the order of `self.state`, checked as a batch is.

        Raises:
            BatchError: A name is missing, or dtype or shape are not those of the first time.
        """
        return [field.check(state.get(field.name), size) for field in self.state]

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's state, at the end of the row."""
        return self.row_bytes - self.state[0].offset if self.state else 0

    def state_of(self, packed: Tensor) -> dict[str, Tensor]:
        """The state in the last `state_bytes` bytes of rows `[n, state_bytes]` by name, as views."""
        start = self.row_bytes - self.state_bytes
        return {f.name: replace(f, offset=f.offset - start).view(packed) for f in self.state}

    def unpack_state(self, rows: Tensor) -> dict[str, Tensor]:
        """The state of rows `[n, row_bytes]` by name, as views."""
        return self.state_of(rows[:, self.row_bytes - self.state_bytes :])

    def views(self, rows: Tensor, longest: int | None = None) -> dict[str, Tensor]:
        """The fields of rows `[n, row_bytes]` by name, as views, padded ones of no more than `longest` positions."""
        views = {field.name: field.view(rows) for field in self.fields}
        if longest is not None:
            views |= {field.name: views[field.name].narrow(self._positions_axis, 0, longest) for field in self.padded}
        return views

    def unpack(self, rows: Tensor) -> Any:
        """Rows `[n, row_bytes]` as a batch of views; leaves that are not fields come back as None."""
        return self.nesting.with_leaves({field.name: field.view(rows) for field in self._of_batch}).rebuild()

    def packed(self, rows: Tensor) -> Packed:
        """Rows `[n, row_bytes]` with the batch that lies in them."""
        return Packed(rows, self.unpack(rows))

    def join(
        self, batch: FlatBatch, replayed: Mapping[str, Tensor], memory: RecycledMemory, displaced: int = 0
    ) -> FlatBatch:
        """The batch with replayed samples behind it.

        Args:
            batch: A batch of b samples.
            replayed: The fields of r samples by name, `[r, *shape]` each, on any device.
            memory: Where the result goes, if it is large.
            displaced: How many of the batch's last samples make room.

        Returns:
            The same nesting with b - displaced + r samples a field; the batch's own stay first, bit-identical.
        """
        leaves = list(batch.leaves)
        for field, place in zip(self.fields, self._places_in(batch), strict=True):
            if place is None:  # a constant, as `columns` was asked before
                continue
            leaf = leaves[place]
            new = _tensor(leaf, field)
            kept = new[: len(new) - displaced] if displaced else new
            joined = memory.cat(kept, replayed[field.name].to(new.device, non_blocking=True))
            leaves[place] = joined if new is leaf else like(joined, leaf)
        return replace(batch, leaves=leaves)

    def cut(self, batch: FlatBatch, start: int, stop: int | None) -> FlatBatch:
        """The batch's samples from `start` to `stop`, as views; what is not a field passes through."""
        return batch.with_leaves({name: batch[name][start:stop] for name in self.names})

    def concatenate(self, first: FlatBatch, second: FlatBatch) -> FlatBatch:
        """The samples of two batches as one; what is not a field comes from the second."""
        columns = {
            field.name: like(torch.cat((column, _tensor(second[field.name], field))), second[field.name])
            for field, column in zip(self.fields, self.columns(first), strict=True)
            if field.name not in self.constants
        }
        return second.with_leaves(columns)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.passing).union(field.name for field in self.fields)


def _tensor(leaf: Any, field: Field) -> Any:
    """A leaf as a tensor, where it holds numbers; a list without any has those of its field."""
    if type(leaf) is Tensor:
        return leaf
    if isinstance(leaf, (list, tuple)) and not leaf:
        return torch.empty((0, *field.shape), dtype=field.dtype)
    column = as_column(leaf)
    return leaf if column is None else column
