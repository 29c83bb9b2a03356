"""What the leaves of a batch are: fields of a row, or values that pass through unreplayed.

The batch size is the length that most leaves have. A leaf has a length if it is a tensor or an array with a dimension,
or a list or tuple of plain values. For example::

    {"x": [8, 3], "y": [8], "table": [9], "epoch": 2}     lengths 8, 8, 9: the batch has 8 rows
    x, y     fields: one entry a row
    table    passes through: 9 entries, not 8
    epoch    passes through: no entries

The entries of a list or tuple inside of a batch vote together, as one leaf. Of two lengths with as many leaves none is
taken: the batch is refused, and `rehearsal.fields` says which leaves make up a row. A list of as many tensors as there
are rows is refused too, unless each of them has one entry a row, as two tensors in a batch of two rows.

A leaf with one entry a row either becomes a field, or is refused by name: nothing that belongs to a row stays behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import sparse_field
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["Leaves", "as_column", "classify", "entries_of", "like", "refuse_rows_of_lists"]


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
    lengths = {name: entries_of(leaf) for name, leaf in zip(flat.names, flat.leaves, strict=True)}
    if only is not None:
        return _named(flat, only, lengths)
    size = _batch_size({name: length for name, length in lengths.items() if length is not None})
    columns = {name: _column(name, flat[name]) for name, length in lengths.items() if length == size}
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if lengths[name] is None and _size_of(leaf) == size:
            _column(name, leaf)  # refused by name
    refuse_rows_of_lists(flat, size)
    passing = {name: _why(length, size) for name, length in lengths.items() if name not in columns}
    return Leaves(size, columns, passing, {name: lengths[name] for name in passing})


def entries_of(leaf: object) -> int | None:
    """The length of a leaf; None for one without."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, (list, tuple)) else None


def _size_of(leaf: object) -> int | None:
    """What `len` gives for an object of any other type; None for strings and objects without a length."""
    try:
        return None if isinstance(leaf, (str, bytes, Tensor, np.ndarray)) else len(leaf)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_column(leaf: object) -> Tensor | None:
    """A leaf as a tensor `[n, ...]`: tensors as they are, numbers of arrays, lists and tuples; None for all others."""
    if isinstance(leaf, Tensor):
        return leaf
    if not isinstance(leaf, (np.ndarray, list, tuple)):
        return None
    try:
        numbers = np.asarray(leaf)
        return torch.from_numpy(numbers) if numbers.dtype.kind in "biufc" else None
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
        kind = f" of {type(leaf[0]).__name__}" if isinstance(leaf, (list, tuple)) else ""
        raise BatchError(
            f"batch field '{name}' is {what}{kind} with one entry a row, and only numbers can be stored; encode it as "
            "numbers, drop it from the batch, or name the fields of a row in rehearsal.fields"
        )
    if column.layout != torch.strided:
        raise BatchError(sparse_field(name, column))
    return column


def refuse_rows_of_lists(flat: FlatBatch, size: int) -> None:
    """Refuse a list of one container or one tensor a row: its entries would stay with the rows of this batch."""
    by_parent: dict[str, dict[str, list[str]]] = {}
    for name in flat.names:
        keys = name.split(".")
        for depth in range(1, len(keys)):
            if keys[depth].isdigit():
                entries = by_parent.setdefault(".".join(keys[:depth]), {})
                entries.setdefault(keys[depth], []).append(name)
    for parent, entries in by_parent.items():
        if len(entries) != size or size < 2 or list(entries) != [str(place) for place in range(size)]:
            continue
        leaves = [flat[name] for names in entries.values() for name in names]
        if not all(isinstance(leaf, (Tensor, np.ndarray)) and entries_of(leaf) == size for leaf in leaves):
            raise BatchError(
                f"batch field '{parent}' is a list of {size} entries in a batch of {size} rows, so it may have one "
                "entry a row, which cannot be stored: pad its entries and stack them to one tensor, or name the fields "
                "of a row in rehearsal.fields"
            )


def _why(length: int | None, size: int) -> str:
    return "no entries" if length is None else f"{length} entries, not {size}"
