"""Rows and state on their way between ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import narrowed
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.census import PostedHeaders
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.transport import Pending

__all__ = ["Arrival", "Outgoing", "Posted", "Refresh"]


@dataclass(frozen=True)
class Outgoing:
    """Rows `[sent, row_bytes]` for their readers, on the transport's device, and where they came from.

    Attributes:
        rows: The rows.
        layout: How they are packed, see `narrowing`; the same on all ranks.
        plan: Who gets which.
        slots: `[sent]` int64, where each row lives.
        written: `[sent]` int64, when it was admitted; empty for rows without state.
    """

    rows: Tensor
    layout: RowLayout
    plan: Plan
    slots: IntArray
    written: IntArray

    def state_dict(self) -> dict[str, Any]:
        """The same as plain tensors, arrays and numbers."""
        source = {"plan": self.plan.state_dict(), "slots": self.slots, "written": self.written}
        return {"rows": self.rows, "width": self.layout.longest, **source}

    @classmethod
    def load(cls, state: Mapping[str, Any], layout: RowLayout, device: torch.device) -> Outgoing:
        """What `state_dict` gave, or what an earlier release did, of rows of a layout; with the rows on `device`."""
        packed = narrowed(layout, state.get("width"))
        return cls(state["rows"].to(device), packed, Plan.load(state["plan"]), state["slots"], state["written"])


@dataclass(frozen=True)
class Arrival:
    """Rows `[received, row_bytes]` uint8 from their owners.

    Attributes:
        rows: The rows.
        source: What this rank sent in the same exchange; its plan tells which draw gave each row, its layout how they
            are packed.
        longest: Positions of the longest row, behind which all are padding; None where nobody looked.
    """

    rows: Tensor
    source: Outgoing
    longest: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The same as plain tensors, arrays and numbers; rows that were sent are not wanted any more."""
        return {"rows": self.rows, "source": replace(self.source, rows=self.source.rows[:0]).state_dict()}

    @classmethod
    def load(cls, state: Mapping[str, Any], layout: RowLayout, device: torch.device) -> Arrival:
        """What `state_dict` gave of rows of a layout, with the rows on `device`."""
        return cls(state["rows"].to(device), Outgoing.load(state["source"], layout, device))


@dataclass(frozen=True)
class Refresh:
    """State of the rows of an arrival, on its way back to their owners.

    Attributes:
        packed: `[received, state_bytes + ALIGNMENT]` uint8; the last byte is 0 where nothing is new, for what was taken
            along may be older than what the owner has by now.
        source: What was sent in the exchange that brought the rows.
    """

    packed: Tensor
    source: Outgoing


@dataclass(frozen=True)
class Posted:
    """The collectives of a step in flight; None stands for one that no rank needs."""

    step: int
    headers: PostedHeaders
    rows: Pending | None
    source: Outgoing | None
    refresh: Pending | None = None
    refreshed: Outgoing | None = None
