"""Folders as frameworks write them: which of a job's checkpoints is the newest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rehearsal_plugin.checkpoint.format import list_files

__all__ = ["checkpoint_folder"]

OF_A_TRAINER = re.compile(r"checkpoint-(\d{1,18})")


def checkpoint_folder(folder: Path) -> Path:
    """The folder with rehearsal files that a folder stands for: itself, or the newest checkpoint in it.

    Args:
        folder: A checkpoint; DeepSpeed's `save_dir`, whose `latest` names a tag; or the `output_dir` of a Trainer,
            whose checkpoints are called `checkpoint-<step>`.

    Returns:
        The first of these that has rehearsal files; `folder` where none has any.

    Raises:
        CheckpointError: A folder cannot be read.
    """
    if list_files(folder):
        return folder
    return next((inner for inner in _newest_first(folder) if list_files(inner)), folder)


def _newest_first(folder: Path) -> Iterator[Path]:
    with suppress(OSError, ValueError):  # there is no such file, or it is no text
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        inner = folder / tag
        if tag and inner.parent == folder:  # a name, and no path that leads elsewhere
            yield inner
    with suppress(OSError):
        matches = ((OF_A_TRAINER.fullmatch(entry.name), entry) for entry in folder.iterdir())
        steps = [(int(match[1]), entry) for match, entry in matches if match is not None and entry.is_dir()]
        yield from (entry for _, entry in sorted(steps, reverse=True))
