"""What a policy is, and where it is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from rehearsal_plugin.occupancy import Occupancy
from rehearsal_plugin.shares import IntArray

__all__ = ["POLICIES", "Policy", "last_writers", "register"]

Policy: TypeAlias = Callable[[Occupancy, IntArray, np.random.Generator], IntArray]
"""`policy(occupancy, owners, rng) -> slots`.

`owners` `[n]` int64 are the partition numbers of the offered rows, in the order of the stream. The result
`[n]` int64 is the slot of each row, -1 where it is not kept; no slot twice; new slots are taken in order from
`occupancy.count`. A policy changes nothing: the buffer records the outcome.
"""

POLICIES: dict[str, Policy] = {}


def register(policy: Policy) -> Policy:
    """Make a policy available by its function's name as `rehearsal.buffer.policy`."""
    POLICIES[policy.__name__] = policy
    return policy


def last_writers(slots: IntArray) -> IntArray:
    """Where several rows go to one slot, keep the last, as if they had been written one by one."""
    kept = np.flatnonzero(slots >= 0)[::-1]
    _, first = np.unique(slots[kept], return_index=True)
    result = np.full_like(slots, -1)
    result[kept[first]] = slots[kept[first]]
    return result
