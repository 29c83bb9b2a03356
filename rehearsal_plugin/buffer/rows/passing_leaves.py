"""Leaves that are no part of a row: refused where they may belong to the rows of a later batch after all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.rows.batch_size import size_of
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["refuse_edges", "refuse_entries_of_rows", "refuse_left_behind", "refuse_patches"]

GRIDS = "grid_thw"
"""How the names of grids of patches end, time by height by width, as in Qwen2-VL."""
EDGES = "edge_index"
"""How the names of a graph's edges end, `[2, edges]` numbers of nodes, as in PyTorch Geometric."""


def refuse_entries_of_rows(batch: FlatBatch, size: int, lengths: Mapping[str, int | None]) -> None:
    """Raise `BatchError` if a leaf that passes through may have one entry a row in this batch.

    Args:
        batch: With so many rows as `size` tells.
        size: Rows.
        lengths: Entries that each such leaf had in the first batch; None for a value without entries.
    """
    for name, length in lengths.items():
        leaf = batch.get(name)
        entries = size_of(leaf)
        if entries == size != length:
            was = "a value without entries" if length is None else f"of {length} entries"
            raise BatchError(
                f"batch field '{name}' was {was} in the first batch, so it is no part of a row, and has one entry "
                "a row now; give it from the first batch on, or name the fields of a row in rehearsal.fields"
            )
        if length is not None and entries != length and isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
            raise BatchError(
                f"batch field '{name}' had {length} entries in the first batch and has {entries} in this one of "
                f"{size} rows, so it is no table but may belong to the rows; give it one entry a row, or name the "
                "fields of a row in rehearsal.fields"
            )


def refuse_patches(batch: FlatBatch, lengths: Mapping[str, int | None]) -> None:
    """Raise `BatchError` if a leaf that passes through holds the patches of all pictures or films of the batch.

    Args:
        batch: Perhaps with grids `[pictures, 3]`.
        lengths: As for `refuse_entries_of_rows`.
    """
    for grid in batch.names:
        counts = batch[grid]
        if not grid.endswith(GRIDS) or not isinstance(counts, Tensor) or counts.ndim != 2:
            continue
        patches = int(counts.prod(1).sum())
        for name in (name for name, length in lengths.items() if length == patches):
            raise BatchError(
                f"batch field '{name}' holds the {patches} patches that '{grid}' tells of, and rows have different "
                f"numbers of them, so replayed rows would come without theirs; give '{name}' and '{grid}' one entry a "
                "row each, with all pictures at one size, or leave the pictures out of what is replayed"
            )


def refuse_edges(passing: Collection[str]) -> None:
    """Raise `BatchError` if one of these leaves, which pass through, holds the edges between the rows of the batch."""
    for name in passing:
        if name.endswith(EDGES):
            raise BatchError(
                f"batch field '{name}' holds edges between the rows of this batch, so replayed nodes would come "
                "without theirs; replay whole graphs, one a row, with nodes and edges padded to one size, or name the "
                "fields of a row in rehearsal.fields if rows have no edges"
            )


def refuse_left_behind(size: int, lengths: Mapping[str, int | None]) -> None:
    """Raise `BatchError` if a leaf that passes through has one entry a row, where replayed rows displace others.

    Args:
        size: Rows of the first batch.
        lengths: As for `refuse_entries_of_rows`.
    """
    left = [name for name, length in lengths.items() if length == size]
    if left:
        raise BatchError(
            f"rehearsal.fields leaves out {left}, with one entry a row, and with rehearsal.mode 'replace' replayed "
            "rows would come with those of the rows that they displace; name them, too, drop them from the batch, or "
            "set rehearsal.mode to 'append'"
        )
