"""Which slots of a buffer are taken, and by which partition: the index that policies and draws look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.buffer.partitions import Partitions
from rehearsal_plugin.buffer.scores import Scores
from rehearsal_plugin.core.arrays import Float32Array, IntArray

__all__ = ["SlotIndex", "kept_places"]


class SlotIndex:
    """The index of one rank's buffer. Slots 0 to `count - 1` are taken; a row is replaced, never removed.

    Args:
        capacity: Slots.
        partitioned: Whether rows have owners.
        width: Numbers that a row is judged by; 0 where rows are not judged.
        means: Whether the means of these numbers are asked for.

    Attributes:
        capacity: Slots.
        count: Rows stored.
        seen: Rows offered so far.
        partitions: Who owns which slot; None where rows are not partitioned.
        values: What rows are judged by; None where they are not.
    """

    def __init__(self, capacity: int, partitioned: bool, width: int = 0, *, means: bool = True) -> None:
        self.capacity = capacity
        self.count = 0
        self.seen = 0
        self.partitions = Partitions(capacity) if partitioned else None
        self.values = Scores(capacity, width, means=means) if width else None

    @property
    def sizes(self) -> IntArray:
        """Rows stored of each partition, `[partitions]` int64; of the only one where rows are not partitioned."""
        return np.array([self.count]) if self.partitions is None else self.partitions.sizes

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        return np.arange(self.count) if self.partitions is None else self.partitions.members(number)

    def record(self, slots: IntArray, owners: IntArray, values: Float32Array | None = None) -> IntArray:
        """Note the outcome of an admission.

        Args:
            slots: `[n]` int64, where each offered row goes, -1 where it is not kept; no slot twice.
            owners: `[n]` int64, the partition of each offered row; zeros where rows are not partitioned.
            values: `[n, width]` float32, what each offered row is judged by.

        Returns:
            The slots of the rows that are kept; the same array where all are.
        """
        kept, own, judged = slots, owners, values
        places = kept_places(slots)
        if places is not None:
            kept, own, judged = slots[places], owners[places], None if values is None else values[places]
        if self.values is not None and values is not None and judged is not None:
            self.values.set(kept, judged)
            self.values.count_offers(owners, values)
        if self.partitions is not None:
            self.partitions.record(kept, own, replaced=kept < self.count)
            self.partitions.count_offers(owners)
        self.seen += len(slots)
        if self.count < self.capacity:
            self.count += int(np.count_nonzero(slots >= self.count))
        return kept

    def state_dict(self) -> dict[str, Any]:
        """The whole index, as arrays and numbers; views of it where it is large."""
        return {
            "count": self.count,
            "seen": self.seen,
            "partitions": None if self.partitions is None else self.partitions.state_dict(),
            "values": None if self.values is None else self.values.state_dict(self.count),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave for an index of the same capacity, into an empty one.

        Raises:
            ValueError: It contradicts itself.
        """
        self.count, self.seen = int(state["count"]), int(state["seen"])
        if not 0 <= self.count <= min(self.capacity, self.seen):
            raise ValueError(f"{self.count} rows stored of {self.seen} offered, with room for {self.capacity}")
        if self.partitions is not None:
            self.partitions.load_state_dict(state["partitions"], self.count)
        if self.values is not None:
            self.values.load_state_dict(state["values"])


def kept_places(slots: IntArray) -> IntArray | None:
    """Which rows are kept that were given `slots` `[n]`, -1 for none: `[kept]` int64; None where all are."""
    if not len(slots) or slots[slots.argmin()] >= 0:  # several times faster than to compare them all
        return None
    return (slots >= 0).nonzero()[0]
