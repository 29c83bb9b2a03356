"""With how many positions rows of different length travel: as many as the longest of all ranks needs.

Each rank tells in its headers what its own rows need, and the largest that all have heard is the width of the rows that
are drawn by these headers. In a stretch without headers the width stays, so a candidate that is longer waits outside::

    exchange            7     8     9     10    11
    headers             yes   .     .     yes   yes
    longest candidate   900   70    1500  1200  1500
    width               1024  1024  1024  1280  1536        9: not offered to the buffer

A new width comes seldom: widths are apart by an eighth or more, and there are headers in every exchange until all
buffers are full and nothing has changed for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.row_reader import RowReader
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import narrowed, width_for
from rehearsal_plugin.buffer.rows.staging import BoundedRows
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["RowWidth"]

LOG = logging.getLogger(__name__)


class RowWidth:
    """The width of this rank's rows, and of those that ranks send each other.

    Args:
        buffer: This rank's rows.
    """

    def __init__(self, buffer: RehearsalBuffer) -> None:
        self._buffer, self._stored, self._warned = buffer, buffer.stored_layout, False
        self._longest = self._stored.longest  # that a row can be
        self._told = self._waiting = 0  # positions, of the last header and of candidates that were not offered
        self._packing = self._stored, buffer.reader()

    def tell(self, staged: BoundedRows) -> int:
        """The word of this rank's next header, with `staged` rows among its own; 0 where all rows have one length."""
        if self._longest is None:
            return 0
        longest = self._buffer.longest
        of_rows = (self._needed(staged).max(initial=0), self._longest if longest is None else longest)
        self._told = max(self._told, width_for(int(max(*of_rows, self._waiting)), self._longest))
        return self._told

    def packing(self, width: int | None) -> tuple[RowLayout, RowReader]:
        """How rows are packed that travel with a width, and what reads them; None or 0 for as they are stored."""
        width = width or self._longest
        if self._packing[0].longest != width:
            packed = narrowed(self._stored, width)
            self._packing = packed, self._buffer.reader(None if packed is self._stored else packed)
        return self._packing

    def admissible(self, staged: BoundedRows, width: int | None) -> BoundedRows:
        """Those of the staged rows that can travel with a width, see `packing`; the next header tells of the others."""
        if self._longest is None or not width:
            return staged
        lengths = self._needed(staged)
        if (lengths <= width).all():
            return staged
        if self._pads_alike and staged.rows.is_cpu:
            # A batch is as wide as its longest row; only now is it worth to look at each.
            lengths = self._trimmer.lengths(staged.rows.numpy(), np.arange(len(lengths)), lengths)
        places = np.flatnonzero(lengths <= width)
        if len(places) == len(lengths):
            return staged
        self._waiting = max(self._waiting, int(lengths.max()))
        self._warn(len(lengths) - len(places), width)
        return BoundedRows(staged.rows[torch.from_numpy(places).to(staged.rows.device)], staged.bounds[places])

    def _warn(self, count: int, width: int) -> None:
        """Say once that rows wait."""
        if not self._warned:
            self._warned = True
            LOG.warning(
                "%d candidates are not offered to the buffer, as batches have become longer: ranks have told each "
                "other of rows of up to %d positions, and will of longer ones within 64 steps",
                count,
                width,
            )

    def _needed(self, staged: BoundedRows) -> IntArray:
        """Positions that each staged row needs at most, `[n]` int64: all where batches are padded in another way."""
        return staged.bounds if self._pads_alike else np.full(len(staged.bounds), self._longest)

    @property
    def _pads_alike(self) -> bool:
        return self._buffer.layout.pads == self._stored.pads

    @cached_property
    def _trimmer(self) -> RowTrimmer:
        return RowTrimmer(self._stored)

    def state_dict(self) -> dict[str, Any]:
        """What this rank told."""
        return {"told": self._told, "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._told, self._waiting = int(state["told"]), int(state["waiting"])
