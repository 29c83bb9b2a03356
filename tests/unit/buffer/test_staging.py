"""Byte-row buffers that are used in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.staging import RowPool, Staging

CPU = torch.device("cpu")
ROW_BYTES = 16


def fill(rows: Tensor, value: int) -> Tensor:
    return rows.fill_(value)


def test_rows_taken_have_the_asked_size() -> None:
    pool = RowPool(ROW_BYTES, CPU)
    assert [tuple(pool.take(n).shape) for n in (0, 1, 5, 3, 0)] == [(n, ROW_BYTES) for n in (0, 1, 5, 3, 0)]


def test_rows_taken_last_outlive_the_next_take() -> None:
    pool = RowPool(ROW_BYTES, CPU)
    first = fill(pool.take(4), 1)
    fill(pool.take(8), 2)
    assert (first == 1).all()


def test_memory_is_allocated_once_for_a_steady_size() -> None:
    pool = RowPool(ROW_BYTES, CPU)
    assert len({pool.take(5).data_ptr() for _ in range(20)}) == 2


def test_growing_keeps_the_first_rows() -> None:
    pool = RowPool(ROW_BYTES, CPU)
    fill(pool.take(3), 7)
    assert (pool.grow(100, keep=3)[:3] == 7).all()


def test_growing_row_by_row_allocates_a_few_times_only() -> None:
    pool = RowPool(ROW_BYTES, CPU)
    kept = [pool.grow(n, keep=n - 1) for n in range(1, 1001)]
    assert len({rows.data_ptr() for rows in kept}) <= 11


def test_rows_are_contiguous_as_storages_need_them() -> None:
    assert RowPool(ROW_BYTES, CPU).take(5).is_contiguous()


def test_staged_rows_come_in_the_order_of_staging() -> None:
    staging = Staging(ROW_BYTES, CPU)
    for value, rows in ((1, 2), (2, 0), (3, 5), (4, 1)):
        fill(staging.reserve(rows), value)
    assert staging.flush()[:, 0].tolist() == [1, 1, 3, 3, 3, 3, 3, 4]


def test_staging_starts_anew_after_a_flush() -> None:
    staging = Staging(ROW_BYTES, CPU)
    for value in range(5):
        fill(staging.reserve(3), value)
        assert staging.flush()[:, 0].tolist() == [value] * 3


def test_nothing_staged_is_no_rows() -> None:
    staging = Staging(ROW_BYTES, CPU)
    fill(staging.reserve(3), 1)
    staging.flush()
    assert tuple(staging.flush().shape) == (0, ROW_BYTES)


def test_flushed_rows_stay_while_the_next_ones_are_staged() -> None:
    staging = Staging(ROW_BYTES, CPU)
    fill(staging.reserve(3), 1)
    flushed = staging.flush()
    fill(staging.reserve(50), 2)
    assert (flushed == 1).all()


def test_staged_rows_lie_on_16_byte_boundaries_so_that_every_dtype_can_be_viewed() -> None:
    staging = Staging(ROW_BYTES, CPU)
    staging.reserve(3)
    assert staging.reserve(2).data_ptr() % 16 == 0


def test_rows_that_cannot_be_had_leave_what_is_staged_as_it_was() -> None:
    staging = Staging(16, torch.device("cpu"))
    fill(staging.reserve(2), 7)
    with pytest.raises(MemoryError):
        staging.reserve(1 << 50)
    staging.give_back(len(staging.reserve(3)))
    assert staging.flush().tolist() == [[7] * 16] * 2
