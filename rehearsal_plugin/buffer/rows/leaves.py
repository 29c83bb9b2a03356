"""What the leaves of a batch are: fields of a row, or values that pass through unreplayed.

`batch_size` says how many rows there are. A leaf has a length if it is a tensor or an array with a dimension, or a list
or tuple of plain values. For example::

    {"x": [8, 3], "y": [8], "table": [9], "epoch": 2}     lengths 8, 8, 9: the batch has 8 rows
    x, y     fields: one entry a row
    table    passes through: 9 entries, not 8
    epoch    passes through: no entries

`rows_in_lists` says which lists are refused because each of their entries may be a row.

A leaf with one entry a row either becomes a field, or is refused by name: nothing that belongs to a row stays behind.
Packed sequences and nested tensors, whose rows do not lie apart, are refused, and so is an object of any other type
that holds a tensor with one entry a row. A leaf with one entry a row in dimension 1 is refused, too: one of three or
more dimensions, as states `[layers, rows, width]`, or of two if it holds integers, as tokens `[steps, rows]`. Other
numbers of two dimensions may be a table, and are a warning. So are those with several entries for each row, and so is
one entry for all rows; integers with several for each, or other numbers of three or more dimensions, are refused, and
so are patches of pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from rehearsal_plugin.buffer.rows.batch_size import batch_size, entries_of, holds_integers, size_of
from rehearsal_plugin.buffer.rows.fields import unsupported_kind
from rehearsal_plugin.buffer.rows.passing_leaves import refuse_edges, refuse_patches
from rehearsal_plugin.buffer.rows.rows_in_lists import refuse_alike_tensors, refuse_rows_of_lists, refuse_short_tuple
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["Leaves", "as_column", "classify", "like"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaves:
    """The leaves of a first batch.

    Attributes:
        size: Rows of the batch.
        columns: The fields by name, `[size, ...]` each.
        passing: Why each other leaf passes through, by name.
        lengths: Entries of each of these in the first batch; None for a value without entries.
    """

    size: int
    columns: dict[str, Tensor]
    passing: dict[str, str]
    lengths: dict[str, int | None]


def classify(flat: FlatBatch, only: Collection[str] | None, rows_per_sample: int = 1) -> Leaves:
    """Tell fields from leaves that pass through.

    Args:
        flat: The first batch.
        only: Names of the fields that make up a row; None takes every leaf with one entry a row.
        rows_per_sample: Rows that belong together. Leaves with one entry a sample count as passing here.

    Raises:
        BatchError: No field at all, a name in `only` that is none, a batch whose size cannot be told, or a leaf with
            one entry a row that cannot be stored.
    """
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.is_nested:  # it has no length
            raise BatchError(unsupported_kind(name, leaf))
    lengths = {name: entries_of(leaf) for name, leaf in zip(flat.names, flat.leaves, strict=True)}
    if only is not None:
        return _named(flat, only, lengths, rows_per_sample)
    for name in flat.structure.packed:
        raise BatchError(
            f"batch field '{name}' is a PackedSequence, in which rows do not lie apart; give the padded tensor and the "
            "lengths, and pack in the model, or name the fields of a row in rehearsal.fields"
        )
    refuse_alike_tensors(flat)
    size = batch_size(dict(zip(flat.names, flat.leaves, strict=True)), rows_per_sample)
    columns = {name: _column(name, flat[name]) for name, length in lengths.items() if length == size}
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if lengths[name] is None and size_of(leaf) == size:
            _column(name, leaf)  # refused by name
        if lengths[name] is None and _holds_rows(leaf, size):
            raise BatchError(
                f"batch field '{name}' is a {type(leaf).__name__} that holds tensors with one entry a row, which "
                "cannot be stored; give them in a mapping, a dataclass, a list or a tuple, or name the fields of a row "
                "in rehearsal.fields"
            )
    for name in flat.names:
        refuse_short_tuple(name, flat[name], size)
        _check_later_dimension(name, flat[name], size)
        if rows_per_sample * (lengths[name] or 0) != size:
            _check_other_length(name, flat[name], size)
    refuse_rows_of_lists(flat, size)
    passing = {name: _why(length, size) for name, length in lengths.items() if name not in columns}
    refuse_edges(passing)
    refuse_patches(flat, {name: lengths[name] for name in passing})
    return Leaves(size, columns, passing, {name: lengths[name] for name in passing})


def _holds_rows(leaf: object, size: int, depth: int = 4) -> bool:
    """Whether an object holds, in its attributes or below them, a tensor or an array with one entry a row."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return entries_of(leaf) == size
    if not depth or isinstance(leaf, (type, Module)):
        return False
    inner = leaf.values() if isinstance(leaf, dict) else getattr(leaf, "__dict__", {}).values()
    return any(_holds_rows(value, size, depth - 1) for value in tuple(inner))


def _check_later_dimension(name: str, leaf: object, size: int) -> None:
    """Refuse one entry a row in dimension 1: positions `[3, rows, length]`, tokens `[steps, rows]`; warn of others."""
    if not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim < 2 or leaf.shape[0] == size or leaf.shape[1] != size:
        return
    if leaf.ndim > 2 or holds_integers(leaf):
        raise BatchError(
            f"batch field '{name}' has shape {tuple(leaf.shape)} in a batch of {size} rows, so it may have one entry a "
            "row in dimension 1; move that to the front, or name the fields of a row in rehearsal.fields"
        )
    LOG.warning(
        "batch field '%s' has shape %s in a batch of %d rows and is taken for a table, which passes through "
        "unreplayed; if it has one entry a row in dimension 1, move that to the front",
        name,
        tuple(leaf.shape),
        size,
    )


def _check_other_length(name: str, leaf: object, size: int) -> None:
    """Refuse what belongs to rows without one entry for each, as the boxes of pictures; warn of what may be a table."""
    if not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim == 0 or len(leaf) == size:
        return
    times = len(leaf) // size if size > 1 and len(leaf) % size == 0 else 0
    if leaf.ndim < 3 and times < 2 and not (leaf.ndim == 2 and len(leaf) > size == 1):
        return
    rows = f"{size} rows, {times} entries for each" if times > 1 else f"{size} row{'s' * (size != 1)}"
    cure = (
        "give it one entry a row, set rehearsal.rows_per_sample, or name all other leaves in rehearsal.fields if it is "
        "a table"
    )
    if (leaf.ndim > 2 and len(leaf) > 1) or (times > 1 and holds_integers(leaf)):
        raise BatchError(
            f"batch field '{name}' has shape {tuple(leaf.shape)} in a batch of {rows}, so replayed rows would come "
            f"without theirs; {cure}"
        )
    LOG.warning(
        "batch field '%s' has shape %s in a batch of %s, and passes through unreplayed; if it belongs to them, %s",
        name,
        tuple(leaf.shape),
        rows,
        cure,
    )


def as_column(leaf: object) -> Tensor | None:
    """A leaf as a tensor `[n, ...]`: tensors as they are, numbers of arrays, lists and tuples; None for all others."""
    if isinstance(leaf, Tensor):
        return leaf
    if not isinstance(leaf, (list, tuple)) and type(leaf) not in (np.ndarray, np.memmap):
        return None  # such as a masked array, which would lose its mask
    try:
        numbers = np.asarray(leaf)
        if numbers.dtype.kind not in "biufc":
            return None
        if not (numbers.flags.writeable and numbers.dtype.isnative and min(numbers.strides, default=0) >= 0):
            numbers = np.array(numbers, numbers.dtype.newbyteorder("="), order="C")  # which torch can view
        return torch.from_numpy(numbers)
    except (TypeError, ValueError):  # rows of different length, or a dtype that torch lacks
        return None


def like(column: Tensor, leaf: object) -> Any:
    """A joined column in the form that its leaf of the batch has."""
    if isinstance(leaf, np.ndarray):
        return column.numpy()
    return type(leaf)(column.tolist()) if isinstance(leaf, (list, tuple)) else column


def _named(flat: FlatBatch, only: Collection[str], lengths: Mapping[str, int | None], rows_per_sample: int) -> Leaves:
    named = [(name, length) for name in flat.names if name in only and (length := lengths[name]) is not None]
    missing = sorted(set(only).difference(name for name, _ in named))
    if missing:
        there = [name for name, length in lengths.items() if length is not None]
        raise BatchError(f"rehearsal.fields names {missing}, which are no tensors of the batch: it has {there}")
    first, size = named[0]
    if rows_per_sample > 1:
        first, size = max(named, key=lambda one: one[1])
    columns = {}
    for name, length in named:
        if length == size:
            columns[name] = _column(name, flat[name])
        elif rows_per_sample == 1 or length * rows_per_sample != size:
            raise BatchError(f"batch field '{name}' has {length} samples and '{first}' has {size}")
    passing = {name: "not in rehearsal.fields" for name in flat.names if name not in columns}
    return Leaves(size, columns, passing, {name: lengths[name] for name in passing})


def _column(name: str, leaf: object) -> Tensor:
    column = as_column(leaf)
    if column is None:
        plain = type(leaf) is np.ndarray
        what = f"an array of {leaf.dtype}" if plain else f"a {type(leaf).__name__}"  # type: ignore[attr-defined]
        kinds = sorted({type(entry).__name__ for entry in leaf}) if isinstance(leaf, (list, tuple)) else []
        kind = f" of {' and '.join(kinds)}" if kinds else ""
        raise BatchError(
            f"batch field '{name}' is {what}{kind} with one entry a row, and only numbers can be stored; encode it as "
            "numbers, drop it from the batch, or name the fields of a row in rehearsal.fields"
        )
    unsupported = unsupported_kind(name, column)
    if unsupported is not None:
        raise BatchError(unsupported)
    return column


def _why(length: int | None, size: int) -> str:
    return "no entries" if length is None else f"{length} entries, not {size}"
