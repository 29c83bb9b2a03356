"""A uniform sample of everything that was ever offered."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import integers_below

__all__ = ["algorithm_r", "algorithm_r_places", "reservoir", "thinned_places"]


def algorithm_r(offered_before: int, offered: int, capacity: int, rng: np.random.Generator) -> IntArray:
    """One batch of Algorithm R (Vitter, "Random sampling with a reservoir", 1985), all rows at once.

    Row i of the stream, counted from 0, draws a place from 0 to i and is kept if that is below `capacity`. Three rows
    after 4 others, for a reservoir of 2: they draw below 5, 6 and 7, say 1, 4, 1, which gives the places 1, -1, 1;
    the last row takes place 1 from the first, so the result is -1, -1, 1.

    Args:
        offered_before: Rows offered before this batch.
        offered: Rows in this batch, n.
        capacity: Places of the reservoir.
        rng: Source of random numbers.

    Returns:
        `[n]` int64, the place that each row holds after the batch, -1 where it is not in the reservoir.
        Each of the `offered_before + n` rows is then kept with the same chance, whatever the sizes of the batches.
    """
    return last_writers(algorithm_r_places(offered_before + np.arange(offered), capacity, rng))


def algorithm_r_places(order: IntArray, capacity: int | IntArray, rng: np.random.Generator) -> IntArray:
    """Where Algorithm R puts rows, -1 for nowhere; a row that is put to the same place later replaces the earlier one.

    Args:
        order: `[n]` int64, how many rows were offered to its reservoir before each row.
        capacity: Places of the reservoir, or `[n]` int64 of that of each row.
        rng: Source of random numbers.
    """
    place = integers_below(order + 1, len(order), rng)
    np.copyto(place, order, where=order < capacity)  # there is room: rows take the places in order
    np.copyto(place, -1, where=place >= capacity)
    return place


def thinned_places(offered_before: int, stored: int, offered: int, capacity: int, rng: np.random.Generator) -> IntArray:
    """Algorithm R for a reservoir that may have room although it has turned rows away.

    That happens when the rows of a job are shared out between more ranks. A rank may then store 20 of the 100 rows
    that it counts as offered, with room for 50. If it took every new row, these would be likelier to be stored than
    the old ones. So each is taken with the chance 20 / 100 that every earlier one had, until the room is filled.

    While there is room, all rows offered so far are equally likely to be stored. Then Algorithm R goes on. The change
    comes at a row that was itself taken, so later chances are equal up to about one row of the reservoir.

    Args:
        offered_before: Rows offered before this batch.
        stored: Rows stored now.
        offered: Rows in this batch, n.
        capacity: Places of the reservoir.
        rng: Source of random numbers.

    Returns:
        `[n]` int64 places as of `algorithm_r`; new ones are taken in order from `stored`.
    """
    if stored in (0, offered_before, capacity):
        return algorithm_r(offered_before if stored else 0, offered, capacity, rng)
    slots = np.full(offered, -1, dtype=np.int64)
    taken = np.flatnonzero(rng.random(offered) * offered_before < stored)[: capacity - stored]
    slots[taken] = stored + np.arange(len(taken))
    if stored + len(taken) == capacity:
        rest = int(taken[-1]) + 1
        slots[rest:] = algorithm_r(offered_before + rest, offered - rest, capacity, rng)
    return last_writers(slots)


@register("reservoir", sample_of="rank")
def reservoir(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Every row offered so far has the same chance to be stored."""
    return thinned_places(slot_index.offered, slot_index.count, len(offer), slot_index.capacity, rng)
