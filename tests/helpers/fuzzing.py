"""Number of inputs that the tests of malformed input try; `REHEARSAL_FUZZ_FACTOR` multiplies it."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

__all__ = ["FEW", "PROPERTY"]

FACTOR = int(os.environ.get("REHEARSAL_FUZZ_FACTOR", "1"))

PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=120 * FACTOR, suppress_health_check=list(HealthCheck), database=None
)
"""For what takes a millisecond."""

FEW = settings(PROPERTY, max_examples=8 * FACTOR)
"""For what runs a job."""
