"""Which slots belong to which partition: one list of slots a partition, all lists in one array.

Ragged lists in blocks. Every list has a block of the array, with some room behind its last entry:

    partition        0              1
    _lists       [ 4  0  2  .  .  | 1  3  .  . ]      sizes [3, 2], _begin [0, 5], _room [5, 4]
    _place of    slot 0: 1, slot 1: 0, slot 2: 2, slot 3: 1, slot 4: 0

Invariant: a list has no gaps, and `_lists[_begin[_owner[slot]] + _place[slot]] == slot` for every slot in use. So "the
i-th row of partition p" is one look-up, which is what a draw and Algorithm R ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray, Mask

__all__ = ["Partitions", "count_earlier"]


class Partitions:
    """The slots of each partition. Partitions are numbered in the order of their first appearance.

    Every change is a fixed number of array operations, however many rows and partitions a batch touches.

    Args:
        capacity: Slots.

    Attributes:
        keys: `[partitions]` int64, the partition key of each number.
        offered: `[partitions]` int64, rows offered so far.
        sizes: `[partitions]` int64, rows stored.
    """

    def __init__(self, capacity: int) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.offered = np.empty(0, dtype=np.int64)
        self.sizes = np.empty(0, dtype=np.int64)
        self._numbers: dict[int, int] = {}  # by key
        self._lists = np.empty(0, dtype=np.int64)
        self._begin = np.empty(0, dtype=np.int64)  # of the block of each partition
        self._room = np.empty(0, dtype=np.int64)  # in it
        self._end = 0  # of the last block
        self._owner = np.empty(capacity, dtype=np.int32)  # of each slot
        self._place = np.empty(capacity, dtype=np.int64)  # of each slot in the list of its owner

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, keys: IntArray) -> IntArray:
        """Partition numbers `[n]` of partition keys `[n]`; a new key gets the next number."""
        listed = keys.tolist()
        fresh = set(listed).difference(self._numbers)
        if fresh:
            self._add_partitions(sorted(fresh))
        return np.fromiter(map(self._numbers.__getitem__, listed), np.int64, len(listed))

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        begin = int(self._begin[number])
        return self._lists[begin : begin + int(self.sizes[number])]

    def slots(self, numbers: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of partitions by `numbers` `[n]`."""
        slots: IntArray = self._lists[self._begin[numbers] + index]
        return slots

    def most_offered(self, count: int) -> IntArray:
        """The numbers `[n]` of the `count` partitions that offered most rows, in ascending order."""
        if count >= len(self):
            return np.arange(len(self))
        return np.sort(np.argpartition(-self.offered, count)[:count])

    def count_offers(self, owners: IntArray) -> None:
        """Add offered rows `[n]` to the counts of their owners."""
        np.add.at(self.offered, owners, 1)

    def record(self, slots: IntArray, owners: IntArray, replaced: Mask) -> None:
        """Hand `slots` `[n]` over to `owners` `[n]`; `replaced` `[n]` marks slots that had an owner before."""
        moved = ~replaced | (self._owner[slots] != owners)  # the others keep their places
        if not np.count_nonzero(moved):
            return
        slots, owners, replaced = slots[moved], owners[moved], replaced[moved]
        self._remove_slots(slots[replaced])
        self._append_slots(slots, owners)

    def state_dict(self) -> dict[str, Any]:
        """Keys, rows offered and stored of each partition, and all their slots, partition by partition."""
        return {
            "keys": self.keys,
            "seen": self.offered,
            "sizes": self.sizes,
            "members": self._lists[_ranges(self._begin, self.sizes)],
        }

    def load_state_dict(self, state: Mapping[str, Any], count: int) -> None:
        """Take over what `state_dict` returned, into an object without partitions.

        Raises:
            ValueError: The lists do not have every slot below `count` once, or a key stands twice.
        """
        keys, offered, sizes, members = (state[name] for name in ("keys", "seen", "sizes", "members"))
        if not np.array_equal(np.sort(members), np.arange(count)) or int(sizes.sum()) != count or (sizes < 0).any():
            raise ValueError("the partitions do not share out the stored rows")
        if not len(keys) == len(offered) == len(sizes) == len(np.unique(keys)):
            raise ValueError("the partitions are not told apart")
        self._add_partitions(keys.tolist())  # in their order: the draw goes by numbers
        self._append_slots(members, np.repeat(np.arange(len(sizes)), sizes))
        self.offered = offered.copy()

    def _add_partitions(self, keys: list[int]) -> None:
        """Number new partitions in the order of `keys`; their blocks are empty."""
        self._numbers |= {key: number for number, key in enumerate(keys, len(self))}
        zeros = np.zeros(len(keys), dtype=np.int64)
        self.keys = np.concatenate((self.keys, np.array(keys, dtype=np.int64)))
        self.offered, self.sizes, self._begin, self._room = (
            np.concatenate((column, zeros)) for column in (self.offered, self.sizes, self._begin, self._room)
        )

    def _remove_slots(self, slots: IntArray) -> None:
        """Take `slots` `[n]` out of their lists: swap with last, for all of them at once.

        A list of size s that loses k slots has s - k left. Some of the k stand in its last k places and simply fall
        off. Each of the others leaves a hole, and there are as many slots in the last k places that stay:

            list [4 0 2 1 3], loses 0 and 3:   last two places [1 3]; 3 falls off, 1 moves to the hole of 0
                 [4 1 2]
        """
        slots = slots[self._owner[slots].argsort(kind="stable")]
        owners, places = self._owner[slots], self._place[slots]
        first = owners.searchsorted(owners)  # of each owner's slots
        self.sizes -= np.bincount(owners, minlength=len(self))
        begin, left = self._begin[owners], self.sizes[owners]
        last = self._lists[begin + left + np.arange(len(slots)) - first]  # of every list as many as it loses
        inside = places < left
        stays = np.ones(len(slots), dtype=bool)
        stays[(first + places - left)[~inside]] = False
        movers, holes = last[stays], places[inside]
        self._lists[begin[inside] + holes] = movers
        self._place[movers] = holes

    def _append_slots(self, slots: IntArray, owners: IntArray) -> None:
        """Put `slots` `[n]`, in their order, behind the lists of their `owners` `[n]`."""
        grown = self.sizes + np.bincount(owners, minlength=len(self))
        self._make_room(grown)
        places = self.sizes[owners] + count_earlier(owners)
        self._lists[self._begin[owners] + places] = slots
        self._place[slots], self._owner[slots] = places, owners
        self.sizes[:] = grown

    def _make_room(self, sizes: IntArray) -> None:
        """Give lists that shall have `sizes` `[partitions]` larger blocks where theirs are too small.

        New blocks have room for half as many rows again, so that a list moves a logarithmic number of times. They lie
        behind the others. Where the array ends, all lists are laid out in a new one, without the blocks left behind.
        """
        moving = (sizes > self._room).nonzero()[0]
        if not len(moving):
            return
        rooms = 3 * sizes // 2 + 16
        lists, end = self._lists, self._end
        if end + int(rooms[moving].sum()) > len(lists):
            moving, lists, end = np.arange(len(sizes)), np.empty(5 * int(rooms.sum()) // 4, dtype=np.int64), 0
        rooms = rooms[moving]
        begin = end + rooms.cumsum() - rooms
        held = self.sizes[moving]
        lists[_ranges(begin, held)] = self._lists[_ranges(self._begin[moving], held)]
        self._begin[moving], self._room[moving] = begin, rooms
        self._lists, self._end = lists, end + int(rooms.sum())


def count_earlier(owners: IntArray) -> IntArray:
    """How many rows of a batch before each row `[n]` have the same owner, `[n]` int64.

    >>> count_earlier(np.array([7, 3, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = owners.argsort(kind="stable")
    ordered = owners[order]
    counts = np.empty_like(owners)
    counts[order] = np.arange(len(owners)) - ordered.searchsorted(ordered)
    return counts


def _ranges(begin: IntArray, sizes: IntArray) -> IntArray:
    """The numbers `begin` to `begin + size - 1` of every range, `[sum(sizes)]` int64.

    >>> _ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist()
    [5, 6, 9, 10, 11]
    """
    return np.repeat(begin - sizes.cumsum() + sizes, sizes) + np.arange(int(sizes.sum()))
