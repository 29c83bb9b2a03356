"""A policy that keeps the first language alone, so that draws by score see no rows of the language being learnt."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies import Offer
from rehearsal_plugin.buffer.slot_index import SlotIndex

__all__ = ["FIRST_LANGUAGE", "first_language"]

FIRST_LANGUAGE = "first_language"
"""What the config calls it."""


def first_language(index: SlotIndex, offer: Offer, rng: np.random.Generator) -> np.ndarray:
    """Fill the slots one after the other with rows of the partition that came first, then keep them for good.

    >>> offer = Offer(np.array([0, 1, 0, 0, 0]))
    >>> first_language(SlotIndex(3, partitioned=True), offer, np.random.default_rng(0)).tolist()
    [0, -1, 1, 2, -1]
    """
    slots = np.full(len(offer), -1)
    wanted = np.flatnonzero(offer.owners == 0)[: index.capacity - index.count]
    slots[wanted] = np.arange(index.count, index.count + len(wanted))
    return slots
