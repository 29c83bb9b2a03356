"""Slots that were written lately, for each reader on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rehearsal_plugin.buffer.change_tracking import Changes, TrackedStorage
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.storage import open_storage
from rehearsal_plugin.config import BufferConfig

CAPACITY = 8
BATCH = {"x": torch.arange(2)}
LAYOUT = RowLayout.infer(BATCH)


@pytest.fixture
def storage() -> TrackedStorage:
    return TrackedStorage(open_storage(BufferConfig(), CAPACITY, LAYOUT.row_bytes), CAPACITY)


def write_rows(storage: TrackedStorage) -> None:
    storage.write(np.array([6, 1]), torch.ones(2, LAYOUT.row_bytes, dtype=torch.uint8))


def write_fields(storage: TrackedStorage) -> None:
    storage.write_fields(np.array([6, 1]), LAYOUT.fields, LAYOUT.columns(BATCH))


def taken(changes: Changes) -> list[int]:
    slots: list[int] = changes.take(CAPACITY).tolist()
    return slots


def test_all_slots_have_changed_at_first() -> None:
    assert Changes(3).take(2).tolist() == [0, 1]


def test_a_slot_is_taken_once() -> None:
    changes = Changes(CAPACITY)
    changes.take(CAPACITY)
    changes.note(np.array([5, 2, 5]))
    assert taken(changes) == [2, 5]
    assert taken(changes) == []


@pytest.mark.parametrize("write", [write_rows, write_fields])
def test_every_kind_of_write_is_noted(write: Callable[[TrackedStorage], None], storage: TrackedStorage) -> None:
    changes = storage.follow()
    changes.take(CAPACITY)
    write(storage)
    assert taken(changes) == [1, 6]


def test_every_reader_takes_for_itself(storage: TrackedStorage) -> None:
    first, second = storage.follow(), storage.follow()
    first.take(CAPACITY)
    second.take(CAPACITY)
    write_rows(storage)
    assert taken(first) == [1, 6]
    assert taken(second) == [1, 6]
    assert storage.take_changed(CAPACITY).tolist() == list(range(CAPACITY)), "its first call"


def test_a_reader_that_has_left_is_told_nothing(storage: TrackedStorage) -> None:
    stays, leaves = storage.follow(), storage.follow()
    taken(stays), taken(leaves)
    storage.unfollow(leaves)
    write_rows(storage)
    assert (taken(stays), taken(leaves)) == ([1, 6], [])


def test_a_write_that_fails_is_no_change(storage: TrackedStorage) -> None:
    changes = storage.follow()
    changes.take(CAPACITY)
    with pytest.raises(ValueError, match="bytes"):
        storage.write(np.array([0]), torch.ones(1, 3, dtype=torch.uint8))
    assert taken(changes) == []


def test_reads_are_those_of_the_storage_behind(storage: TrackedStorage) -> None:
    write_rows(storage)
    out = torch.zeros(1, LAYOUT.row_bytes, dtype=torch.uint8)
    storage.read(np.array([6]), out)
    assert out.eq(1).all()
    assert storage.first(2)[:][1].eq(1).all()
