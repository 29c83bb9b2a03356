"""Injection of replayed rows into batches, at the model's forward or at its data loader."""

from __future__ import annotations
