"""The rule of the distributed rehearsal buffer papers: every candidate is kept, at a random place."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import integers_below

__all__ = ["random_replace"]


@register("random_replace")
def random_replace(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Fill the buffer, then overwrite random rows.

    With c candidates a batch of b (`rehearsal.candidates`) a sample is taken with probability c/b, as in
    Bouvier et al. (arXiv 2406.03285). Old rows decay geometrically; use `reservoir` where the whole past
    shall be represented alike.
    """
    offered = len(offer)
    room = min(slot_index.capacity - slot_index.count, offered)
    places = integers_below(slot_index.capacity, offered - room, rng)
    if room:
        places = np.concatenate((slot_index.count + np.arange(room), places))
    return last_writers(places)
