"""Folders: the repository, and the training scripts that launchers run in tests."""

from __future__ import annotations

from pathlib import Path

__all__ = ["JOBS", "ROOT"]

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).resolve().parent / "jobs"
