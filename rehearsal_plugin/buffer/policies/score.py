"""A reservoir that lets the well-learnt rows go first."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, register
from rehearsal_plugin.buffer.policies.reservoir import thinned
from rehearsal_plugin.buffer.scores import Scores
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import below

__all__ = ["score"]

ROUNDS, PROPOSALS = 3, 4
"""How often slots are proposed, and how many for each that shall leave."""


@register("score", judges="score")
def score(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Rows come in as into a reservoir; the chance to be replaced falls in a line with the score.

    Loss-aware reservoir sampling (Buzzega et al., "Rethinking experience replay: a bag of tricks", ICPR 2020):
    with the loss as the score, rows that the model knows make room. The row with the highest score stays as long
    as any other can go.
    """
    slots = thinned(slot_index.seen, slot_index.count, len(offer), slot_index.capacity, rng)
    placed = slots >= 0
    replacing = (placed if slot_index.count == slot_index.capacity else placed & (slots < slot_index.count)).nonzero()[
        0
    ]
    if len(replacing):
        assert slot_index.values is not None  # the config asks for a score
        slots[replacing] = _leaving(slot_index.values, slot_index.count, len(replacing), rng)
    return slots


def _leaving(values: Scores, stored: int, count: int, rng: np.random.Generator) -> IntArray:
    """`count` of `stored` slots, one after the other with chances in proportion to their distance from the highest.

    Slots are proposed at random and accepted with these chances; one that comes again is passed over, so that they
    leave as if drawn one by one. Where few are accepted, the rest are those whose exponential clocks ring first
    (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006), which looks at all rows.
    """
    scores, (lowest, highest) = values.stored[:stored, 0], values.extremes(stored)
    found: dict[int, None] = {}  # each once, in the order of their acceptance
    for _ in range(ROUNDS):
        proposed = below(len(scores), PROPOSALS * count, rng)
        accepted = proposed[rng.random(len(proposed)) * (highest - lowest) < highest - scores[proposed]]
        found.update(dict.fromkeys(accepted.tolist()))
        if len(found) >= count:
            return np.fromiter(found, np.int64, count)
    leaving = np.fromiter(found, np.int64, len(found))
    chances = highest - scores.astype(np.float64)
    clocks = rng.exponential(size=len(scores)) / np.maximum(chances, np.finfo(np.float64).tiny ** 0.5)
    clocks[leaving] = np.inf
    rest = count - len(leaving)
    return np.concatenate((leaving, np.argpartition(clocks, rest - 1)[:rest]))
