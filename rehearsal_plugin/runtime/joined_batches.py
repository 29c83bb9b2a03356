"""Batches with replayed rows in them, which must not come again: these rows would count as new ones."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["JoinedBatches"]

REMEMBERED = 8
"""Batches, for as long as somebody holds on to them: a loader may be some ahead of the loop."""


class JoinedBatches:
    """The last batches with replayed rows; knows them by their first field, which no other batch has."""

    def __init__(self) -> None:
        self._name = ""
        self._fields: deque[weakref.ref[Any]] = deque(maxlen=REMEMBERED)

    def note(self, joined: FlatBatch, batch: FlatBatch, layout: RowLayout) -> None:
        """Remember the batch that replayed rows were joined to; does nothing where none were."""
        self._name = layout.names[0]
        field = joined.get(self._name)
        if field is not batch.get(self._name) and isinstance(field, (Tensor, np.ndarray)):
            self._fields.append(weakref.ref(field))

    def refuse(self, batch: FlatBatch) -> None:
        """Raise `BatchError` for one of these batches."""
        field = batch.get(self._name)
        if field is not None and any(known() is field for known in self._fields):
            raise BatchError(
                "the batch has replayed rows in it already; call augment() or update() once for each batch, and not "
                "where a loader, an engine or a trainer does it"
            )
