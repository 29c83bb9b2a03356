"""Rows from columns of numbers: named tensors of one length, each a field."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rehearsal_plugin.checkpoint.convert.arrow_files import ROWS_AT_ONCE, read_arrow_batches
from rehearsal_plugin.checkpoint.convert.records import RECORD_FORMS, read_records
from rehearsal_plugin.checkpoint.convert.sources import Source, find_sources, name_unreadable
from rehearsal_plugin.errors import DataError

__all__ = ["columns", "read_columns"]

Batch: TypeAlias = dict[str, Tensor]

BYTES_AT_ONCE = 16 << 20
JOIN = "bring them to one length, or give --length to join rows of tokens and cut them"
TEXT = "text needs --tokenizer and --length; or leave it out with --fields"
EXPORTED = {"rehearsal.step", "rehearsal.rank"}
"""Columns that `rehearsal export` adds to the fields."""


def columns(
    paths: Sequence[Path],
    fields: Collection[str] | None = None,
    cast: Mapping[str, torch.dtype] | None = None,
    split: str | None = None,
) -> Iterator[Batch]:
    """Read the rows of data sets, in batches of some megabytes.

    Args:
        paths: Files or folders in one of the forms `COLUMN_FORMS`. Values of Arrow, JSON, MDS and WebDataset are
            numbers, or lists of one length for all rows.
        fields: Names of the columns; None takes all.
        cast: New dtypes of fields, by name.
        split: Split to take from data sets that have several.

    Raises:
        DataError: A file cannot be read, or its columns cannot be fields.
        MissingDependencyError: A library that reads the file is not installed.
    """
    for source in find_sources(paths, COLUMN_FORMS, split, ASIDES):
        with name_unreadable(source.path):
            for batch in read_columns(source, fields):
                yield {name: tensor.to((cast or {}).get(name, tensor.dtype)) for name, tensor in batch.items()}


def read_columns(source: Source, fields: Collection[str] | None) -> Iterator[Batch]:
    """Read the rows of one data set, as `columns`."""
    if source.form == "megatron":
        raise DataError(f"{source.path} lists sequences of different length; give --length to join and cut them")
    if source.form in ARRAY_READERS:
        yield from ARRAY_READERS[source.form](source.path, fields)
    else:
        yield from _read_records(source, fields)


def _read_safetensors(path: Path, fields: Collection[str] | None) -> Iterator[Batch]:
    try:
        with safe_open(path, framework="pt") as file:
            names = _chosen_names(path, list(file.keys()), fields)
            slices = {name: file.get_slice(name) for name in names}
            yield from _slice_batches(
                path, {name: list(slices[name].get_shape()) for name in names}, slices.__getitem__
            )
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_npz(path: Path, fields: Collection[str] | None) -> Iterator[Batch]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in _chosen_names(path, file.files, fields)}
    yield from _slice_batches(path, {name: list(array.shape) for name, array in arrays.items()}, arrays.__getitem__)


def _read_arrow(path: Path, fields: Collection[str] | None) -> Iterator[Batch]:
    for batch in read_arrow_batches(path, fields):
        names = _chosen_names(path, batch.schema.names, fields)
        yield {name: _column_tensor(path, name, batch.column(name)) for name in names}


ARRAY_READERS: dict[str, Callable[[Path, Collection[str] | None], Iterator[Batch]]] = {
    "safetensors": _read_safetensors,
    "npz": _read_npz,
    "arrow": _read_arrow,
    "parquet": _read_arrow,
}
COLUMN_FORMS = {*ARRAY_READERS, *RECORD_FORMS, "megatron"}
ASIDES = {"json", "lines", "tar", "megatron"}
"""Forms that lie beside columns, as descriptions or copies of the data."""


def _read_records(source: Source, fields: Collection[str] | None) -> Iterator[Batch]:
    records, first = read_records(source, fields), 1
    names: list[str] = []
    while group := list(islice(records, ROWS_AT_ONCE)):
        names = names or _chosen_names(source.path, list(group[0]), fields)
        yield {name: _record_tensor(source.path, name, group, first) for name in names}
        first += len(group)


def _record_tensor(path: Path, name: str, group: Sequence[Mapping[str, Any]], first: int) -> Tensor:
    """One value of each row as a tensor `[n, ...]`."""
    for number, record in enumerate(group, first):
        if record.get(name) is None:
            raise DataError(f"row {number} of {path} has no '{name}', as the first one has; fill it or drop the row")
    values = [record[name] for record in group]
    shapes = {np.shape(value) for value in values} if not isinstance(values[0], str) else set()
    if len(shapes) > 1:
        raise DataError(f"'{name}' of {path} has rows of shapes {sorted(shapes)[:5]}; {JOIN}")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(f"'{name}' of {path} holds {type(values[0]).__name__}, and fields are numbers; {TEXT}")
    return torch.from_numpy(array)


def _chosen_names(path: Path, available: Sequence[str], fields: Collection[str] | None) -> list[str]:
    missing = sorted(set(fields or ()) - set(available))
    if missing:
        raise DataError(f"{path} has no columns {missing}; it has {sorted(available)}")
    names = [name for name in available if (name in fields if fields is not None else name not in EXPORTED)]
    if not names:
        raise DataError(f"{path} has no columns")
    return names


def _slice_batches(path: Path, shapes: Mapping[str, list[int]], column: Callable[[str], Any]) -> Iterator[Batch]:
    """Batches of some megabytes, sliced out of columns."""
    lengths = {name: shape[0] if shape else None for name, shape in shapes.items()}
    (length, *others) = set(lengths.values())
    if others or length is None:
        raise DataError(f"the columns of {path} have not one length but {lengths}; name those that make up a row")
    row = sum(int(np.prod(shape[1:])) for shape in shapes.values()) * 8
    count = max(1, BYTES_AT_ONCE // max(1, row))
    for start in range(0, length, count):
        yield {name: column(name)[start : start + count] for name in shapes}


def _column_tensor(path: Path, name: str, array: Any) -> Tensor:
    """An Arrow column as a tensor `[n, ...]`, with one more dimension for every level of lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if array.null_count:
        raise DataError(f"column '{name}' of {path} has {array.null_count} nulls in it; fill or drop them")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        widths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(widths) > 1:
            raise DataError(f"column '{name}' of {path} has rows of {min(widths)} to {max(widths)} entries; {JOIN}")
        inner = _column_tensor(path, name, array.flatten())
        return inner.reshape(len(array), *(widths or [0]), *inner.shape[1:])
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"column '{name}' of {path} holds {kind}, and fields are numbers; {TEXT}")
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
