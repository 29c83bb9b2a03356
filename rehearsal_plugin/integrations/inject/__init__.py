"""Where replayed rows join a batch: at the model's forward, or at its data loader."""

from __future__ import annotations
