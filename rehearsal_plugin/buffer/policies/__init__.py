"""Who stays in a full buffer: one pure function a file, behind one registry."""

from __future__ import annotations

# In the order in which the schema lists them.
# isort: off
from rehearsal_plugin.buffer.policies.base import POLICIES, Offer, Policy, register
from rehearsal_plugin.buffer.policies.reservoir import reservoir
from rehearsal_plugin.buffer.policies.balanced import balanced
from rehearsal_plugin.buffer.policies.random_replace import random_replace
from rehearsal_plugin.buffer.policies.fifo import fifo
from rehearsal_plugin.buffer.policies.score import score
from rehearsal_plugin.buffer.policies.exemplars import closest_to_centre, herding
# isort: on

__all__ = [
    "POLICIES",
    "Offer",
    "Policy",
    "balanced",
    "closest_to_centre",
    "fifo",
    "herding",
    "random_replace",
    "register",
    "reservoir",
    "score",
]
