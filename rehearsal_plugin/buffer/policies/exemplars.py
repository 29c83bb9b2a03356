"""Exemplars of each partition: the rows whose features are nearest to its mean, alone or together.

The buffer is shared equally between partitions. Of the rows that a partition has stored and those that it is
offered, the best ones fill its share; the mean is that of everything that the partition has ever offered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, register, vacant
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.apportionment import fair_shares
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray

__all__ = ["closest_to_centre", "herding"]

Choice: TypeAlias = Callable[[Float32Array, Float64Array, int], IntArray]
"""`choice(features [n, width], mean [width], count) -> [count]` int64, the rows to keep, best first."""


@register("herding", judges="features")
def herding(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Each partition keeps rows whose mean is near its own: a greedy choice of the row that brings it nearest.

    For the features 0, 4, 5 of mean 3: first 4. Then 0, as (4 + 0) / 2 is 2, nearer than (4 + 5) / 2. The policy
    `closest_to_centre` takes 5 in its place.

    Rebuffi et al., "iCaRL: incremental classifier and representation learning", CVPR 2017, algorithm 4. Takes
    (rows of a partition)^2 products of features for every partition that a batch touches, so it is for small buffers.
    """
    return _keep_best(slot_index, offer, _choose_by_herding)


@register("closest_to_centre", judges="features")
def closest_to_centre(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Each partition keeps the rows that are nearest to its mean."""
    return _keep_best(slot_index, offer, _choose_nearest)


def _keep_best(slot_index: SlotIndex, offer: Offer, choice: Choice) -> IntArray:
    """The slots `[n]` of offered rows, -1 where they are not kept.

    A partition that the batch touches, or that has to shrink, chooses anew among its stored and offered rows. Stored
    rows that are not chosen give up their slots, which go to the chosen rows of any partition.
    """
    assert slot_index.scores is not None
    assert offer.scores is not None  # the config asks for features
    sizes, owners = slot_index.sizes, offer.owners
    targets = fair_shares(sizes + np.bincount(owners, minlength=len(sizes)), slot_index.capacity)
    kept, freed = np.zeros(len(offer), dtype=bool), []
    for number in np.union1d(owners, np.flatnonzero(targets < sizes)).tolist():
        members, rows = slot_index.members(number), np.flatnonzero(owners == number)
        features = np.concatenate((slot_index.scores.stored[members], offer.scores[rows]))
        stays = np.zeros(len(features), dtype=bool)
        stays[choice(features, slot_index.scores.centre(number, offer.scores[rows]), int(targets[number]))] = True
        freed.append(members[~stays[: len(members)]])
        kept[rows] = stays[len(members) :]
    slots = np.full(len(offer), -1, dtype=np.int64)
    slots[kept] = vacant(freed, slot_index.count, int(np.count_nonzero(kept)))
    return slots


def _choose_nearest(features: Float32Array, mean: Float64Array, count: int) -> IntArray:
    return np.argsort(_squared_lengths(features - mean), kind="stable")[:count]


def _choose_by_herding(features: Float32Array, mean: Float64Array, count: int) -> IntArray:
    """Greedy choice, each next row in O(rows): the one with which the offsets from the mean add up to the least.

    With `t` the sum of the chosen offsets, `|t + g|^2` is least where `costs`, `|g|^2 / 2 + g . t`, is. For the
    features 0, 4, 5 of mean 3, whose offsets are -3, 1, 2::

        costs  4.5  0.5  2     takes 4
               1.5  inf  4     takes 0
    """
    if count >= len(features):
        return np.arange(len(features))
    offsets = features - mean
    costs = 0.5 * _squared_lengths(offsets)
    chosen = np.empty(count, dtype=np.int64)
    for place in range(count):
        best = chosen[place] = costs.argmin()
        costs += np.einsum("nw,w->n", offsets, offsets[best])
        costs[best] = np.inf
    return chosen


def _squared_lengths(vectors: Float64Array) -> Float64Array:
    return np.asarray(np.einsum("nw,nw->n", vectors, vectors))
