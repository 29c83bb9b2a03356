"""Which slots of a buffer are taken, and by which partition: the index that policies and draws look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.shares import IntArray
from rehearsal_plugin.values import FloatArray, Values

__all__ = ["Occupancy", "Partitions"]


class Occupancy:
    """The index of one rank's buffer. Slots 0 to `count - 1` are taken; a row is replaced, never removed.

    Attributes:
        capacity: Slots.
        count: Rows stored.
        seen: Rows offered so far.
        partitions: Who owns which slot; None where rows are not partitioned.
        values: What rows are judged by; None where they are not.
    """

    def __init__(self, capacity: int, partitioned: bool, width: int = 0) -> None:
        self.capacity = capacity
        self.count = 0
        self.seen = 0
        self.partitions = Partitions(capacity) if partitioned else None
        self.values = Values(capacity, width) if width else None

    @property
    def sizes(self) -> IntArray:
        """Rows stored of each partition, `[partitions]` int64; of the only one where rows are not partitioned."""
        return np.array([self.count]) if self.partitions is None else self.partitions.sizes

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        return np.arange(self.count) if self.partitions is None else self.partitions.members(number)

    def record(self, slots: IntArray, owners: IntArray, values: FloatArray | None = None) -> None:
        """Note the outcome of an admission.

        Args:
            slots: `[n]` int64, where each offered row goes, -1 where it is not kept; no slot twice.
            owners: `[n]` int64, the partition of each offered row; zeros where rows are not partitioned.
            values: `[n, width]` float32, what each offered row is judged by.
        """
        if self.values is not None and values is not None:
            kept = slots >= 0
            self.values.set(slots[kept], values[kept])
            self.values.count_offers(owners, values)
        if self.partitions is not None:
            kept = slots >= 0
            self.partitions.record(slots[kept], owners[kept], replaced=slots[kept] < self.count)
            self.partitions.count_offers(owners)
        self.seen += len(slots)
        if self.count < self.capacity:
            self.count += int(np.count_nonzero(slots >= self.count))

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


class Partitions:
    """Rows by partition, with partitions numbered in the order of their first appearance.

    Every partition lists its slots without gaps, so that "the i-th row of partition p" is one look-up. A
    removal moves the last entries into the holes. All work is a fixed number of array operations for every
    partition that a batch touches; none loops over rows.
    """

    def __init__(self, capacity: int) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.seen = np.empty(0, dtype=np.int64)
        self.sizes = np.empty(0, dtype=np.int64)
        self._number: dict[int, int] = {}
        self._members: list[IntArray] = []
        self._owner = np.empty(capacity, dtype=np.int32)
        self._place = np.empty(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._members)

    def number(self, keys: IntArray) -> IntArray:
        """Partition numbers `[n]` of partition keys `[n]`; new keys found a new partition each."""
        distinct, inverse = np.unique(keys, return_inverse=True)
        fresh = [key for key in distinct.tolist() if key not in self._number]
        if fresh:
            self._found(fresh)
        return np.array([self._number[key] for key in distinct.tolist()], dtype=np.int64)[inverse]

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        return self._members[number][: self.sizes[number]]

    def slots(self, numbers: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of partitions by `numbers` `[n]`."""
        slots = np.empty(len(index), dtype=np.int64)
        for number in set(numbers.tolist()):
            rows = numbers == number
            slots[rows] = self._members[number][index[rows]]
        return slots

    def count_offers(self, owners: IntArray) -> None:
        """Add offered rows `[n]` to what each partition has seen."""
        self.seen += np.bincount(owners, minlength=len(self))

    def record(self, slots: IntArray, owners: IntArray, replaced: np.ndarray) -> None:
        """Hand `slots` `[n]` over to `owners` `[n]`; `replaced` `[n]` bool tells which had an owner before."""
        moved = ~replaced | (self._owner[slots] != owners)  # the others keep their places
        slots, owners, replaced = slots[moved], owners[moved], replaced[moved]
        old = slots[replaced]
        former = self._owner[old]
        for number in set(former.tolist()):
            self._remove(number, old[former == number])
        for number in sorted(set(owners.tolist())):
            self._append(number, slots[owners == number])

    def state_dict(self) -> dict[str, Any]:
        """Keys, rows offered and stored of each partition, and all their slots, partition by partition."""
        members = [self.members(number) for number in range(len(self))]
        return {
            "keys": self.keys,
            "seen": self.seen,
            "sizes": self.sizes,
            "members": np.concatenate(members) if members else np.empty(0, dtype=np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any], count: int) -> None:
        """Take over what `state_dict` gave; every slot below `count` has one partition.

        Raises:
            ValueError: It has not.
        """
        keys, seen, sizes, members = (state[name] for name in ("keys", "seen", "sizes", "members"))
        if not np.array_equal(np.sort(members), np.arange(count)) or int(sizes.sum()) != count or (sizes < 0).any():
            raise ValueError("the partitions do not share out the stored rows")
        if not len(keys) == len(seen) == len(sizes) == len(np.unique(keys)):
            raise ValueError("the partitions are not told apart")
        self._found(keys.tolist())  # in their order: the draw goes by numbers
        for number, slots in enumerate(np.split(members, np.cumsum(sizes)[:-1]) if len(sizes) else []):
            self._append(number, slots)
        self.seen = seen.copy()

    def _found(self, keys: list[int]) -> None:
        """Number new partitions in the order of their keys."""
        for key in keys:
            self._number[key] = len(self._members)
            self._members.append(np.empty(16, dtype=np.int64))
        zeros = np.zeros(len(keys), dtype=np.int64)
        self.keys = np.concatenate((self.keys, np.array(keys, dtype=np.int64)))
        self.seen = np.concatenate((self.seen, zeros))
        self.sizes = np.concatenate((self.sizes, zeros))

    def _remove(self, number: int, slots: IntArray) -> None:
        members, size = self.members(number), int(self.sizes[number])
        left = size - len(slots)
        places = self._place[slots]
        tail_stays = np.ones(len(slots), dtype=bool)
        tail_stays[places[places >= left] - left] = False
        holes, movers = places[places < left], members[left:size][tail_stays]
        members[holes] = movers
        self._place[movers] = holes
        self.sizes[number] = left

    def _append(self, number: int, slots: IntArray) -> None:
        size = int(self.sizes[number])
        grown = size + len(slots)
        if grown > len(self._members[number]):
            self._members[number] = np.resize(self._members[number], 2 * grown)
        self._members[number][size:grown] = slots
        self._place[slots] = np.arange(size, grown)
        self._owner[slots] = number
        self.sizes[number] = grown
