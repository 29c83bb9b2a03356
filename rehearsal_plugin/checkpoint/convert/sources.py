"""The files that data comes in: found by their endings, and problems with them told by their names."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.errors import DataError

__all__ = ["arrow_batches", "files_of", "readable"]

ROWS_AT_ONCE = 1024


def files_of(paths: Sequence[Path], endings: Collection[str]) -> list[Path]:
    """The files at `paths`; of a folder all with one of the endings, by name.

    Raises:
        DataError: There is none, or one has another ending.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.rglob("*") if file.suffix in endings) if path.is_dir() else [path]
        if not inside or (inside == [path] and path.suffix not in endings):
            raise DataError(f"{path} is no file that ends in {', '.join(sorted(endings))}, and no folder of such files")
        found += inside
    return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a file that cannot be read leads to into an error that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def arrow_batches(path: Path, names: Collection[str] | None) -> Iterator[Any]:
    """The record batches of a file of Arrow or Parquet, of some columns or all.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataError: There is no such column.
    """
    pa = optional_import("pyarrow", extra="arrow", needed_by=str(path))
    if path.suffix == ".parquet":
        file = optional_import("pyarrow.parquet", extra="arrow", needed_by=str(path)).ParquetFile(path)
        wanted = _chosen(path, file.schema_arrow.names, names)
        yield from file.iter_batches(ROWS_AT_ONCE, columns=wanted)
        return
    with pa.memory_map(str(path)) as source:
        for batch in _of_ipc(pa, source):
            chosen = batch.select(_chosen(path, batch.schema.names, names))
            for start in range(0, len(chosen), ROWS_AT_ONCE):
                yield chosen.slice(start, ROWS_AT_ONCE)


def _of_ipc(pa: Any, source: Any) -> Iterator[Any]:
    """Arrow files come in two forms; data sets of Hugging Face are streams."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


def _chosen(path: Path, there: Sequence[str], names: Collection[str] | None) -> list[str]:
    missing = sorted(set(names or ()) - set(there))
    if missing:
        raise DataError(f"{path} has no columns {missing}; it has {sorted(there)}")
    return [name for name in there if names is None or name in names]
