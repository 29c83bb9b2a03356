"""Equal shares of the buffer for every partition, each a uniform sample of what its partition offered.

Shares are as equal as possible: a partition that has offered fewer rows than its share keeps them all, and
the room that it leaves goes to the others. Shares only ever shrink for a partition that has turned rows away,
so its sample stays uniform: shrinking a uniform sample at random leaves a uniform sample, and Algorithm R
goes on from there at the smaller size. (The sequential relative is class-balancing reservoir sampling,
Chrysakis and Moens, "Online continual learning from imbalanced data", ICML 2020.)
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.partitions import Partitions, count_earlier
from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register, vacant
from rehearsal_plugin.buffer.policies.reservoir import algorithm_r_places
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.apportionment import fair_shares
from rehearsal_plugin.core.arrays import IntArray, Mask
from rehearsal_plugin.errors import ConfigError

__all__ = ["balanced"]


@register("balanced", partitions=True)
def balanced(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Equal shares per partition, rebalanced as partitions appear."""
    partitions, owners = slot_index.partitions, offer.owners
    if partitions is None:
        raise ConfigError("rehearsal.buffer.policy 'balanced' needs rehearsal.buffer.partition_by")
    targets = _target_sizes(partitions, owners, slot_index.capacity)
    place = algorithm_r_places(partitions.offered[owners] + count_earlier(owners), targets[owners], rng)
    if np.array_equal(targets, partitions.sizes):  # every place is one that a row has
        return last_writers(np.where(place < 0, -1, partitions.slots(owners, place)))
    return _rebalance_slots(partitions, owners, targets, _latest_places(owners, targets, place), rng)


def _rebalance_slots(
    partitions: Partitions, owners: IntArray, targets: IntArray, place: IntArray, rng: np.random.Generator
) -> IntArray:
    """The slots `[n]` of rows with places `[n]` in reservoirs that grow or shrink to their targets.

    A place below the rows that stay replaces one of them; a place beyond is new, and gets the slot of a row that left
    a shrinking partition, or an unused one. With targets 2 and 2 for partitions of 3 and 1 rows, a row of the first
    leaves, and its slot goes to a new row of the second.
    """
    stays = np.minimum(partitions.sizes, targets)
    appended = place >= stays[owners]
    replacing = (place >= 0) & ~appended
    slots = np.full(len(owners), -1, dtype=np.int64)
    shrinking = (targets < partitions.sizes).nonzero()[0]
    freed = [
        _choose_leaving(partitions, number, int(stays[number]), slots, replacing & (owners == number), rng)
        for number in shrinking.tolist()
    ]
    # In a partition that does not shrink, any place is as good as another.
    whole = replacing & (slots < 0) if freed else replacing
    slots[whole] = partitions.slots(owners[whole], place[whole])
    if np.count_nonzero(appended):
        slots[appended] = vacant(freed, int(partitions.sizes.sum()), int(appended.sum()))
    return slots


def _latest_places(owners: IntArray, targets: IntArray, place: IntArray) -> IntArray:
    """The place of each row `[n]` in the reservoir of its partition, -1 where it has none or a later row has it."""
    begin = targets.cumsum() - targets  # reservoirs laid end to end, so that one look finds rows of one place
    last = last_writers(np.where(place < 0, -1, begin[owners] + place))
    return np.where(last < 0, -1, place)


def _choose_leaving(
    partitions: Partitions, number: int, stays: int, slots: IntArray, replacing: Mask, rng: np.random.Generator
) -> IntArray:
    """Pick rows of a shrinking partition at random: those that make room, and those that give `slots` to new rows."""
    size = int(partitions.sizes[number])
    leaving = rng.choice(size, size - stays + int(np.count_nonzero(replacing)), replace=False)
    left = partitions.members(number)[leaving]
    slots[replacing] = left[size - stays :]
    return left[: size - stays]


def _target_sizes(partitions: Partitions, owners: IntArray, capacity: int) -> IntArray:
    """Rows that each partition holds after this batch, `[partitions]` int64.

    A partition that has kept everything may grow by all that it offers; one that has turned rows away may not grow.
    With 4 rows of 9 offered, 1 of 1, and a new row of the second, the limits are 4 and 2.
    """
    limits, complete = partitions.sizes, partitions.sizes == partitions.offered
    if np.count_nonzero(complete):
        limits = np.where(complete, limits + np.bincount(owners, minlength=len(partitions)), limits)
    return fair_shares(limits, capacity)
