"""Equal shares of the buffer for every partition, each a uniform sample of what its partition offered.

Shares are as equal as possible: a partition that has offered fewer rows than its share keeps them all, and
the room that it leaves goes to the others. Shares only ever shrink for a partition that has turned rows away,
so its sample stays uniform: shrinking a uniform sample at random leaves a uniform sample, and Algorithm R
goes on from there at the smaller size. (The sequential relative is class-balancing reservoir sampling,
Chrysakis and Moens, "Online continual learning from imbalanced data", ICML 2020.)

With fewer slots than partitions, a rank keeps one row of as many partitions as it has slots: alone the first ones, and
among others those that a hash puts behind its own place on a circle. So the ranks keep different ones, and together all
of them while there are slots enough on all ranks. For example, 2 slots on each of 3 ranks::

    circle    rank 0   p4  p1   rank 1   p5  p2  p6   rank 2   p3
    kept               p4  p1            p5  p2                p3  p4
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.buffer.partitions import Partitions, count_earlier
from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register, vacant
from rehearsal_plugin.buffer.policies.reservoir import algorithm_r_places
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.apportionment import fair_shares
from rehearsal_plugin.core.arrays import IntArray, Mask
from rehearsal_plugin.errors import ConfigError

__all__ = ["balanced"]

LOG = logging.getLogger(__name__)

CIRCLE = 1 << 64
"""Length of the circle on which partitions lie: distances wrap around as unsigned integers do."""


@register("balanced", partitions=True, sample_of="partition")
def balanced(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Equal shares per partition, rebalanced as partitions appear."""
    partitions, owners = slot_index.partitions, offer.owners
    if partitions is None:
        raise ConfigError("rehearsal.buffer.policy 'balanced' needs rehearsal.buffer.partition_by")
    targets = _target_sizes(slot_index, partitions, owners)
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


def _target_sizes(slot_index: SlotIndex, partitions: Partitions, owners: IntArray) -> IntArray:
    """Rows that each partition holds after this batch, `[partitions]` int64.

    A partition that has kept everything may grow by all that it offers; one that has turned rows away may not grow.
    With 4 rows of 9 offered, 1 of 1, and a new row of the second, the limits are 4 and 2.
    """
    limits, complete = partitions.sizes, partitions.sizes == partitions.offered
    if np.count_nonzero(complete):
        limits = np.where(complete, limits + np.bincount(owners, minlength=len(partitions)), limits)
    if np.count_nonzero(limits) > slot_index.capacity:
        _warn_of_crowd(slot_index, limits)
        if slot_index.place is not None:
            return _one_row_each(partitions, limits, slot_index.capacity, slot_index.place)
    return fair_shares(limits, slot_index.capacity)


def _warn_of_crowd(slot_index: SlotIndex, limits: IntArray) -> None:
    if not slot_index.crowded:
        slot_index.crowded = True
        LOG.warning(
            "rehearsal.buffer.policy 'balanced': %d partitions share %d slots on this rank, so some have no row here; "
            "raise rehearsal.buffer.capacity. Several ranks keep different ones",
            np.count_nonzero(limits),
            slot_index.capacity,
        )


def _one_row_each(partitions: Partitions, limits: IntArray, capacity: int, place: float) -> IntArray:
    """One row for as many partitions as there are slots: those that follow the rank's place on the circle."""
    present = np.flatnonzero(limits)
    distance = _places_on_circle(partitions.keys[present]) - np.uint64(int(place * CIRCLE))
    targets = np.zeros_like(limits)
    targets[present[np.argpartition(distance, capacity - 1)[:capacity]]] = 1
    return targets


def _places_on_circle(keys: IntArray) -> NDArray[np.uint64]:
    """A hash of each key `[n]`, the same on all ranks: the finalizer of splitmix64, a bijection."""
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
