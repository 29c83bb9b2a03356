"""Who stays in a full buffer: one pure function a file, behind one registry."""

from __future__ import annotations

from rehearsal_plugin.policies.balanced import balanced
from rehearsal_plugin.policies.base import POLICIES, Policy, register
from rehearsal_plugin.policies.fifo import fifo
from rehearsal_plugin.policies.random_replace import random_replace
from rehearsal_plugin.policies.reservoir import reservoir

__all__ = ["POLICIES", "Policy", "balanced", "fifo", "random_replace", "register", "reservoir"]
