"""DeepSpeed engines with a rehearsal buffer."""

from __future__ import annotations

from rehearsal_plugin.integrations.deepspeed.engine import attach, connect, initialize, left_alone, patch

__all__ = ["attach", "connect", "initialize", "left_alone", "patch"]
