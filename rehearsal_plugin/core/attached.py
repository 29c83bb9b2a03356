"""A mark in a folder of `rehearsal_plugin.run`, by which it learns that a process of its job has a rehearsal."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["FOLDER", "note_attached"]

FOLDER = "REHEARSAL_PLUGIN_ATTACHED"
"""Environment variable with the folder; child processes inherit it."""


def note_attached() -> None:
    """Leave the mark of this process; without `rehearsal_plugin.run` it does nothing."""
    folder = os.environ.get(FOLDER)
    if folder:
        with suppress(OSError):  # of an earlier run, and gone
            Path(folder, str(os.getpid())).touch()
