"""Lists and tuples in a batch: several fields, or one entry a row, which cannot be stored.

| list | taken as |
|---|---|
| tensors with one entry a row each, as two views of every row | fields |
| as many tensors, mappings or lists as there are rows | one entry a row: refused |
| mappings with the same keys | one mapping a row: refused |
| tensors alike, and nothing else in the batch: images, or more than four | one tensor a row: refused |
| a tuple of two to four numbers, and as many rows | a size, or one number a row: refused |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.rows.batch_size import entries_of
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["refuse_alike_tensors", "refuse_rows_of_lists", "refuse_short_tuple"]

MOST_ALIKE = 4
"""Tensors alike that may be as many fields, as token ids, mask and labels are in a `TensorDataset`."""

IMAGE_CHANNELS = (1, 3, 4)
LONGEST_SIZE = 4
"""Numbers of a size such as (height, width), a stride or a box."""


def refuse_alike_tensors(flat: FlatBatch) -> None:
    """Refuse a batch of nothing but lists of tensors that may be one row each, as a list of images `[3, h, w]`."""
    by_parent: dict[str, list[Any]] = {}
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if entries_of(leaf) is not None:
            parent, _, key = name.rpartition(".")
            by_parent.setdefault(parent if key.isdigit() else name, []).append(leaf)
    if not by_parent or not all(map(_may_be_rows, by_parent.values())):
        return
    parent, entries = next(iter(by_parent.items()))
    raise BatchError(
        f"{_called(parent)} is a list of {len(entries)} tensors alike, so each may be one row, which cannot be stored: "
        "stack them to one tensor, or name the fields of a row in rehearsal.fields"
    )


def refuse_short_tuple(name: str, leaf: object, rows: int) -> None:
    """Refuse a tuple of a few numbers and as many rows: (224, 224) in a batch of two may be the size of all images."""
    if isinstance(leaf, tuple) and 1 < len(leaf) == rows <= LONGEST_SIZE:
        raise BatchError(
            f"batch field '{name}' is a tuple of {rows} numbers in a batch of {rows} rows, so it may be one number a "
            "row, or one setting such as a size; give numbers of rows as a list or a tensor, or name the fields of a "
            "row in rehearsal.fields"
        )


def _may_be_rows(entries: list[Any]) -> bool:
    """Whether the entries of a list are tensors of one kind that may be one row each."""
    if len(entries) < 2 or not all(isinstance(leaf, (Tensor, np.ndarray)) for leaf in entries):
        return False
    kinds = {(leaf.dtype, leaf.ndim, leaf.shape[0]) for leaf in entries}
    first = entries[0]
    images = first.ndim == 3 and first.shape[0] in IMAGE_CHANNELS
    return len(kinds) == 1 and (images or len(entries) > MOST_ALIKE)


def _called(parent: str) -> str:
    return f"batch field '{parent}'" if parent else "the batch"


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
        if parent and len(entries) == size:
            raise BatchError(
                f"{_called(parent)} is a list of {size} entries in a batch of {size} rows, so it may have one "
                "entry a row, which cannot be stored: pad its entries and stack them to one tensor, or name the fields "
                "of a row in rehearsal.fields"
            )
        if len(entries) > 1 and _are_alike(parent, entries) and any(leaf is not None for leaf in leaves):
            raise BatchError(
                f"{_called(parent)} is a list of {len(entries)} mappings with the same keys, so each may be one row, "
                "which cannot be stored: stack their entries to one tensor a key, or name the fields of a row in "
                "rehearsal.fields"
            )


def _are_alike(parent: str, entries: Mapping[str, list[str]]) -> bool:
    """Whether all entries of a list are mappings or dataclasses with the same keys."""
    within = [
        tuple(name[len(f"{parent}.{place}." if parent else f"{place}.") :] for name in names)
        for place, names in entries.items()
    ]
    return all(keys == within[0] for keys in within) and not any(not key or key[0].isdigit() for key in within[0])
