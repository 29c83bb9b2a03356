"""Fields of a row: where they lie, what may fill them, and copies to and from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import (
    ALIGNMENT,
    Field,
    as_array,
    bytes_of,
    lay_out,
    named_fields,
    pick_rows,
    put,
)
from rehearsal_plugin.errors import BatchError

DTYPES = [torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn]
FIELD = Field("x", torch.float32, (2,), 16, 8)


def test_fields_begin_at_multiples_of_the_alignment() -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.zeros(3, 9)}
    fields, end = lay_out(tensors, offset=32)
    assert [field.offset for field in fields] == [32, 48, 64]
    assert [field.nbytes for field in fields] == [5, 4, 36]
    assert end == 64 + 3 * ALIGNMENT


def test_another_number_of_rows_is_told_as_that() -> None:
    assert FIELD.check(torch.zeros(5, 2), 5).shape == (5, 2)
    with pytest.raises(BatchError, match="'x' has 8 rows, and the fields before it have 5; every field needs one row"):
        FIELD.check(torch.zeros(8, 2), 5)
    with pytest.raises(BatchError, match=r"'x' must have shape \(5, 2\), as in the first batch"):
        FIELD.check(torch.zeros(5, 4), 5)


def test_a_field_of_no_numbers_takes_no_room() -> None:
    (field,), end = lay_out({"a": torch.zeros(3, 0)}, offset=16)
    assert (field.nbytes, end) == (0, 16)
    assert field.view(torch.zeros((4, 16), dtype=torch.uint8)).shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_has_what_was_put(dtype: torch.dtype) -> None:
    column = torch.arange(6).reshape(3, 2).to(dtype)
    (field,), end = lay_out({"a": column}, offset=0)
    rows = torch.zeros((5, end), dtype=torch.uint8)
    put(rows.numpy(), np.array([4, 0, 2]), [field], [column])
    assert bytes_of(field.view(rows)[[4, 0, 2]]).equal(bytes_of(column))
    assert not rows[[1, 3]].any()


@pytest.mark.parametrize("rows", [0, 1])
def test_a_view_of_a_row_at_most_can_be_viewed_as_bytes(rows: int) -> None:
    """It is contiguous, and torch asks for the strides of a contiguous tensor too."""
    (field,), end = lay_out({"a": torch.zeros(3, dtype=torch.int16)}, offset=0)
    numbers = field.view(torch.zeros((rows, end), dtype=torch.uint8))
    assert numbers.contiguous().view(torch.uint8).shape == (2 * rows,)


def test_a_view_writes_through() -> None:
    rows = torch.zeros((2, 32), dtype=torch.uint8)
    FIELD.view(rows)[1] = torch.tensor([1.5, -2.0])
    assert rows[1, 16:24].view(torch.float32).tolist() == [1.5, -2.0]


def test_some_samples_of_a_column_are_put() -> None:
    rows = np.zeros((3, 32), dtype=np.uint8)
    column = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    put(rows, np.array([0, 2]), [FIELD], [column], places=np.array([2, 0]))
    assert FIELD.view(torch.from_numpy(rows))[:, 0].tolist() == [3, 0, 1]


def test_a_slot_that_there_is_not_is_refused() -> None:
    with pytest.raises(IndexError):
        put(np.zeros((3, 32), dtype=np.uint8), np.array([3]), [FIELD], [torch.zeros(1, 2)])


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (None, "missing"),
        ([1.0], "list"),
        (torch.zeros(3, 2, dtype=torch.float64), "float64"),
        (torch.zeros(3, 4), r"shape \(3, 2\)"),
        (torch.zeros(4, 2), "has 4 rows, and the fields before it have 3"),
        (torch.zeros(3, 2).to_sparse(), "sparse"),
    ],
    ids=["missing", "a list", "another dtype", "another shape", "another batch size", "sparse"],
)
def test_a_tensor_that_cannot_fill_a_field_is_refused_with_the_reason(tensor: object, reason: str) -> None:
    with pytest.raises(BatchError, match=rf"'x'.*{reason}"):
        FIELD.check(tensor, 3)


def test_fields_are_found_by_the_names_of_their_values() -> None:
    other = Field("y", torch.int64, (), 32, 8)
    assert named_fields((FIELD, other), {"y": torch.tensor([1, 2])}, 2) == {"y": other}


def test_a_value_without_a_field_is_refused_with_the_fields_there_are() -> None:
    with pytest.raises(BatchError, match=r"'z'.*\['x'\]"):
        named_fields((FIELD,), {"z": torch.zeros(1)}, 1)


def test_a_value_that_does_not_fit_its_field_is_refused() -> None:
    with pytest.raises(BatchError, match="'x'"):
        named_fields((FIELD,), {"x": torch.zeros(1, 2)}, 2)


def test_all_rows_are_picked_without_a_copy() -> None:
    rows = torch.arange(8, dtype=torch.uint8).view(4, 2)
    assert pick_rows(rows, None) is rows
    assert pick_rows(rows, np.array([3, 0])).tolist() == [[6, 7], [0, 1]]


@pytest.mark.parametrize(
    ("dtype", "numpy"), [(torch.float32, np.float32), (torch.bool, np.bool_), (torch.int64, np.int64)]
)
def test_a_dtype_that_numpy_has_is_named(dtype: torch.dtype, numpy: type) -> None:
    assert Field("x", dtype, (), 0, dtype.itemsize).numpy_dtype == numpy


def test_bfloat16_has_no_numpy_dtype() -> None:
    assert Field("x", torch.bfloat16, (), 0, 2).numpy_dtype is None


def test_a_contiguous_tensor_becomes_an_array_without_a_copy() -> None:
    column = torch.arange(6).reshape(3, 2)
    assert as_array(column).ctypes.data == column.data_ptr()


COLUMNS: dict[str, Tensor] = {
    "bfloat16": torch.ones(3, 2, dtype=torch.bfloat16),
    "with a history": torch.ones(3, 2, requires_grad=True),
    "a lazy conjugate": torch.ones(3, 2, dtype=torch.complex64).conj(),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_any_tensor_becomes_an_array_of_its_bytes(name: str) -> None:
    column, array = COLUMNS[name], as_array(COLUMNS[name])
    expected = column.detach().resolve_conj().contiguous().flatten(1).view(torch.uint8)
    assert array.flags.c_contiguous
    assert array.reshape(3, -1).view(np.uint8).tolist() == expected.tolist()
