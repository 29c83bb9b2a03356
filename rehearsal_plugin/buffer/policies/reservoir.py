"""A uniform sample of everything that was ever offered."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import below

__all__ = ["algorithm_r", "places", "reservoir", "thinned"]


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
    return last_writers(places(seen + np.arange(offered), capacity, rng))


def places(order: IntArray, capacity: int | IntArray, rng: np.random.Generator) -> IntArray:
    """Where Algorithm R puts rows, -1 for nowhere; a row that is put to the same place later replaces the earlier one.

    Args:
        order: `[n]` int64, how many rows were offered to its reservoir before each row.
        capacity: Places of the reservoir, or `[n]` int64 of that of each row.
        rng: Source of random numbers.
    """
    place = below(order + 1, len(order), rng)
    np.copyto(place, order, where=order < capacity)
    np.copyto(place, -1, where=place >= capacity)
    return place


def thinned(seen: int, stored: int, offered: int, capacity: int, rng: np.random.Generator) -> IntArray:
    """Algorithm R for a reservoir that may have room although it has turned rows away.

    That happens when the rows of a job are shared out between more ranks. Each new row is then taken with the
    chance `stored / seen` that every earlier one had, until the room is filled; so all stay equally likely.

    Args:
        seen: Rows offered before this batch.
        stored: Rows stored now.
        offered: Rows in this batch, n.
        capacity: Places of the reservoir.
        rng: Source of random numbers.

    Returns:
        `[n]` int64 places as of `algorithm_r`; new ones are taken in order from `stored`.
    """
    if stored in (0, seen, capacity):
        return algorithm_r(seen if stored else 0, offered, capacity, rng)
    slots = np.full(offered, -1, dtype=np.int64)
    taken = np.flatnonzero(rng.random(offered) * seen < stored)[: capacity - stored]
    slots[taken] = stored + np.arange(len(taken))
    if stored + len(taken) == capacity:
        rest = int(taken[-1]) + 1
        slots[rest:] = algorithm_r(seen + rest, offered - rest, capacity, rng)
    return last_writers(slots)


@register("reservoir")
def reservoir(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Every row offered so far has the same chance to be stored."""
    return thinned(slot_index.seen, slot_index.count, len(offer), slot_index.capacity, rng)
