"""A buffer of row numbers, to see which rows of a stream a policy keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from rehearsal_plugin.buffer.policies import POLICIES, Offer
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
KEYS = st.sampled_from([0, 1, 2, 3, -1, -(2**63)])
STREAMS = st.lists(st.lists(KEYS, max_size=15), max_size=10)
Batches = Sequence[Sequence[int]]

BATCHINGS = {
    "one by one": [1] * 6,
    "one batch larger than the buffer": [6],
    "uneven": [2, 0, 3, 1],
    "within, then larger than the buffer": [1, 5],
    "larger than the buffer, then one by one": [4, 1, 1],
}
"""Sizes of batches in which six rows are offered."""


class Simulation:
    """A buffer that stores the number of each row in the stream, and remembers every decision in plain dicts."""

    def __init__(self, policy: str, capacity: int, seed: int = 0, partitioned: bool = True, width: int = 1) -> None:
        self.slot_index = SlotIndex(capacity, partitioned, width)
        self.rows: dict[int, int] = {}
        self.stream: list[int] = []
        self._policy, self._rng = POLICIES[policy], np.random.default_rng(seed)

    def offer(self, keys: Sequence[int], scores: ArrayLike | None = None) -> IntArray:
        """Offer rows by their keys, with scores; without them, with those of a fixed sequence."""
        wide, partitions = np.array(keys, dtype=np.int64), self.slot_index.partitions
        owners = np.zeros(len(keys), dtype=np.int64) if partitions is None else partitions.number(wide)
        listed = np.sin(np.arange(len(keys)) + len(self.stream)) if scores is None else np.array(scores)
        wide_scores = listed.reshape(len(keys), -1 if len(keys) else 1).astype(np.float32)
        slots = self._policy(self.slot_index, Offer(owners, wide_scores), self._rng)
        self.slot_index.record(slots, owners, wide_scores)
        first = len(self.stream)
        self.rows.update({slot: first + i for i, slot in enumerate(slots.tolist()) if slot >= 0})
        self.stream.extend(keys)
        return slots

    def run(self, batches: Batches) -> Simulation:
        for keys in batches:
            self.offer(keys)
        return self

    def kept(self, key: int | None = None) -> frozenset[int]:
        return frozenset(row for row in self.rows.values() if key is None or self.stream[row] == key)

    def sizes(self) -> dict[int, int]:
        return dict(Counter(self.stream[row] for row in self.rows.values()))


def outcomes(policy: str, capacity: int, batches: Batches, trials: int) -> list[Simulation]:
    """Independent runs."""
    return [Simulation(policy, capacity, seed).run(batches) for seed in range(trials)]
