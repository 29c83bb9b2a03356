"""Rows of the same content: never stored twice, never mistaken for one another, never counted as offered."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal, RehearsalBuffer, RowLayout
from rehearsal_plugin.buffer import dedup as duplicates
from rehearsal_plugin.buffer.dedup import DUPLICATE, ContentIndex, content_hashes, repeated_rows
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.samples import Batch, ids_of, intact, samples

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
POLICIES = ["reservoir", "balanced", "random_replace", "fifo"]


def buffer_of(capacity: int, policy: str = "reservoir", **keys: Any) -> RehearsalBuffer:
    section = {"capacity": capacity, "policy": policy, "deduplicate": True, "partition_by": "label", **keys}
    return RehearsalBuffer(BufferConfig.model_validate(section), RowLayout.infer(samples(torch.arange(1))))


def stored(buffer: RehearsalBuffer) -> list[int]:
    """The ids of all rows, by slot."""
    batch: Batch = buffer.layout.unpack(buffer.state_dict()["rows"])
    assert intact(batch)
    return ids_of(batch, 0)


def packed(buffer: RehearsalBuffer, ids: list[int]) -> Tensor:
    columns = buffer.layout.columns(samples(torch.tensor(ids, dtype=torch.int64)))
    rows = torch.zeros((len(ids), buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.layout.pack(columns, rows)
    return rows


def offer(buffer: RehearsalBuffer, ids: list[int], step: int) -> list[int]:
    """Offer rows; the ids of those that were refused as duplicates."""
    rows = packed(buffer, ids)
    slots = buffer.admit(rows, step)
    buffer.write(slots, rows)
    return [row for row, slot in zip(ids, slots.tolist(), strict=True) if slot == DUPLICATE]


def expected(held: list[int], ids: list[int]) -> list[int]:
    """Which of `ids` are held, or come a second time."""
    known, refused = set(held), []
    for row in ids:
        if row in known:
            refused.append(row)
        known.add(row)
    return refused


# --- a buffer --------------------------------------------------------------------------------------------------------

batches = st.lists(st.integers(0, 40), min_size=1, max_size=20)
actions = st.lists(st.one_of(batches, st.sampled_from(["commit", "rollback", "load"])), max_size=20)


@pytest.mark.parametrize("colliding", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@given(actions=actions, capacity=st.integers(1, 30))
@PROPERTY
def test_exactly_the_rows_that_are_stored_or_come_twice_are_refused(
    policy: str, colliding: bool, actions: list[Any], capacity: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if colliding:
            patch.setattr(duplicates, "content_hashes", lambda rows, _: np.zeros(len(rows), dtype=np.int64))
        buffer, committed = buffer_of(capacity, policy), list[int]()
        for step, action in enumerate(actions):
            held = stored(buffer)
            if action == "commit":
                buffer.commit()
                committed = held
            elif action == "rollback":
                buffer.rollback()
                assert stored(buffer) == committed
            elif action == "load":
                state, buffer, committed = buffer.state_dict(), buffer_of(capacity, policy), []
                buffer.load_state_dict(state)
                assert stored(buffer) == held
            else:
                assert offer(buffer, action, step) == expected(held, action)
            assert len(set(stored(buffer))) == len(buffer)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_the_option_rows_are_stored_as_often_as_they_come(policy: str) -> None:
    buffer = buffer_of(10, policy, deduplicate=False)
    assert offer(buffer, [1, 1, 2, 1], 0) == []
    assert sorted(stored(buffer)) == [1, 1, 1, 2]


def test_rows_that_were_replaced_may_come_again() -> None:
    buffer = buffer_of(3, "fifo")
    offer(buffer, [1, 2, 3], 0)
    offer(buffer, [4], 1)
    assert stored(buffer) == [4, 2, 3]
    assert offer(buffer, [1, 2], 2) == [2]
    assert stored(buffer) == [4, 1, 3]


def test_a_row_whose_fields_were_rewritten_is_another_row() -> None:
    buffer = buffer_of(10)
    offer(buffer, [1, 2], 0)
    buffer.update_fields(np.array([0]), samples(torch.tensor([7])))
    assert offer(buffer, [7, 1], 1) == [7]
    assert sorted(stored(buffer)) == [1, 2, 7]


def test_what_was_recorded_beside_a_row_is_not_its_content() -> None:
    batch = samples(torch.arange(4))
    layout = RowLayout.infer(batch).with_state({"output": torch.zeros(4, 3)})
    buffer = RehearsalBuffer(BufferConfig(capacity=10, deduplicate=True), layout)
    rows = torch.zeros((4, layout.row_bytes), dtype=torch.uint8)
    for step in range(2):
        layout.pack([*layout.columns(batch), torch.full((4, 3), float(step))], rows)
        slots = buffer.admit(rows, step)
        buffer.write(slots, rows)
        buffer.update_fields(np.arange(len(buffer)), {"output": torch.ones(len(buffer), 3)})
    assert (slots == DUPLICATE).all()
    assert len(buffer) == 4


# --- what the policy is told -----------------------------------------------------------------------------------------


def test_a_duplicate_is_not_counted_as_offered() -> None:
    buffer = buffer_of(100)
    for step in range(5):
        offer(buffer, list(range(20)), step)
    partitions = buffer.slot_index.partitions
    assert partitions is not None
    assert (buffer.slot_index.offered, partitions.offered.sum()) == (20, 20)
    assert offer(buffer, list(range(20, 60)), 5) == []
    assert len(buffer) == 60, "whoever kept everything has room for everything"


@pytest.mark.parametrize("times", [1, 4])
def test_rows_that_come_several_times_in_a_row_are_kept_like_all_others(times: int) -> None:
    counts, trials = np.zeros(24, dtype=int), 400
    for seed in range(trials):
        section = BufferConfig(capacity=6, deduplicate=True)
        buffer = RehearsalBuffer(section, RowLayout.infer(samples(torch.arange(1))), seed=seed)
        for first in range(0, 24, 4):
            ids = [row for row in range(first, first + 4) for _ in range(times if row % 2 else 1)]
            buffer.offer(samples(torch.tensor(ids)))
        counts[stored(buffer)] += 1
    assert equally_included(counts.tolist(), trials, 6) > SIGNIFICANCE


# --- the hash --------------------------------------------------------------------------------------------------------


def test_rows_that_differ_in_any_one_bit_have_different_hashes() -> None:
    rows = torch.randint(0, 256, (1, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flipped = rows.repeat(1 + 8 * 48, 1)
    for bit in range(8 * 48):
        flipped[1 + bit, bit // 8] ^= 1 << bit % 8
    assert len(np.unique(content_hashes(flipped, 48))) == 1 + 8 * 48


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.int8])
def test_regular_rows_have_different_hashes_too(dtype: torch.dtype) -> None:
    signs = torch.tensor(list(itertools.product([-1, 1], repeat=12))).to(dtype)  # those differ in high bits only
    buffer = RowLayout.infer({"x": signs})
    rows = torch.zeros((len(signs), buffer.row_bytes), dtype=torch.uint8)
    buffer.pack([signs], rows)
    hashes = content_hashes(rows, buffer.row_bytes)
    assert len(np.unique(hashes)) == len(signs)
    assert len(np.unique(hashes & 1023)) > 900, "their low bits are spread over the places of a table"


def test_bytes_behind_the_content_do_not_count() -> None:
    rows = torch.zeros((2, 64), dtype=torch.uint8)
    rows[1, 32:] = 1
    assert len(np.unique(content_hashes(rows, 32))) == 1
    assert len(np.unique(content_hashes(rows, 64))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_hashes() -> None:
    rows = torch.randint(0, 256, (100, 1600), dtype=torch.uint8)
    assert np.array_equal(content_hashes(rows, 1584), content_hashes(rows.cuda(), 1584))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6))
@PROPERTY
def test_of_equal_rows_the_first_stays_whatever_their_hashes(rows: list[int], buckets: int) -> None:
    values = np.array(rows, dtype=np.int64)
    found = repeated_rows(values % buckets, lambda one, other: values[one] == values[other])
    assert found.tolist() == [row in rows[:place] for place, row in enumerate(rows)]


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_only_rows_of_the_same_hash_are_read() -> None:
    contents, rows = ContentIndex(1 << 16, 32), torch.arange(1 << 16)[:, None].repeat(1, 4).view(torch.uint8)
    contents.put(np.arange(1 << 16), contents.hashes(rows))
    asked: list[int] = []

    def read(slots: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        asked.extend(slots.tolist())
        return rows[torch.from_numpy(slots)]

    new = (torch.arange(8) + (1 << 16))[:, None].repeat(1, 4).view(torch.uint8)
    batch = torch.cat((new, rows[[5, 600]]))
    assert contents.duplicates(batch, contents.hashes(batch), read).tolist() == [False] * 8 + [True] * 2
    assert asked == [5, 600]


@pytest.mark.parametrize("capacity", [1000, 1 << 10, 1025, 100_000])
def test_the_table_takes_at_most_21_bytes_a_slot(capacity: int) -> None:
    arrays = [value for value in vars(ContentIndex(capacity, 32)).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 21 * capacity


# --- a job -----------------------------------------------------------------------------------------------------------


def job(capacity: int = 50, **keys: Any) -> Rehearsal:
    section = {"buffer": {"capacity": capacity, "deduplicate": True}, "representatives": 4, **keys}
    return Rehearsal(section, LocalTransport())


def epoch(rehearsal: Rehearsal, rows: int = 40) -> list[Batch]:
    return [rehearsal.update(samples(torch.arange(first, first + 8))) for first in range(0, rows, 8)]


def rows_of(rehearsal: Rehearsal) -> list[int]:
    rehearsal._coordinator.drain()
    assert rehearsal.buffer is not None
    return stored(rehearsal.buffer)


def test_a_second_epoch_brings_nothing_new() -> None:
    with job() as rehearsal:
        epoch(rehearsal)
        first = rows_of(rehearsal)
        seen = epoch(rehearsal)
        metrics = rehearsal.metrics()
        assert rows_of(rehearsal) == first == list(range(40))
    assert [metrics[name] for name in ("rows_offered", "rows_admitted", "rows_stored")] == [40, 40, 40]
    assert metrics["rows_duplicate"] == 40
    assert all(len(batch["id"]) == 12 and intact(batch) for batch in seen), "rows are replayed all the same"


def test_a_strategy_that_records_outputs_stores_each_row_once() -> None:
    with job(strategy={"name": "der"}) as rehearsal:
        for _ in range(2):
            for first in range(0, 40, 8):
                batch = rehearsal.augment(samples(torch.arange(first, first + 8)))
                rehearsal.loss(cross_entropy, batch["x"].float().repeat(1, 2), batch["label"])
                rehearsal.step()
        assert rows_of(rehearsal) == list(range(40))
        assert rehearsal.metrics()["rows_duplicate"] == 40


def test_a_resumed_job_knows_its_rows(tmp_path: Path) -> None:
    with job(capacity=20) as rehearsal:
        epoch(rehearsal)
        rehearsal.save(tmp_path)
        expected_rows, kept = epoch(rehearsal), rows_of(rehearsal)
    with job(capacity=20) as rehearsal:
        rehearsal.load(tmp_path)
        resumed = epoch(rehearsal)
        assert rows_of(rehearsal) == kept
    assert all(torch.equal(one["id"], other["id"]) for one, other in zip(expected_rows, resumed, strict=True))


@pytest.mark.parametrize("policy", ["reservoir", "fifo"])
def test_rows_that_are_taken_over_are_stored_once(policy: str, tmp_path: Path) -> None:
    with Rehearsal({"buffer": {"capacity": 200}, "representatives": 4}, LocalTransport()) as rehearsal:
        epoch(rehearsal)
        epoch(rehearsal)
        rehearsal.save(tmp_path)
        assert len(rows_of(rehearsal)) == 80
    buffer = {"capacity": 60, "deduplicate": True, "policy": policy}
    with Rehearsal({"buffer": buffer, "representatives": 4}, LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path)
        assert sorted(rows_of(rehearsal)) == list(range(40))
        assert rehearsal.buffer is not None
        assert rehearsal.buffer.slot_index.offered == 40, "what was refused was not offered"
        epoch(rehearsal)
        assert sorted(rows_of(rehearsal)) == list(range(40))
