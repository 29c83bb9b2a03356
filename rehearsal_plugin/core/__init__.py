"""Foundations that every other part uses: arrays, random numbers, fair shares, trees, a thread, counters."""

from __future__ import annotations
