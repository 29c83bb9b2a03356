"""Rows from columns of token ids: lists of any length are joined, all columns alike, and cut into rows of one length.

Padding, where an `attention_mask` is 0, is left out first. As in `group_texts` of Hugging Face's `run_clm.py`, nothing
is put between the lists: whoever tokenised the documents has put the token there that ends one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.checkpoint.convert.arrow_files import ROWS_AT_ONCE, read_arrow_batches
from rehearsal_plugin.checkpoint.convert.columns import read_columns
from rehearsal_plugin.checkpoint.convert.megatron import read_megatron_tokens
from rehearsal_plugin.checkpoint.convert.packing import cut_rows, joined_arrays
from rehearsal_plugin.checkpoint.convert.records import RECORD_FORMS, read_records
from rehearsal_plugin.checkpoint.convert.sources import Source, find_sources, name_unreadable
from rehearsal_plugin.checkpoint.convert.tokens import token_rows
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import DataError

__all__ = ["read_packed_tokens"]

FORMS = {"safetensors", "npz", "megatron", *RECORD_FORMS}
ASIDES = {"json"}
MADE = {"attention_mask", "labels"}
"""Fields that are made for `input_ids` where the data has none."""

Lists: TypeAlias = tuple[IntArray, IntArray]
"""The length of each list, and all of them joined."""


def read_packed_tokens(
    paths: Sequence[Path],
    length: int,
    fields: Collection[str] | None = None,
    cast: Mapping[str, torch.dtype] | None = None,
    split: str | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Read lists of token ids as rows of `length` tokens.

    Rows with `input_ids` get an `attention_mask` of ones, and `labels` that are the ids, where the data has none.

    Args:
        paths: Files or folders in one of the forms `FORMS`; columns that are no lists of integers are left out.
        length: Tokens of a row; the rest at the end is dropped.
        fields: Names of the columns; None takes all.
        cast: New dtypes of fields, by name; int64 otherwise.
        split: Split to take from data sets that have several.

    Raises:
        DataError: A file cannot be read, has no such columns, or the lists of a row differ in length.
        MissingDependencyError: A library that reads the file is not installed.
    """
    sources = find_sources(paths, FORMS, split, ASIDES)
    names: list[str] = []  # those of the first rows

    def streams() -> Iterator[dict[str, IntArray]]:
        for source in sources:
            with name_unreadable(source.path):
                for batch in _read_lists(source, fields):
                    names.extend([] if names else batch)
                    yield _joined_lists(source.path, batch, names)

    for rows in cut_rows(streams(), length):
        made = token_rows(rows["input_ids"], None) if "input_ids" in rows else {}
        tensors = made | {name: torch.from_numpy(array) for name, array in rows.items()}
        yield {name: tensor.to((cast or {}).get(name, tensor.dtype)) for name, tensor in tensors.items()}


def _joined_lists(path: Path, batch: Mapping[str, Lists], names: Sequence[str]) -> dict[str, IntArray]:
    """The columns in `names`, after a check that they have as many entries in each row."""
    if missing := sorted(set(names) - set(batch)):
        raise DataError(
            f"{path} has no lists of integers in {missing}, as the rows before it have; choose with --fields"
        )
    mask = batch.get("attention_mask")
    for name in (*names, *(["attention_mask"] if mask else [])):
        if not np.array_equal(batch[name][0], batch[names[0]][0]):
            raise DataError(
                f"'{name}' of {path} has rows of another length than '{names[0]}'; choose columns with --fields"
            )
    if mask is None or mask[1].all():
        return {name: batch[name][1] for name in names}
    return {name: batch[name][1][mask[1] != 0] for name in names}


def _read_lists(source: Source, fields: Collection[str] | None) -> Iterator[dict[str, Lists]]:
    """The columns in `fields`, and `input_ids` and `attention_mask` where these are needed."""
    wanted = set(fields or ()) | {"attention_mask"} | ({"input_ids"} if MADE & set(fields or ()) else set())
    for columns in _read_integers(source, lambda name: fields is None or name in wanted):
        missing = sorted(set(fields or ()) - set(columns) - (MADE if "input_ids" in columns else set()))
        if missing or not columns:
            raise DataError(
                f"{source.path} has no lists of integers{f' in {missing}' if missing else ''}; it has them in "
                f"{sorted(columns)}; texts need --tokenizer"
            )
        yield columns


def _read_integers(source: Source, is_wanted: Callable[[str], bool]) -> Iterator[dict[str, Lists]]:
    """Columns of lists of integers, some megabytes at a time."""
    if source.form == "megatron":
        for tokens in read_megatron_tokens(source.path):
            yield {"input_ids": (np.array([len(tokens)]), tokens)}
    elif source.form in ("arrow", "parquet"):
        for batch in read_arrow_batches(source.path, None):
            names = [name for name in filter(is_wanted, batch.schema.names) if _holds_integers(batch.column(name).type)]
            yield {name: _arrow_lists(source.path, name, batch.column(name)) for name in names}
    elif source.form in RECORD_FORMS:
        records = read_records(source)
        while group := list(islice(records, ROWS_AT_ONCE)):
            names = [name for name in filter(is_wanted, group[0]) if _is_list(group[0][name])]
            yield {name: _record_lists(source.path, name, group) for name in names}
    else:
        for tensors in read_columns(source, None):
            yield {
                name: (np.full(len(rows), rows.shape[1]), rows.numpy().astype(np.int64).ravel())
                for name, rows in tensors.items()
                if is_wanted(name) and rows.ndim == 2 and not rows.is_floating_point() and rows.dtype != torch.bool
            }


def _holds_integers(kind: Any) -> bool:
    """Whether a type of Arrow is one of lists of integers."""
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


def _arrow_lists(path: Path, name: str, array: Any) -> Lists:
    import pyarrow.compute as pc

    values = array.flatten()
    if array.null_count or values.null_count:
        raise DataError(f"column '{name}' of {path} has nulls in it; fill or drop them")
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    return lengths, values.to_numpy(zero_copy_only=False).astype(np.int64)


def _is_list(value: object) -> bool:
    """Whether a value is a list of integers; an empty one may be."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _record_lists(path: Path, name: str, group: Sequence[Mapping[str, Any]]) -> Lists:
    values = [record.get(name) for record in group]
    if not all(map(_is_list, values)):
        odd = next(value for value in values if not _is_list(value))
        raise DataError(
            f"'{name}' of {path} holds a {type(odd).__name__} where a list of integers should be; choose with --fields"
        )
    return np.array([len(value) for value in values]), joined_arrays(values)  # type: ignore[arg-type]
