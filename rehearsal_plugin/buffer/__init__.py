"""The rows of one rank: storage, replacement policies and look-up."""

from __future__ import annotations

from rehearsal_plugin.buffer.buffer import RehearsalBuffer

__all__ = ["RehearsalBuffer"]
