"""One rank's rows: where they lie, who stays, and how they are found."""

from __future__ import annotations

from rehearsal_plugin.buffer.buffer import RehearsalBuffer

__all__ = ["RehearsalBuffer"]
