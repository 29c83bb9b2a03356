"""The Hugging Face Trainer with a rehearsal buffer."""

from __future__ import annotations

from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback, patch

__all__ = ["RehearsalCallback", "patch"]
