"""Rows of data sets of any form as mappings from names to values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from rehearsal_plugin.checkpoint.convert.arrow_files import read_arrow_batches
from rehearsal_plugin.checkpoint.convert.json_records import read_json_lines, read_json_objects
from rehearsal_plugin.checkpoint.convert.mds import read_mds_samples
from rehearsal_plugin.checkpoint.convert.sources import Source, name_unreadable
from rehearsal_plugin.checkpoint.convert.webdataset import read_tar_samples
from rehearsal_plugin.errors import DataError

__all__ = ["RECORD_FORMS", "read_records", "read_values"]


def _read_arrow_records(source: Source, names: Collection[str] | None) -> Iterator[dict[str, Any]]:
    for batch in read_arrow_batches(source.path, names):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Source, Collection[str] | None], Iterator[dict[str, Any]]]] = {
    "arrow": _read_arrow_records,
    "parquet": _read_arrow_records,
    "lines": lambda source, _: read_json_lines(source.path),
    "json": lambda source, _: read_json_objects(source.path),
    "mds": lambda source, names: read_mds_samples(source.path, names),
    "tar": lambda source, _: read_tar_samples(source.path),
}
RECORD_FORMS = frozenset(READERS)


def read_records(source: Source, names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of a data set, at least with the columns in `names`, or all.

    Raises:
        DataError: It cannot be read.
        MissingDependencyError: A library that reads it is not installed.
    """
    with name_unreadable(source.path):
        yield from READERS[source.form](source, names)


def read_values(source: Source, key: str, purpose: str) -> Iterator[tuple[str, Any]]:
    """Read one value of each row, and the place of the row for messages.

    Args:
        source: The data set.
        key: Name of the value.
        purpose: Content of the value, for messages.

    Raises:
        DataError: A row has no such value.
    """
    for number, record in enumerate(read_records(source, [key]), 1):
        if record.get(key) is None:
            names = sorted(name for name, value in record.items() if value is not None)
            raise DataError(
                f"row {number} of {source.path} has no '{key}'; it has {names}; name the key that holds the {purpose}"
            )
        yield f"row {number} of {source.path}", record[key]
