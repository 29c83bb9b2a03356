"""Rows that arrived: moved to the device of the batches, and measured, in the background."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer
from rehearsal_plugin.distributed.in_flight import Arrival

__all__ = ["ArrivedRows"]


class ArrivedRows:
    """Prepares arrivals for the training thread, which then looks at no more positions than the longest row has.

    Args:
        device: Where batches live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._trimmer: RowTrimmer | None = None
        self._layout: RowLayout | None = None  # of the trimmer

    def prepare(self, arrival: Arrival) -> Arrival:
        """The arrival on the device of the batches, with the length of its longest row where that is cheap to find."""
        longest = self._longest(arrival.rows, arrival.source.layout)
        return replace(arrival, rows=arrival.rows.to(self._device), longest=longest)

    def _longest(self, rows: Tensor, layout: RowLayout) -> int | None:
        """Positions of the longest row; None for rows of one length, or on a device."""
        if not layout.pads or not rows.is_cpu:
            return None
        if self._trimmer is None or layout is not self._layout:
            self._trimmer, self._layout = RowTrimmer(layout), layout
        return int(self._trimmer.lengths(rows.numpy(), np.arange(len(rows))).max(initial=0))
