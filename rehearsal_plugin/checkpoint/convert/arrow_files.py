"""Record batches of Arrow and Parquet files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.errors import DataError

__all__ = ["read_arrow_batches"]

ROWS_AT_ONCE = 1024


def read_arrow_batches(path: Path, names: Collection[str] | None) -> Iterator[Any]:
    """The record batches of an Arrow or Parquet file, with the columns in `names` or all.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataError: A column is missing.
    """
    pa = optional_import("pyarrow", extra="arrow", needed_by=str(path))
    if path.suffix == ".parquet":
        file = optional_import("pyarrow.parquet", extra="arrow", needed_by=str(path)).ParquetFile(path)
        chosen_names = _chosen_names(path, file.schema_arrow.names, names)
        yield from file.iter_batches(ROWS_AT_ONCE, columns=chosen_names)
        return
    with pa.memory_map(str(path)) as source:
        for batch in _read_ipc(pa, source):
            chosen = batch.select(_chosen_names(path, batch.schema.names, names))
            for start in range(0, len(chosen), ROWS_AT_ONCE):
                yield chosen.slice(start, ROWS_AT_ONCE)


def _read_ipc(pa: Any, source: Any) -> Iterator[Any]:
    """Record batches of an Arrow file in either form; data sets of Hugging Face are streams."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


def _chosen_names(path: Path, available: Sequence[str], names: Collection[str] | None) -> list[str]:
    missing = sorted(set(names or ()) - set(available))
    if missing:
        raise DataError(f"{path} has no columns {missing}; it has {sorted(available)}")
    return [name for name in available if names is None or name in names]
