"""A reservoir in which rows of low scores are replaced first."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.policies.base import Offer, register
from rehearsal_plugin.buffer.policies.reservoir import thinned_places
from rehearsal_plugin.buffer.scores import Scores
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import integers_below

__all__ = ["score"]

ROUNDS, PROPOSALS = 3, 4
"""Rounds of proposals, and slots proposed in each for every one that leaves."""


@register("score", judges="score")
def score(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
    """Rows come in as into a reservoir; the chance to be replaced falls in a line with the score.

    Loss-aware reservoir sampling (Buzzega et al., "Rethinking experience replay: a bag of tricks", ICPR 2020):
    with the loss as the score, rows that the model knows make room. The row with the highest score stays as long
    as any other can go.
    """
    slots = thinned_places(slot_index.offered, slot_index.count, len(offer), slot_index.capacity, rng)
    placed = slots >= 0
    if slot_index.count < slot_index.capacity:
        placed &= slots < slot_index.count  # the others get slots that nobody has
    replacing = placed.nonzero()[0]
    if len(replacing):
        assert slot_index.scores is not None  # the config asks for a score
        slots[replacing] = _leaving_slots(slot_index.scores, slot_index.count, len(replacing), rng)
    return slots


def _leaving_slots(scores: Scores, stored: int, count: int, rng: np.random.Generator) -> IntArray:
    """`count` of `stored` slots, one after the other with chances in proportion to their distance from the highest.

    Rejection sampling: slots are proposed at random and accepted with these chances; one that comes again is passed
    over, so that they leave as if drawn one by one. With the scores 1, 3, 4 the distances are 3, 1, 0: the first slot
    leaves three times as often as the second, the third never.

    Where few are accepted, the rest are the slots whose exponential clocks ring first (Efraimidis and Spirakis,
    "Weighted random sampling with a reservoir", 2006), which looks at all rows.
    """
    levels, (lowest, highest) = scores.stored[:stored, 0], scores.extremes(stored)
    accepted: dict[int, None] = {}  # each once, in the order of their acceptance
    for _ in range(ROUNDS):
        proposed = integers_below(stored, PROPOSALS * count, rng)
        passed = proposed[rng.random(len(proposed)) * (highest - lowest) < highest - levels[proposed]]
        accepted.update(dict.fromkeys(passed.tolist()))
        if len(accepted) >= count:
            return np.fromiter(accepted, np.int64, count)
    leaving = np.fromiter(accepted, np.int64, len(accepted))
    distances = highest - levels.astype(np.float64)
    clocks = rng.exponential(size=stored) / np.maximum(distances, np.finfo(np.float64).tiny ** 0.5)
    clocks[leaving] = np.inf
    rest = count - len(leaving)
    return np.concatenate((leaving, np.argpartition(clocks, rest - 1)[:rest]))
