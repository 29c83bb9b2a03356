"""Which slots of a buffer are in use, and by which partition: the index that policies and draws look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.buffer.partitions import Partitions
from rehearsal_plugin.buffer.scores import Scores
from rehearsal_plugin.core.arrays import Float32Array, IntArray

__all__ = ["SlotIndex", "kept_places"]


class SlotIndex:
    """The index of one rank's buffer. Slots 0 to `count - 1` are in use; a row is replaced, never removed.

    Args:
        capacity: Slots.
        partitioned: Whether rows have owners.
        width: Numbers in a row's score; 0 where rows have none.
        means: Whether the mean score of each partition is asked for.
        place: Rank over number of ranks, from 0 to below 1; where there are fewer slots than partitions, ranks at
            different places keep different partitions. None for a rank alone, which keeps the first ones.

    Attributes:
        capacity: Slots; fewer than at first once `close_free_slots` was called.
        place: As given.
        crowded: Whether there were more partitions than slots, which is warned of once.
        count: Rows stored.
        offered: Rows offered so far.
        partitions: The slots of each partition; None where rows are not partitioned.
        scores: The score of each row; None where rows have none.
    """

    def __init__(
        self, capacity: int, partitioned: bool, width: int = 0, *, means: bool = True, place: float | None = None
    ) -> None:
        self.capacity, self._slots, self.place, self.crowded = capacity, capacity, place, False
        self.count = 0
        self.offered = 0
        self.partitions = Partitions(capacity) if partitioned else None
        self.scores = Scores(capacity, width, means=means) if width else None

    @property
    def sizes(self) -> IntArray:
        """Rows stored of each partition, `[partitions]` int64; of the only one where rows are not partitioned."""
        return np.array([self.count]) if self.partitions is None else self.partitions.sizes

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        return np.arange(self.count) if self.partitions is None else self.partitions.members(number)

    def counts(self) -> tuple[IntArray, IntArray]:
        """Partition keys and rows stored of each, two arrays `[partitions]` int64; empty without partitions."""
        if self.partitions is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return self.partitions.keys, self.partitions.sizes

    def slots(self, keys: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of the partitions with `keys` `[n]`."""
        return index if self.partitions is None else self.partitions.slots(self.partitions.number(keys), index)

    @property
    def tickets(self) -> int:
        """The scores of all stored rows together, as a whole number; see `holders`."""
        return 0 if self.scores is None else self.scores.tickets(self.count).total

    def holders(self, tickets: IntArray) -> IntArray:
        """The slots `[n]` that hold `tickets` `[n]` int64 from 0 to `tickets - 1`; a row holds as many as its score."""
        assert self.scores is not None  # the config asks for a score
        return self.scores.tickets(self.count).find(tickets)

    def record(self, slots: IntArray, owners: IntArray, scores: Float32Array | None = None) -> IntArray:
        """Note the outcome of an admission.

        Args:
            slots: `[n]` int64, where each offered row goes, -1 where it is not kept; no slot twice.
            owners: `[n]` int64, the partition of each offered row; zeros where rows are not partitioned.
            scores: `[n, width]` float32, those of the offered rows.

        Returns:
            The slots of the rows that are kept; the same array where all are.
        """
        kept, kept_owners, kept_scores = slots, owners, scores
        places = kept_places(slots)
        if places is not None:
            kept, kept_owners, kept_scores = slots[places], owners[places], None if scores is None else scores[places]
        if self.scores is not None and scores is not None and kept_scores is not None:
            self.scores.set(kept, kept_scores)
            self.scores.count_offers(owners, scores)
        if self.partitions is not None:
            self.partitions.record(kept, kept_owners, replaced=kept < self.count)
            self.partitions.count_offers(owners)
        self.offered += len(slots)
        if self.count < self.capacity:
            self.count += int(np.count_nonzero(slots >= self.count))
        return kept

    def close_free_slots(self) -> None:
        """Have no more slots than there are rows: a new row can only replace another."""
        self.capacity = min(self.capacity, max(1, self.count))

    def count_thinned(self, owners: IntArray) -> None:
        """Count rows of `owners` `[n]` that were offered and are not held by anybody any more."""
        self.offered += len(owners)
        if self.partitions is not None:
            self.partitions.count_offers(owners)

    def state_dict(self) -> dict[str, Any]:
        """The whole index, as arrays and numbers; views of it where it is large."""
        closed = {} if self.capacity == self._slots else {"capacity": self.capacity}
        return {
            **closed,
            "count": self.count,
            "seen": self.offered,
            "partitions": None if self.partitions is None else self.partitions.state_dict(),
            "values": None if self.scores is None else self.scores.state_dict(self.count),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned for an index of the same capacity, into an empty one.

        Raises:
            ValueError: The state contradicts itself.
        """
        self.count, self.offered = int(state["count"]), int(state["seen"])
        self.capacity = min(self.capacity, int(state.get("capacity", self.capacity)))
        if not 0 <= self.count <= min(self.capacity, self.offered):
            raise ValueError(f"{self.count} rows stored of {self.offered} offered, with room for {self.capacity}")
        if self.partitions is not None:
            self.partitions.load_state_dict(state["partitions"], self.count)
        if self.scores is not None:
            self.scores.load_state_dict(state["values"])


def kept_places(slots: IntArray) -> IntArray | None:
    """The places `[kept]` int64 of the rows that are kept, by their `slots` `[n]`; None where all are.

    >>> kept_places(np.array([5, -1, 0]))
    array([0, 2])
    """
    if not len(slots) or slots[slots.argmin()] >= 0:  # several times faster than to compare them all
        return None
    return (slots >= 0).nonzero()[0]
