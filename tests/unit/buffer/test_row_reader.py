"""Rows that are read again and again to the same memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.row_reader import RowReader
from rehearsal_plugin.buffer.rows.narrowing import narrowed
from rehearsal_plugin.buffer.storage import HostStorage
from rehearsal_plugin.config import BufferConfig
from tests.helpers.ragged_rows import LAYOUT, LONGEST, packed_rows

LENGTHS = [3, LONGEST, 0, 9, 1, 17, 5, 5]


def filled(**keys: object) -> RehearsalBuffer:
    buffer = RehearsalBuffer(BufferConfig.model_validate({"capacity": len(LENGTHS), **keys}), LAYOUT)
    buffer.write(np.arange(len(LENGTHS)), packed_rows(LENGTHS))
    return buffer


def test_rows_are_whole_whatever_was_read_before() -> None:
    reader, rows, rng = filled().reader(), packed_rows(LENGTHS), np.random.default_rng(0)
    for _ in range(200):
        slots = rng.choice(len(LENGTHS), int(rng.integers(0, 7)), replace=False)
        assert torch.equal(reader.read(slots), rows[slots])


def test_rows_read_last_outlive_the_next_read() -> None:
    reader, rows = filled().reader(), packed_rows(LENGTHS)
    first = reader.read(np.array([1, 0]))
    reader.read(np.array([2, 3]))
    assert torch.equal(first, rows[[1, 0]])


def test_no_more_is_padded_than_the_row_before_was_long() -> None:
    """What lies behind both rows is not touched: a mark that is put there stays."""
    reader, labels = filled().reader(), LAYOUT.field("labels")
    for _ in range(2):
        marked = reader.read(np.array([3]))  # 9 positions
        labels.view(marked)[0, 9] = 77
    after = labels.view(reader.read(np.array([0])))[0]  # 3 positions
    assert after[3:].tolist() == [-100] * 6 + [77] + [-100] * (LONGEST - 10)


def test_rows_are_read_with_fewer_positions() -> None:
    """Whatever was read before; from a storage that trims rows, and from one that does not."""
    short, packed = [length for length in LENGTHS if length <= 9], narrowed(LAYOUT, 8)
    rows, rng = packed_rows(short), np.random.default_rng(0)
    buffer = RehearsalBuffer(BufferConfig(capacity=len(short)), LAYOUT)
    buffer.write(np.arange(len(short)), rows)
    plain = HostStorage(np.zeros((len(short), LAYOUT.row_bytes), dtype=np.uint8))
    plain.write(np.arange(len(short)), rows)
    for reader in (buffer.reader(packed), RowReader(plain, None, LAYOUT, packed)):
        for _ in range(50):
            slots = rng.choice(len(short), int(rng.integers(0, 5)), replace=False)
            slots = slots[np.array(short)[slots] <= 8]
            wanted = LAYOUT.views(rows[slots], 8)
            found = packed.views(reader.read(slots))
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_row_that_is_too_long_for_that_is_refused() -> None:
    with pytest.raises(ValueError, match="24 positions where there is room for 8"):
        filled().reader(narrowed(LAYOUT, 8)).read(np.array([0, 1]))


@pytest.mark.parametrize("keys", [{}, {"storage": "mmap"}])
def test_memory_is_taken_once(keys: dict[str, str], tmp_path: object) -> None:
    reader = filled(**keys, **({"path": str(tmp_path)} if keys else {})).reader()
    assert len({reader.read(np.arange(5)).data_ptr() for _ in range(20)}) == 2


def test_rows_of_one_length_are_read_as_they_are() -> None:
    class Ones:
        device, row_bytes = torch.device("cpu"), 32

        def read(self, slots: np.ndarray[tuple[int], np.dtype[np.int64]], out: torch.Tensor) -> None:
            out[:] = torch.from_numpy(slots).to(torch.uint8).unsqueeze(1)

    reader = RowReader(Ones(), None, LAYOUT)  # type: ignore[arg-type]
    assert reader.read(np.array([4, 2]))[:, 0].tolist() == [4, 2]
    assert len(reader.read(np.arange(0))) == 0
