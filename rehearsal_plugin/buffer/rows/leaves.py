"""What the leaves of a batch are: fields of a row, or values that pass through unreplayed.

The batch size is the length that most leaves have. A leaf has a length if it is a tensor or an array with a dimension,
or a list or tuple of plain values. For example::

    {"x": [8, 3], "y": [8], "table": [9], "epoch": 2}     lengths 8, 8, 9: the batch has 8 rows
    x, y     fields: one entry a row
    table    passes through: 9 entries, not 8
    epoch    passes through: no entries

The entries of a list or tuple inside of a batch vote together, as one leaf. Of two lengths with as many leaves none is
taken: the batch is refused, and `rehearsal.fields` says which leaves make up a row. A list of as many tensors as there
are rows is refused too, unless each of them has one entry a row, as two tensors in a batch of two rows. So is a list of
mappings with the same keys, as one a row, unless all they hold are fields, as in two views of every row.

A leaf with one entry a row either becomes a field, or is refused by name: nothing that belongs to a row stays behind.
Packed sequences and nested tensors, whose rows do not lie apart, are refused, and so is a tensor of three dimensions
with one entry a row in its second, and an object of any other type that holds a tensor with one entry a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from rehearsal_plugin.buffer.rows.fields import unsupported_kind
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["Leaves", "as_column", "classify", "entries_of", "like", "refuse_rows_of_lists", "size_of"]


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


def classify(flat: FlatBatch, only: Collection[str] | None) -> Leaves:
    """Tell fields from leaves that pass through.

    Args:
        flat: The first batch.
        only: Names of the fields that make up a row; None takes every leaf with one entry a row.

    Raises:
        BatchError: No field at all, a name in `only` that is none, a batch whose size cannot be told, or a leaf with
            one entry a row that cannot be stored.
    """
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.is_nested:  # it has no length
            raise BatchError(unsupported_kind(name, leaf))
    lengths = {name: entries_of(leaf) for name, leaf in zip(flat.names, flat.leaves, strict=True)}
    if only is not None:
        return _named(flat, only, lengths)
    for name in flat.structure.packed:
        raise BatchError(
            f"batch field '{name}' is a PackedSequence, in which rows do not lie apart; give the padded tensor and the "
            "lengths, and pack in the model, or name the fields of a row in rehearsal.fields"
        )
    size = _batch_size({name: length for name, length in lengths.items() if length is not None})
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
        _refuse_later_batch_dimension(name, flat[name], size)
    refuse_rows_of_lists(flat, size)
    passing = {name: _why(length, size) for name, length in lengths.items() if name not in columns}
    return Leaves(size, columns, passing, {name: lengths[name] for name in passing})


def entries_of(leaf: object) -> int | None:
    """The length of a leaf; None for one without."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, (list, tuple)) else None


def size_of(leaf: object) -> int | None:
    """The same also for objects of any other type that have a length, but not for strings."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return entries_of(leaf)
    try:
        return None if isinstance(leaf, (str, bytes)) else len(leaf)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _holds_rows(leaf: object, size: int, depth: int = 4) -> bool:
    """Whether an object holds, in its attributes or below them, a tensor or an array with one entry a row."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return entries_of(leaf) == size
    if not depth or isinstance(leaf, (type, Module)):
        return False
    inner = leaf.values() if isinstance(leaf, dict) else getattr(leaf, "__dict__", {}).values()
    return any(_holds_rows(value, size, depth - 1) for value in tuple(inner))


def _refuse_later_batch_dimension(name: str, leaf: object, size: int) -> None:
    """Refuse what has one entry a row in dimension 1: positions `[3, rows, length]`, states `[layers, rows, width]`."""
    if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim == 3 and leaf.shape[0] != size == leaf.shape[1]:
        raise BatchError(
            f"batch field '{name}' has shape {tuple(leaf.shape)} in a batch of {size} rows, so it may have one entry a "
            "row in dimension 1; move that to the front, or name the fields of a row in rehearsal.fields"
        )


def as_column(leaf: object) -> Tensor | None:
    """A leaf as a tensor `[n, ...]`: tensors as they are, numbers of arrays, lists and tuples; None for all others."""
    if isinstance(leaf, Tensor):
        return leaf
    if not isinstance(leaf, (np.ndarray, list, tuple)):
        return None
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


def _batch_size(lengths: Mapping[str, int]) -> int:
    if not lengths:
        raise BatchError("the batch has no tensor with a batch dimension, so there is nothing to rehearse")
    voters = {(_voter(name), length) for name, length in lengths.items()}
    votes = Counter(length for _, length in voters)
    (size, most), *others = votes.most_common()
    rivals = [length for length, count in others if count == most]
    if rivals:
        groups = {length: sorted(n for n, own in lengths.items() if own == length) for length in (size, rivals[0])}
        (one, its_names), (other, their_names) = groups.items()
        raise BatchError(
            f"the batch size cannot be told: {its_names} have {one} entries and {their_names} have {other}; name the "
            "leaves that have one entry a row in rehearsal.fields"
        )
    return size


def _voter(name: str) -> str:
    """The leaf, or the list or tuple inside of the batch that it stands in."""
    keys = name.split(".")
    depth = next((depth for depth in range(1, len(keys)) if keys[depth].isdigit()), len(keys))
    return ".".join(keys[:depth])


def _named(flat: FlatBatch, only: Collection[str], lengths: Mapping[str, int | None]) -> Leaves:
    missing = sorted(name for name in set(only) if lengths.get(name) is None)
    if missing:
        there = [name for name, length in lengths.items() if length is not None]
        raise BatchError(f"rehearsal.fields names {missing}, which are no tensors of the batch: it has {there}")
    columns = {name: _column(name, flat[name]) for name in flat.names if name in only}
    first, size = next((name, column.shape[0]) for name, column in columns.items())
    for name, column in columns.items():
        if column.shape[0] != size:
            raise BatchError(f"batch field '{name}' has {column.shape[0]} samples and '{first}' has {size}")
    passing = {name: "not in rehearsal.fields" for name in flat.names if name not in columns}
    return Leaves(size, columns, passing, {name: lengths[name] for name in passing})


def _column(name: str, leaf: object) -> Tensor:
    column = as_column(leaf)
    if column is None:
        what = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else f"a {type(leaf).__name__}"
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


def refuse_rows_of_lists(flat: FlatBatch, size: int) -> None:
    """Refuse a list of one container or one tensor a row: its entries would stay with the rows of this batch."""
    by_parent: dict[str, dict[str, list[str]]] = {}
    for name in flat.names:
        keys = name.split(".")
        for depth in range(len(keys)):
            if keys[depth].isdigit():
                entries = by_parent.setdefault(".".join(keys[:depth]), {})
                entries.setdefault(keys[depth], []).append(name)
    for parent, entries in by_parent.items():
        if list(entries) != [str(place) for place in range(len(entries))]:
            continue
        leaves = [flat[name] for names in entries.values() for name in names]
        if all(isinstance(leaf, (Tensor, np.ndarray)) and entries_of(leaf) == size for leaf in leaves):
            continue
        what = f"batch field '{parent}'" if parent else "the batch"
        if parent and len(entries) == size:
            raise BatchError(
                f"{what} is a list of {size} entries in a batch of {size} rows, so it may have one "
                "entry a row, which cannot be stored: pad its entries and stack them to one tensor, or name the fields "
                "of a row in rehearsal.fields"
            )
        if len(entries) > 1 and _are_alike(parent, entries) and any(leaf is not None for leaf in leaves):
            raise BatchError(
                f"{what} is a list of {len(entries)} mappings with the same keys, so each may be one row, which cannot "
                "be stored: stack their entries to one tensor a key, or name the fields of a row in rehearsal.fields"
            )


def _are_alike(parent: str, entries: Mapping[str, list[str]]) -> bool:
    """Whether all entries of a list are mappings or dataclasses with the same keys."""
    within = [
        tuple(name[len(f"{parent}.{place}." if parent else f"{place}.") :] for name in names)
        for place, names in entries.items()
    ]
    return all(keys == within[0] for keys in within) and not any(not key or key[0].isdigit() for key in within[0])


def _why(length: int | None, size: int) -> str:
    return "no entries" if length is None else f"{length} entries, not {size}"
