"""A uniform sample of everything that was ever offered."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.occupancy import Occupancy
from rehearsal_plugin.policies.base import Offer, last_writers, register
from rehearsal_plugin.shares import IntArray

__all__ = ["algorithm_r", "reservoir"]


def algorithm_r(seen: int, offered: int, capacity: int, rng: np.random.Generator) -> IntArray:
    """One batch of Algorithm R (Vitter, "Random sampling with a reservoir", 1985), all rows at once.

    Args:
        seen: Rows offered before this batch.
        offered: Rows in this batch, n.
        capacity: Places of the reservoir.
        rng: Source of random numbers.

    Returns:
        `[n]` int64, the place that each row holds after the batch, -1 where it is not in the reservoir.
        Each of the `seen + n` rows is then kept with the same chance, whatever the sizes of the batches.
    """
    order = seen + np.arange(offered)
    place = rng.integers(0, order + 1)
    place = np.where(order < capacity, order, place)
    place[place >= capacity] = -1
    return last_writers(place)


@register
def reservoir(occupancy: Occupancy, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Every row offered so far has the same chance to be stored."""
    return algorithm_r(occupancy.seen, len(offer), occupancy.capacity, rng)
