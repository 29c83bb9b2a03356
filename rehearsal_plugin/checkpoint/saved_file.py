"""A file of a checkpoint in its folder, and the errors that its content causes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from rehearsal_plugin.checkpoint.format import RankFile, read_header
from rehearsal_plugin.checkpoint.reshard import FileRows
from rehearsal_plugin.errors import CheckpointError

__all__ = ["SavedFile", "report_contradictions", "rows_in_file"]

SavedFile: TypeAlias = tuple[Path, RankFile]
"""A folder and one rank's file in it."""


@contextmanager
def report_contradictions(path: Path) -> Iterator[None]:
    """Turn any error that the content of a file causes into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} contradicts itself: {error!r}; give another checkpoint") from error


def rows_in_file(folder: Path, rank_file: RankFile) -> FileRows:
    """The rows in a file, by its header.

    Raises:
        CheckpointError: It cannot be read.
    """
    meta = read_header(folder, rank_file)
    count = meta.get("count")
    if type(count) is not int or count < 0:
        raise CheckpointError(f"{folder / rank_file.name} says that it has {count!r} rows; give another checkpoint")
    return FileRows(count, meta.get("layout") is not None)
