"""Horovod optimizers with a rehearsal buffer."""

from __future__ import annotations

from rehearsal_plugin.integrations.horovod.handle import HorovodHandle
from rehearsal_plugin.integrations.horovod.optimizer import attach, patch

__all__ = ["HorovodHandle", "attach", "patch"]
