"""Equal shares of the buffer for every partition, each a uniform sample of what its partition offered.

Shares are as equal as possible: a partition that has offered fewer rows than its share keeps them all, and
the room that it leaves goes to the others. Shares only ever shrink for a partition that has turned rows away,
so its sample stays uniform: shrinking a uniform sample at random leaves a uniform sample, and Algorithm R
goes on from there at the smaller size. (The sequential relative is class-balancing reservoir sampling,
Chrysakis and Moens, "Online continual learning from imbalanced data", ICML 2020.)
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.occupancy import Occupancy, Partitions
from rehearsal_plugin.policies.base import Offer, register, vacant
from rehearsal_plugin.policies.reservoir import algorithm_r
from rehearsal_plugin.shares import IntArray, fair_shares

__all__ = ["balanced"]


@register
def balanced(occupancy: Occupancy, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Equal shares per partition, rebalanced as partitions appear."""
    partitions, owners = occupancy.partitions, offer.owners
    if partitions is None:
        raise ConfigError("rehearsal.buffer.policy 'balanced' needs rehearsal.buffer.partition_by")
    targets = _targets(partitions, owners, occupancy.capacity)
    slots = np.full(len(owners), -1, dtype=np.int64)
    appended = np.zeros(len(owners), dtype=bool)
    freed = []
    touched = np.union1d(owners, np.flatnonzero(targets < partitions.sizes))
    for number in touched.tolist():
        rows = np.flatnonzero(owners == number)
        size, target = int(partitions.sizes[number]), int(targets[number])
        place = algorithm_r(int(partitions.seen[number]), len(rows), target, rng)
        stays = min(size, target)
        replacing = (place >= 0) & (place < stays)
        leaving = rng.choice(size, size - stays + np.count_nonzero(replacing), replace=False)
        left = partitions.members(number)[leaving]
        slots[rows[replacing]] = left[size - stays :]
        appended[rows[place >= stays]] = True
        freed.append(left[: size - stays])
    slots[appended] = vacant(freed, occupancy.count, int(appended.sum()))
    return slots


def _targets(partitions: Partitions, owners: IntArray, capacity: int) -> IntArray:
    """Rows that each partition holds after this batch, `[partitions]` int64."""
    offered = np.bincount(owners, minlength=len(partitions))
    complete = partitions.sizes == partitions.seen
    limits = np.where(complete, partitions.seen + offered, partitions.sizes)
    return fair_shares(limits, capacity)
