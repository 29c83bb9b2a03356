"""Byte-row buffers that are used in turn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.cells import Cell
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.staging import RowPool, Staging
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer
from tests.helpers.ragged_rows import LAYOUT as RAGGED
from tests.helpers.ragged_rows import LONGEST, PADS, packed_rows, padded_batch

CPU = torch.device("cpu")
ROW_BYTES = 16
LAYOUT = RowLayout.infer({"number": torch.zeros(2, dtype=torch.int64)})


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
    staging = Staging(LAYOUT, CPU)
    for value, rows in ((1, 2), (2, 0), (3, 5), (4, 1)):
        fill(staging.reserve(rows), value)
    assert staging.flush().rows[:, 0].tolist() == [1, 1, 3, 3, 3, 3, 3, 4]


def test_staging_starts_anew_after_a_flush() -> None:
    staging = Staging(LAYOUT, CPU)
    for value in range(5):
        fill(staging.reserve(3), value)
        assert staging.flush().rows[:, 0].tolist() == [value] * 3


def test_nothing_staged_is_no_rows() -> None:
    staging = Staging(LAYOUT, CPU)
    fill(staging.reserve(3), 1)
    staging.flush()
    assert tuple(staging.flush().rows.shape) == (0, ROW_BYTES)


def test_flushed_rows_stay_while_the_next_ones_are_staged() -> None:
    staging = Staging(LAYOUT, CPU)
    fill(staging.reserve(3), 1)
    flushed = staging.flush().rows
    fill(staging.reserve(50), 2)
    assert (flushed == 1).all()


def test_staged_rows_lie_on_16_byte_boundaries_so_that_every_dtype_can_be_viewed() -> None:
    staging = Staging(LAYOUT, CPU)
    staging.reserve(3)
    assert staging.reserve(2).data_ptr() % 16 == 0


def test_rows_that_cannot_be_had_leave_what_is_staged_as_it_was() -> None:
    staging = Staging(LAYOUT, CPU)
    fill(staging.reserve(2), 7)
    with pytest.raises(MemoryError):
        staging.reserve(1 << 50)
    with pytest.raises(IndexError):
        staging.pack([torch.zeros(2, dtype=torch.int64)], LAYOUT, 1, torch.tensor([5]))
    assert staging.flush().rows.tolist() == [[7] * 16] * 2


def narrow_batch(lengths: list[int], width: int, seed: int) -> dict[str, Tensor]:
    batch = padded_batch(lengths, seed)
    return {**batch, **{name: batch[name][:, :width] for name in PADS}}


def columns_of(lengths: list[int], width: int, seed: int) -> list[Tensor]:
    return RAGGED.columns(narrow_batch(lengths, width, seed), narrow=True)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_whole_in_whatever_order_batches_of_any_width_come(seed: int) -> None:
    """Against rows of the full length, which are kept, replaced and refused in the same way."""
    staging, expected = Staging(RAGGED, CPU), torch.zeros((0, RAGGED.row_bytes), dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    for step in range(300):
        width, count = int(rng.integers(0, LONGEST + 1)), int(rng.integers(0, 5))
        lengths = rng.integers(0, width + 1, count).tolist()
        columns, whole = columns_of(lengths, width, step), packed_rows(lengths, step)
        what = rng.choice(["pack", "pack", "pack", "refuse", "keep", "replace", "restore", "flush"])
        if what == "pack":
            staging.pack(columns, RAGGED, count)
            expected = torch.cat((expected, whole))
        elif what == "refuse":
            with pytest.raises(IndexError):
                staging.pack(columns, RAGGED, count + 1, torch.arange(count + 1))
        elif what == "keep":
            places = rng.permutation(len(expected))[: len(expected) - 1]
            staging.keep(places)
            expected = expected[places]
        elif what == "replace":
            places = rng.permutation(len(expected) + count)[:count]
            behind = places >= len(expected)
            places[behind] = len(expected) + np.arange(behind.sum())
            staging.replace(places, columns, RAGGED, torch.arange(count))
            expected = torch.cat((expected, whole))[: max(len(expected), int(places.max(initial=-1)) + 1)]
            expected[places] = whole
        elif what == "restore":
            staging.restore(whole, None)
            expected = torch.cat((expected, whole))
        else:
            flushed = staging.flush()
            assert torch.equal(flushed.rows, expected)
            lengths_found = RowTrimmer(RAGGED).lengths(expected.numpy(), np.arange(len(expected)))
            assert (lengths_found <= flushed.bounds).all()
            expected = expected[:0]
        assert torch.equal(staging.staged().rows, expected)


def test_only_what_the_row_before_had_is_padded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[int] = []
    fill = Cell.fill
    staging = Staging(RAGGED, CPU)

    def counted(cell: Cell, rows: Tensor, start: int, stop: int) -> None:
        padded.append(len(rows) * (stop - start))
        fill(cell, rows, start, stop)

    for width in (9, 9, 9, 9):  # two buffers, each new and then used again
        staging.pack(columns_of([width, 3], width, 0), RAGGED, 2)
        assert staging.flush().bounds.tolist() == [width] * 2
    monkeypatch.setattr(Cell, "fill", counted)
    for width in (9, 12, 9, 12):
        staging.pack(columns_of([width, 3], width, 0), RAGGED, 2)
        staging.flush()
    assert padded == []
    staging.pack(columns_of([6, 3], 6, 0), RAGGED, 2)
    assert padded == [2 * 3] * 2  # positions 6 to 9 of tokens and labels


def test_batches_padded_in_another_way_are_whole() -> None:
    other = dataclasses.replace(RAGGED, pads={"tokens": 1.0, "labels": -1.0})
    staging = Staging(RAGGED, CPU)
    for _ in range(3):
        staging.pack(columns_of([4, 2], 7, 0), RAGGED, 2)
        staging.flush()
    for _ in range(3):
        staging.pack(columns_of([4, 2], 4, 0), other, 2)
        labels = other.views(staging.flush().rows)["labels"]
        assert (labels[:, 4:] == -1).all()
