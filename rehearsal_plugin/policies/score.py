"""A reservoir that lets the well-learnt rows go first."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.occupancy import Occupancy
from rehearsal_plugin.policies.base import Offer, register
from rehearsal_plugin.policies.reservoir import thinned
from rehearsal_plugin.shares import IntArray
from rehearsal_plugin.values import FloatArray

__all__ = ["score"]


@register
def score(occupancy: Occupancy, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Rows come in as into a reservoir; the chance to be replaced falls in a line with the score.

    Loss-aware reservoir sampling (Buzzega et al., "Rethinking experience replay: a bag of tricks", ICPR 2020):
    with the loss as the score, rows that the model knows make room. The row with the highest score stays as long
    as any other can go. A step that replaces rows takes time in proportion to the rows stored.
    """
    slots = thinned(occupancy.seen, occupancy.count, len(offer), occupancy.capacity, rng)
    replacing = (slots >= 0) & (slots < occupancy.count)
    if replacing.any():
        assert occupancy.values is not None  # the config asks for a score
        scores = occupancy.values.stored[: occupancy.count, 0]
        slots[replacing] = _leaving(scores, int(np.count_nonzero(replacing)), rng)
    return slots


def _leaving(scores: FloatArray, count: int, rng: np.random.Generator) -> IntArray:
    """`count` slots, one after the other with chances in proportion to their distance from the highest score.

    Those whose exponential clocks ring first (Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", 2006).
    """
    chances = scores.max() - scores.astype(np.float64)
    clocks = rng.exponential(size=len(scores)) / np.maximum(chances, np.finfo(np.float64).tiny ** 0.5)
    return np.argpartition(clocks, count - 1)[:count]
