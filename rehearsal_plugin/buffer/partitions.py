"""Which slots belong to which partition: one list of slots a partition, all in one array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["Partitions", "earlier"]


class Partitions:
    """Rows by partition, with partitions numbered in the order of their first appearance.

    Every partition lists its slots without gaps, so that "the i-th row of partition p" is one look-up. A
    removal moves the last entries into the holes. The lists lie in one array, each in a block with some room; one
    that has grown out of its block gets a larger one. All work is a fixed number of array operations, however many
    rows and partitions a batch touches.
    """

    def __init__(self, capacity: int) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.seen = np.empty(0, dtype=np.int64)
        self.sizes = np.empty(0, dtype=np.int64)
        self._number: dict[int, int] = {}
        self._lists = np.empty(0, dtype=np.int64)
        self._begin = np.empty(0, dtype=np.int64)  # of the block of each partition
        self._room = np.empty(0, dtype=np.int64)  # in it
        self._end = 0  # of the last block
        self._owner = np.empty(capacity, dtype=np.int32)
        self._place = np.empty(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, keys: IntArray) -> IntArray:
        """Partition numbers `[n]` of partition keys `[n]`; new keys found a new partition each."""
        listed = keys.tolist()
        fresh = set(listed).difference(self._number)
        if fresh:
            self._found(sorted(fresh))
        return np.fromiter(map(self._number.__getitem__, listed), np.int64, len(listed))

    def members(self, number: int) -> IntArray:
        """The slots of a partition, `[size]` int64; a view that the next `record` changes."""
        begin = int(self._begin[number])
        return self._lists[begin : begin + int(self.sizes[number])]

    def slots(self, numbers: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of partitions by `numbers` `[n]`."""
        slots: IntArray = self._lists[self._begin[numbers] + index]
        return slots

    def count_offers(self, owners: IntArray) -> None:
        """Add offered rows `[n]` to what each partition has seen."""
        self.seen += np.bincount(owners, minlength=len(self))

    def record(self, slots: IntArray, owners: IntArray, replaced: np.ndarray) -> None:
        """Hand `slots` `[n]` over to `owners` `[n]`; `replaced` `[n]` bool tells which had an owner before."""
        moved = ~replaced | (self._owner[slots] != owners)  # the others keep their places
        if not np.count_nonzero(moved):
            return
        slots, owners, replaced = slots[moved], owners[moved], replaced[moved]
        self._remove(slots[replaced])
        self._append(slots, owners)

    def state_dict(self) -> dict[str, Any]:
        """Keys, rows offered and stored of each partition, and all their slots, partition by partition."""
        return {
            "keys": self.keys,
            "seen": self.seen,
            "sizes": self.sizes,
            "members": self._lists[_spread(self._begin, self.sizes)],
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
        self._append(members, np.repeat(np.arange(len(sizes)), sizes))
        self.seen = seen.copy()

    def _found(self, keys: list[int]) -> None:
        """Number new partitions in the order of their keys."""
        self._number |= {key: number for number, key in enumerate(keys, len(self))}
        zeros = np.zeros(len(keys), dtype=np.int64)
        self.keys = np.concatenate((self.keys, np.array(keys, dtype=np.int64)))
        self.seen, self.sizes, self._begin, self._room = (
            np.concatenate((column, zeros)) for column in (self.seen, self.sizes, self._begin, self._room)
        )

    def _remove(self, slots: IntArray) -> None:
        """Take `slots` `[n]` from the lists that they stand in; what stands last there moves to their places."""
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

    def _append(self, slots: IntArray, owners: IntArray) -> None:
        """Put `slots` `[n]`, in their order, behind the lists of their `owners` `[n]`."""
        grown = self.sizes + np.bincount(owners, minlength=len(self))
        self._make_room(grown)
        places = self.sizes[owners] + earlier(owners)
        self._lists[self._begin[owners] + places] = slots
        self._place[slots], self._owner[slots] = places, owners
        self.sizes[:] = grown

    def _make_room(self, sizes: IntArray) -> None:
        """Give lists that shall have `sizes` `[partitions]` larger blocks where theirs are too small.

        They move behind the others; where the array ends, all are laid out in a new one.
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
        lists[_spread(begin, held)] = self._lists[_spread(self._begin[moving], held)]
        self._begin[moving], self._room[moving] = begin, rooms
        self._lists, self._end = lists, end + int(rooms.sum())


def earlier(owners: IntArray) -> IntArray:
    """How many rows of a batch before each row `[n]` have the same owner, `[n]` int64."""
    order = owners.argsort(kind="stable")
    ordered = owners[order]
    counts = np.empty_like(owners)
    counts[order] = np.arange(len(owners)) - ordered.searchsorted(ordered)
    return counts


def _spread(begin: IntArray, sizes: IntArray) -> IntArray:
    """The numbers `begin` to `begin + size - 1` of every range, `[sum(sizes)]` int64."""
    return np.repeat(begin - sizes.cumsum() + sizes, sizes) + np.arange(int(sizes.sum()))
