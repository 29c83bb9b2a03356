"""The newest rows stay."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, last_writers, register
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["fifo"]


@register("fifo", newest=True)
def fifo(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Each row takes the place of the oldest one: the slots are a ring, and row i goes to slot i % capacity."""
    return last_writers((slot_index.offered + np.arange(len(offer))) % slot_index.capacity)
