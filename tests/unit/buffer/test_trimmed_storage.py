"""Rows of different length at slots."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.storage import HostStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage, open_rows, slots_for
from rehearsal_plugin.config import BufferConfig
from tests.helpers.ragged_rows import LAYOUT, LONGEST, PADS, packed_rows

CAPACITY = 40


@pytest.fixture(params=["memory", "mmap"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> TrimmedStorage:
    path = {"path": str(tmp_path)} if request.param == "mmap" else {}
    config = BufferConfig.model_validate({"storage": request.param, "capacity": CAPACITY, **path})
    opened = open_rows(config, LAYOUT, 0)
    assert isinstance(opened, TrimmedStorage)
    return opened


def read(storage: TrimmedStorage, slots: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
    out = torch.full((len(slots), LAYOUT.row_bytes), 9, dtype=torch.uint8)
    storage.read(slots, out)
    return out


def random_lengths(count: int, rng: np.random.Generator) -> list[int]:
    lengths: list[int] = np.minimum(rng.lognormal(1.2, 1.0, count), LONGEST).astype(int).tolist()
    return lengths


def test_rows_come_back_whatever_was_written_since(storage: TrimmedStorage) -> None:
    """Against a storage of padded rows, through many chunks and their cleaning."""
    rng = np.random.default_rng(0)
    plain = HostStorage(np.zeros((CAPACITY, LAYOUT.row_bytes), dtype=np.uint8))
    every = np.arange(CAPACITY)
    for step in range(800):
        count = int(rng.integers(0, 20))
        slots = rng.choice(CAPACITY, count, replace=False)
        rows = packed_rows(random_lengths(count + 3, rng), seed=step)
        places = None if step % 2 else rng.choice(count + 3, count, replace=False)
        offered = rows[:count] if places is None else rows
        for one in (storage, plain):
            one.write(slots, offered, places)
    written = every[torch.from_numpy(plain._array).any(1).numpy()]
    assert len(written) == CAPACITY
    assert torch.equal(read(storage, every), torch.from_numpy(plain._array))
    assert torch.equal(storage.first(7)[:], torch.from_numpy(plain._array[:7]))
    assert torch.equal(storage.copy(every[::-1].copy())[:], torch.from_numpy(plain._array[::-1].copy()))


def test_columns_are_written_as_rows_are(storage: TrimmedStorage) -> None:
    rows = packed_rows([4, 0, 9])
    columns = [field.view(rows) for field in LAYOUT.fields]
    storage.write_fields(np.array([5, 6]), LAYOUT.fields, columns, np.array([2, 0]))
    assert torch.equal(read(storage, np.array([5, 6])), rows[[2, 0]])


def test_rows_are_looked_at_up_to_their_bounds_alone(storage: TrimmedStorage) -> None:
    """What lies behind counts as padding, whatever it is."""
    rows = packed_rows([4, 0, 9, LONGEST])
    marked = rows.clone()
    for row, bound in enumerate(bounds := [6, 0, 9, LONGEST]):
        LAYOUT.field("tokens").view(marked)[row, bound:] = 5
    storage.write(np.array([5, 6, 7]), marked, np.array([3, 0, 2]), np.array(bounds))
    storage.write(np.array([8]), marked[1:2], None, np.array(bounds[1:2]))
    assert torch.equal(read(storage, np.array([5, 6, 7, 8])), rows[[3, 0, 2, 1]])


def test_a_list_of_first_rows_stays_as_it_was(storage: TrimmedStorage) -> None:
    rows = packed_rows([3, 5])
    storage.write(np.arange(2), rows)
    first = storage.first(2)
    for step in range(800):
        storage.write(np.arange(2), packed_rows([LONGEST, LONGEST], seed=step))
    assert torch.equal(first[:], rows)


def test_another_thread_reads_whole_rows_while_this_one_writes_others(storage: TrimmedStorage) -> None:
    kept, rows = np.arange(0, CAPACITY, 2), packed_rows(random_lengths(CAPACITY // 2, np.random.default_rng(3)))
    storage.write(kept, rows)
    faults: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if not torch.equal(read(storage, kept), rows):
                faults.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    rng = np.random.default_rng(4)
    try:
        for step in range(1500):
            storage.write(rng.choice(np.arange(1, CAPACITY, 2), 8, replace=False), packed_rows([LONGEST] * 8, step))
    finally:
        done.set()
        reader.join()
    assert not faults


def test_memory_stays_near_the_bytes_stored() -> None:
    """Lengths as of texts, mean 300 and at most 4,096: 1.15 times their bytes, where padding takes 13 times."""
    shape = (256, 4096)
    layout = RowLayout.infer({"tokens": torch.zeros(shape), "labels": torch.zeros(shape)})
    layout = RowLayout(layout.fields, layout.row_bytes, {}, {}, layout.nesting, pads=dict(PADS))
    rng, capacity = np.random.default_rng(0), 4000
    lengths = np.minimum(rng.lognormal(np.log(300) - 0.5, 1.0, 256), 4096).astype(int)
    rows = torch.zeros((256, layout.row_bytes), dtype=torch.uint8)
    labels, tokens = layout.field("labels").view(rows), layout.field("tokens").view(rows)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length], labels[row, :length], labels[row, length:] = 5, 6, -100
    storage = TrimmedStorage(layout, capacity, zeros)
    storage.write(np.arange(capacity), rows, rng.integers(0, 256, capacity))
    for _ in range(400):
        storage.write(rng.choice(capacity, 50, replace=False), rows, rng.integers(0, 256, 50))
        assert storage.held_bytes <= 1.15 * storage.live_bytes
    assert 10 * storage.live_bytes < capacity * layout.row_bytes


@pytest.mark.parametrize("policy", ["reservoir", "random_replace", "fifo"])
def test_a_capacity_in_bytes_is_used_up_and_kept(policy: str) -> None:
    config = BufferConfig.model_validate({"capacity": "256KiB", "policy": policy})
    assert slots_for(config, LAYOUT) == (256 << 10) // LAYOUT.row_bytes  # a slot of less than 512 bytes is not made
    layout = RowLayout.infer({"tokens": torch.zeros(1, 512, dtype=torch.int64)})
    layout = RowLayout(layout.fields, layout.row_bytes, {}, {}, layout.nesting, pads={"tokens": 0})
    buffer = RehearsalBuffer(config, layout)
    assert buffer.capacity == 512
    rng = np.random.default_rng(0)
    for step in range(1, 300):
        rows = torch.zeros((8, layout.row_bytes), dtype=torch.uint8)
        for row, length in enumerate(rng.integers(50, 150, 8).tolist()):
            layout.field("tokens").view(rows)[row, :length] = 1
        buffer.write(buffer.admit(rows, step), rows)
    storage = buffer._storage._storage
    assert isinstance(storage, TrimmedStorage)
    assert 230 < len(buffer) < 320  # rows of 800 bytes, where 64 of the longest would fit
    assert 0.85 * (256 << 10) < storage.held_bytes < 1.05 * (256 << 10)
    assert buffer.slot_index.capacity == len(buffer)


INDEXED: dict[str, Any] = {"partition_by": "key", "deduplicate": True}


@pytest.mark.parametrize(
    "keys",
    [{}, INDEXED, {"policy": "score", "score_by": "score"}, {**INDEXED, "policy": "herding", "score_by": "features"}],
)
def test_a_capacity_in_bytes_holds_the_index_too(keys: dict[str, Any]) -> None:
    """All that is allocated for a buffer of short rows, by size: rows, their table, partitions, hashes and scores."""
    budget, example = 8 << 20, {"tokens": torch.zeros(1, 512, dtype=torch.int64), "key": torch.zeros(1).long()}
    layout = RowLayout.infer({**example, "score": torch.zeros(1), "features": torch.zeros(1, 8)})
    layout = RowLayout(layout.fields, layout.row_bytes, {}, {}, layout.nesting, pads={"tokens": 0})
    config = BufferConfig.model_validate({"capacity": "8MiB", **keys})
    rng, block = np.random.default_rng(0), torch.zeros((512, layout.row_bytes), dtype=torch.uint8)
    fields = layout.views(block)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    buffer = RehearsalBuffer(config, layout)
    for step in range(1, 100):
        for row, length in enumerate(rng.integers(60, 200, 512).tolist()):
            fields["tokens"][row] = 0
            fields["tokens"][row, :length] = step * 512 + row + 1
        fields["key"][:] = torch.from_numpy(rng.integers(0, 9, 512)).reshape(fields["key"].shape)
        buffer.write(buffer.admit(block, step), block)
        if buffer.slot_index.capacity == len(buffer):
            break
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert buffer.slot_index.capacity == len(buffer) > budget // layout.row_bytes
    assert 0.7 * budget < held < 1.08 * budget


@pytest.mark.parametrize("longest", [4096, 1 << 15, 1 << 17])
def test_a_high_limit_on_the_length_costs_no_room(longest: int) -> None:
    layout = RowLayout.infer({"tokens": torch.zeros(1, longest, dtype=torch.int64)})
    layout = RowLayout(layout.fields, layout.row_bytes, {}, {}, layout.nesting, pads={"tokens": 0})
    config = BufferConfig.model_validate({"capacity": "1GiB"})
    assert slots_for(config, layout) == (1 << 30) // (8 * 256)


def test_a_loaded_buffer_is_as_full_as_the_saved_one() -> None:
    config = BufferConfig.model_validate({"capacity": "64KiB"})
    saved, loaded = RehearsalBuffer(config, LAYOUT), RehearsalBuffer(config, LAYOUT)
    for step in range(1, 60):
        rows = packed_rows(random_lengths(9, np.random.default_rng(step)), step)
        saved.write(saved.admit(rows, step), rows)
    loaded.load_state_dict(saved.state_dict())
    for buffer in (saved, loaded):
        rows = packed_rows([3] * 40, 99)
        buffer.write(buffer.admit(rows, 99), rows)
    assert loaded.slot_index.capacity == saved.slot_index.capacity
    assert torch.equal(loaded.state_dict()["rows"][:], saved.state_dict()["rows"][:])


def test_rollback_brings_rows_of_other_lengths_back() -> None:
    buffer = RehearsalBuffer(BufferConfig(capacity=8), LAYOUT)
    rows = packed_rows([1, 2, 3, 4, 5, 6, 7, 8])
    buffer.write(buffer.admit(rows, 1), rows)
    buffer.commit()
    for step in range(2, 30):
        other = packed_rows([LONGEST, 0, 4], step)
        buffer.write(buffer.admit(other, step), other)
    assert not torch.equal(buffer.state_dict()["rows"][:], rows)
    buffer.rollback()
    assert torch.equal(buffer.state_dict()["rows"][:], rows)


def test_rows_that_become_longer_than_the_bytes_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    buffer = RehearsalBuffer(BufferConfig.model_validate({"capacity": "64KiB", "policy": "random_replace"}), LAYOUT)
    for step in range(1, 200):
        rows = packed_rows([2 if step < 100 else LONGEST] * 9, step)
        buffer.write(buffer.admit(rows, step), rows)
        if step == 99:
            assert not caplog.records
    (record,) = caplog.records
    assert "rows have become longer" in record.getMessage()
