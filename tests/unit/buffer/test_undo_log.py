"""Rows that were overwritten come back, and what was known of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.storage import RowStorage, open_storage
from rehearsal_plugin.buffer.undo_log import UndoLog
from rehearsal_plugin.config import BufferConfig

CAPACITY, ROW_BYTES = 6, 16


def numbered(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)[:, None].repeat(1, ROW_BYTES)


@pytest.fixture
def storage() -> RowStorage:
    """Rows 0 to 3 at the slots of their numbers."""
    storage = open_storage(BufferConfig(), CAPACITY, ROW_BYTES)
    storage.write(np.arange(4), numbered(0, 1, 2, 3))
    return storage


def overwrite(storage: RowStorage, log: UndoLog[list[int]], slots: list[int], number: int) -> None:
    log.save_rows(np.array(slots))
    storage.write(np.array(slots), numbered(*[number] * len(slots)))


def stored(storage: RowStorage, count: int = 4) -> list[int]:
    numbers: list[int] = storage.first(count)[:][:, -1].tolist()
    return numbers


def test_overwritten_rows_come_back(storage: RowStorage) -> None:
    log = UndoLog(storage, 4, [1])
    overwrite(storage, log, [2, 0], 9)
    log.undo()
    assert stored(storage) == [0, 1, 2, 3]


def test_a_row_that_is_overwritten_twice_comes_back_as_it_was_first(storage: RowStorage) -> None:
    log = UndoLog(storage, 4, [1])
    overwrite(storage, log, [2], 8)
    overwrite(storage, log, [1, 2], 9)
    log.undo()
    assert stored(storage) == [0, 1, 2, 3]


def test_what_was_known_comes_back_as_a_copy(storage: RowStorage) -> None:
    known = [1, 2]
    log = UndoLog(storage, 4, known)
    known.append(3)
    first = log.undo()
    first.append(4)
    assert log.undo() == [1, 2]


def test_undoing_works_again_after_more_changes(storage: RowStorage) -> None:
    log = UndoLog(storage, 4, [1])
    for number in (7, 8, 9):
        overwrite(storage, log, [3, 1], number)
        log.undo()
        assert stored(storage) == [0, 1, 2, 3]


def test_new_rows_are_not_saved(storage: RowStorage) -> None:
    log = UndoLog(storage, 4, [1])
    overwrite(storage, log, [4, 5], 9)
    assert log._entries == []


def test_memory_grows_with_the_rows_overwritten_once(storage: RowStorage) -> None:
    log = UndoLog(storage, 4, [1])
    for _ in range(10):
        overwrite(storage, log, [0, 3], 9)
    assert sum(len(rows) for _, rows in log._entries) == 2
