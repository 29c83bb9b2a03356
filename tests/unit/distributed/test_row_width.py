"""With how many positions rows travel: what a rank tells, and which candidates wait for others to hear of them."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin import RehearsalBuffer, RowLayout
from rehearsal_plugin.buffer.rows.staging import BoundedRows
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.distributed.row_width import RowWidth

LONGEST = 128
PADS = {"tokens": 0.0}
LAYOUT = dataclasses.replace(RowLayout.infer({"tokens": torch.zeros(1, LONGEST, dtype=torch.int16)}), pads=PADS)


def packed_rows(lengths: list[int]) -> Tensor:
    """Rows of ones."""
    rows = torch.zeros((len(lengths), LAYOUT.row_bytes), dtype=torch.uint8)
    for row, length in zip(LAYOUT.field("tokens").view(rows), lengths, strict=True):
        row[:length] = 1
    return rows


def buffer(**keys: object) -> RehearsalBuffer:
    return RehearsalBuffer(BufferConfig.model_validate({"capacity": 8, **keys}), LAYOUT)


def staged(*lengths: int) -> BoundedRows:
    return BoundedRows(packed_rows(list(lengths)), np.array(lengths, dtype=np.int64))


def test_a_rank_tells_what_its_longest_row_needs_and_never_less() -> None:
    rows = buffer()
    width = RowWidth(rows)
    assert width.tell(staged()) == width.tell(staged(3, 5)) == 16
    rows.write(np.array([0]), packed_rows([17]))
    assert width.tell(staged(3)) == 32
    rows.write(np.array([0]), packed_rows([2]))
    assert width.tell(staged()) == 32


def test_rows_that_were_stored_before_count() -> None:
    rows = buffer()
    rows.write(np.array([0]), packed_rows([50]))
    assert RowWidth(rows).tell(staged()) == 64


def test_rows_of_one_length_have_no_width() -> None:
    layout = RowLayout.infer({"x": torch.zeros(2, 3)})
    width = RowWidth(RehearsalBuffer(BufferConfig(capacity=4), layout))
    rows = BoundedRows(torch.zeros((2, layout.row_bytes), dtype=torch.uint8), np.zeros(2, dtype=np.int64))
    assert width.tell(rows) == 0
    assert width.packing(0)[0] is layout
    assert width.admissible(rows, 0) is rows


def test_rows_whose_padding_is_not_known_travel_whole() -> None:
    rows = buffer()
    rows.layout = dataclasses.replace(LAYOUT, pads={"tokens": 5.0})
    width = RowWidth(rows)
    assert width.tell(staged(2)) == LONGEST
    assert len(width.admissible(staged(2, 2), 16).rows) == 0


def test_longer_candidates_wait_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    width = RowWidth(buffer())
    with caplog.at_level(logging.WARNING):
        kept = width.admissible(staged(3, 17, 16, 128), 16)
        width.admissible(staged(17), 16)
    assert kept.bounds.tolist() == [3, 16]
    assert torch.equal(kept.rows, packed_rows([3, 16]))
    assert caplog.text.count("2 candidates are not offered") == 1
    assert len(caplog.records) == 1


def test_short_rows_of_a_wide_batch_do_not_wait() -> None:
    rows = BoundedRows(packed_rows([3, 100, 16]), np.full(3, 100))
    kept = RowWidth(buffer()).admissible(rows, 16)
    assert torch.equal(kept.rows, packed_rows([3, 16]))
    assert kept.bounds.tolist() == [100, 100], "of the batch, as the memory has it"


def test_the_next_header_tells_of_rows_that_waited() -> None:
    width = RowWidth(buffer())
    assert width.tell(staged(3)) == 16
    width.admissible(BoundedRows(packed_rows([3, 40]), np.full(2, 100)), 16)
    assert width.tell(staged(3)) == 48
    loaded = RowWidth(buffer())
    loaded.load_state_dict(width.state_dict())
    assert loaded.tell(staged()) == 48


def test_all_are_admissible_where_nothing_is_agreed() -> None:
    width = RowWidth(buffer())
    rows = staged(3, LONGEST)
    assert width.admissible(rows, None) is width.admissible(rows, 0) is width.admissible(rows, LONGEST) is rows


def test_rows_are_read_as_wide_as_was_agreed() -> None:
    rows = buffer()
    rows.write(np.arange(2), packed_rows([3, 16]))
    width = RowWidth(rows)
    layout, reader = width.packing(16)
    read = reader.read(np.array([1, 0]))
    assert (layout.longest, read.shape) == (16, (2, 32))
    assert torch.equal(layout.views(read)["tokens"], LAYOUT.views(packed_rows([16, 3]), 16)["tokens"])
    assert width.packing(16)[1] is reader
    assert width.packing(32)[0].longest == 32


def test_it_goes_on_from_its_state() -> None:
    width, loaded = RowWidth(buffer()), RowWidth(buffer())
    width.tell(staged(120))
    loaded.load_state_dict(width.state_dict())
    assert loaded.tell(staged()) == LONGEST
