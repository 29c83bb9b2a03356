"""What every wing stands on: arrays, random numbers, fair shares, trees, a thread, counters."""

from __future__ import annotations
