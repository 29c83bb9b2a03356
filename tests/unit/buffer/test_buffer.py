"""One rank's buffer. Statistics are tested at the significance of `tests.helpers.chance`, with fixed seeds."""

from __future__ import annotations

import sys
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.policies import POLICIES
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError, StorageError
from rehearsal_plugin.rehearsal import Rehearsal
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
ALL = sorted(POLICIES)
JUDGING = {"score", "herding", "closest_to_centre"}
Batch = dict[str, Any]


def labelled(numbers: Sequence[int] | Tensor, partitions: int = 5, key: torch.dtype = torch.int64) -> Batch:
    """Samples whose every field follows from the sample's number."""
    number = torch.as_tensor(numbers, dtype=torch.int64)
    return {
        "number": number,
        "domain": (number % partitions).to(key),
        "inputs": [number[:, None] * torch.tensor([1.0, -2.0, 0.5]), (number % 2).bool()],
        "wide": (number[:, None, None] % 251).to(torch.uint8).expand(-1, 7, 5),
        "score": number.double().sin().float(),
    }


def is_consistent(batch: Batch, partitions: int = 5) -> bool:
    """Whether all fields of every sample still belong together."""
    expected = labelled(batch["number"], partitions, batch["domain"].dtype)
    return (
        torch.equal(batch["domain"], expected["domain"])
        and torch.equal(batch["wide"], expected["wide"])
        and all(map(torch.equal, batch["inputs"], expected["inputs"]))
    )


def make(capacity: int | str = 10, first: Batch | None = None, *, seed: int = 0, rank: int = 0, **keys: Any) -> Any:
    judged = {"score_by": "score"} if keys.get("policy") in JUDGING else {}
    section = BufferConfig.model_validate({"capacity": capacity, "partition_by": "domain", **judged, **keys})
    return RehearsalBuffer(section, RowLayout.infer(first or labelled([0])), rank=rank, seed=seed)


def filled(size: int, **keys: Any) -> RehearsalBuffer:
    buffer: RehearsalBuffer = make(**keys)
    buffer.offer(labelled(range(size)))
    return buffer


# Rows stay whole


@pytest.mark.parametrize("storage", ["memory", "mmap"])
@pytest.mark.parametrize("policy", ALL)
def test_every_payload_matches_its_label_after_thousands_of_offers(policy: str, storage: str, tmp_path: Path) -> None:
    place: dict[str, Any] = {"path": str(tmp_path)} if storage == "mmap" else {}
    buffer = make(97, policy=policy, storage=storage, **place)
    sizes = np.random.default_rng(0).integers(0, 12, 1000)
    for start, stop in pairwise(np.cumsum(sizes).tolist()):
        buffer.offer(labelled(range(start, stop)))
    stored = buffer.sample(97)
    assert len(stored["number"]) == len(set(stored["number"].tolist())) == 97
    assert is_consistent(stored)


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(0, 20), max_size=8))
def test_partitions_lead_to_their_rows(policy: str, capacity: int, sizes: list[int]) -> None:
    buffer, start = make(capacity, policy=policy), 0
    for size in sizes:
        buffer.offer(labelled(range(start, start + size)))
        start += size
    for key, count in zip(*(column.tolist() for column in buffer.counts()), strict=True):
        slots = buffer.slots(np.full(count, key), np.arange(count))
        rows = torch.empty((count, buffer.layout.row_bytes), dtype=torch.uint8)
        buffer.read(slots, rows)
        assert buffer.layout.unpack(rows)["domain"].tolist() == [key] * count
        assert is_consistent(buffer.layout.unpack(rows))


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(0, 20), max_size=8))
def test_every_slot_holds_the_row_that_was_last_admitted_there(policy: str, capacity: int, sizes: list[int]) -> None:
    buffer, model = make(capacity, policy=policy), dict[int, int]()
    layout = buffer.layout
    for step, size in enumerate(sizes):
        numbers = range(100 * step, 100 * step + size)
        rows = torch.empty((size, layout.row_bytes), dtype=torch.uint8)
        layout.pack(layout.columns(labelled(numbers)), rows)
        slots = buffer.admit(rows, step)
        buffer.write(slots, rows)
        model.update({slot: number for slot, number in zip(slots.tolist(), numbers, strict=True) if slot >= 0})
    stored = torch.empty((len(buffer), layout.row_bytes), dtype=torch.uint8)
    buffer.read(np.arange(len(buffer)), stored)
    assert dict(enumerate(layout.unpack(stored)["number"].tolist())) == model
    assert is_consistent(layout.unpack(stored))


def test_rows_of_several_partitions_are_looked_up_at_once() -> None:
    buffer = filled(10, capacity=10, policy="fifo")
    keys = np.array([4, 0, 4, 1, 0])
    rows = torch.empty((5, buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.read(buffer.slots(keys, np.array([1, 0, 0, 1, 1])), rows)
    assert buffer.layout.unpack(rows)["domain"].tolist() == keys.tolist()


@pytest.mark.parametrize("policy", ALL)
def test_the_caller_may_change_the_batch_after_an_offer(policy: str) -> None:
    buffer, batch = make(10, policy=policy), labelled(range(5))
    buffer.offer(batch)
    batch["number"].zero_()
    batch["inputs"][0].zero_()
    assert is_consistent(buffer.sample(5))


def test_an_offer_tells_how_many_rows_were_kept() -> None:
    buffer = make(4, policy="fifo")
    assert [buffer.offer(labelled(range(size))) for size in (3, 9, 0)] == [3, 4, 0]


@pytest.mark.parametrize("policy", ALL)
def test_a_buffer_of_one_row_holds_one_row(policy: str) -> None:
    buffer = filled(30, capacity=1, policy=policy)
    assert len(buffer) == 1
    assert is_consistent(buffer.sample(1))


@pytest.mark.parametrize("policy", ALL)
def test_empty_batches_are_no_rows(policy: str) -> None:
    buffer = make(4, policy=policy)
    assert buffer.offer(labelled([])) == 0
    assert len(buffer) == 0


def test_a_batch_of_another_form_is_refused_before_anything_is_stored() -> None:
    buffer = filled(3)
    with pytest.raises(BatchError, match="'domain'"):
        buffer.offer(labelled(range(3), key=torch.int32))
    assert len(buffer) == 3


def test_a_batch_that_cannot_be_copied_is_refused_before_anything_is_stored() -> None:
    first = {"x": torch.ones(3, 4)}
    buffer = RehearsalBuffer(BufferConfig(capacity=10), RowLayout.infer(first))
    buffer.offer(first)
    with pytest.raises(BatchError, match="'x' is sparse"):
        buffer.offer({"x": torch.eye(4)[:3].to_sparse()})
    assert torch.equal(buffer.sample(10)["x"], first["x"])


@pytest.mark.parametrize("deduplicate", [False, True])
def test_rows_with_state_are_not_stored_without_it(deduplicate: bool) -> None:
    batch = {"x": torch.ones(3, 4)}
    layout = RowLayout.infer(batch).with_state({"output": torch.zeros(3, 2)})
    buffer = RehearsalBuffer(BufferConfig(capacity=10, deduplicate=deduplicate), layout)
    with pytest.raises(BatchError, match="'output'"):
        buffer.offer(batch)
    assert len(buffer) == 0


# Partition keys


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
def test_any_integer_field_can_be_the_key(dtype: torch.dtype) -> None:
    buffer = make(10, labelled([0], 2, dtype))
    buffer.offer(labelled(range(6), 2, dtype))
    assert dict(zip(*(column.tolist() for column in buffer.counts()), strict=True)) == {0: 3, 1: 3}


def test_keys_may_be_negative_and_far_apart() -> None:
    keys = [-1, 2**63 - 1, -(2**63), -1]
    buffer = make(10, {"domain": torch.tensor([0])})
    buffer.offer({"domain": torch.tensor(keys)})
    assert dict(zip(*(column.tolist() for column in buffer.counts()), strict=True)) == {k: keys.count(k) for k in keys}


def test_a_key_may_have_a_dimension_of_its_own() -> None:
    buffer = make(10, {"domain": torch.tensor([[0]])})
    buffer.offer({"domain": torch.tensor([[3], [3], [8]])})
    assert dict(zip(*(column.tolist() for column in buffer.counts()), strict=True)) == {3: 2, 8: 1}


UNSUITABLE = {
    "float": torch.zeros(2),
    "bfloat16": torch.zeros(2, dtype=torch.bfloat16),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "several numbers": torch.zeros(2, 3, dtype=torch.int64),
    "no number": torch.zeros(2, 0, dtype=torch.int64),
}


@pytest.mark.parametrize("field", UNSUITABLE.values(), ids=list(UNSUITABLE))
def test_a_field_that_cannot_be_a_key_is_refused_by_name(field: Tensor) -> None:
    with pytest.raises(BatchError, match=r"rehearsal\.buffer\.partition_by names 'domain'.*one integer a sample"):
        make(10, {"domain": field})


def test_a_key_that_is_no_field_is_refused_with_the_fields_there_are() -> None:
    with pytest.raises(BatchError, match=r"'task'.*\['number', 'domain', 'inputs.0', 'inputs.1', 'wide', 'score'\]"):
        make(10, partition_by="task")


def test_without_a_key_there_are_no_partitions() -> None:
    assert [column.tolist() for column in filled(5, partition_by=None).counts()] == [[], []]


# Capacity


def test_capacity_in_rows() -> None:
    assert len(filled(50, capacity=20)) == 20


def test_capacity_in_bytes_is_filled_with_whole_rows() -> None:
    row_bytes = RowLayout.infer(labelled([0])).row_bytes
    assert [make(f"{n * row_bytes + extra}B").capacity for n, extra in ((1, 0), (3, row_bytes - 1))] == [1, 3]


def test_capacity_below_one_row_is_refused_with_the_cure() -> None:
    row_bytes = RowLayout.infer(labelled([0])).row_bytes
    with pytest.raises(ConfigError, match=rf"rehearsal\.buffer\.capacity .*at least '{row_bytes}B'"):
        make(f"{row_bytes - 1}B")


def test_more_rows_than_memory_is_an_error_of_storage() -> None:
    with pytest.raises(StorageError, match=r"rehearsal\.buffer\.capacity"):
        make(2**60)


# Work


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called, in Python and in C."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("partition_by", [None, "domain"])
@pytest.mark.parametrize("policy", sorted(set(ALL) - {"herding", "closest_to_centre"}))
def test_the_work_in_python_does_not_grow_with_the_rows_of_an_offer(policy: str, partition_by: str | None) -> None:
    if policy == "balanced" and partition_by is None:
        pytest.skip("needs partitions")
    buffer = make(2000, policy=policy, partition_by=partition_by)
    few, many = labelled(range(300)), labelled(range(1500))
    for _ in range(6):
        buffer.offer(many)
    calls = [calls_of(lambda batch=batch: buffer.offer(batch)) for batch in (few, many)]  # type: ignore[misc]
    assert calls[1] <= calls[0] + 100, "a row more is no call more"


def test_the_work_in_python_does_not_grow_with_the_rows_of_a_sample() -> None:
    buffer = filled(5000, capacity=5000)
    rooms = [buffer.room(count) for count in (500, 2000)]
    calls = [calls_of(lambda room=room: buffer.sample(len(room.rows), out=room)) for room in rooms]  # type: ignore[misc]
    assert calls[1] <= calls[0] + 300, "rows that were drawn twice are drawn again a few times, all at once"


@pytest.mark.parametrize("policy", sorted(set(ALL) - {"herding", "closest_to_centre"}))
def test_a_decision_takes_no_memory_that_grows_with_the_rows_stored(policy: str) -> None:
    buffer, few = make(20_000, policy=policy), labelled(range(14))
    buffer.offer(labelled(range(20_000)))
    rows = torch.zeros((14, buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.layout.pack(buffer.layout.columns(few), rows)
    buffer.admit(rows, 100)
    tracemalloc.start()
    for step in range(101, 120):
        buffer.admit(rows, step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000


def test_a_first_account_of_changes_has_all_rows_and_each_later_one_those_written_since() -> None:
    buffer = filled(10, capacity=20, policy="fifo")
    assert buffer.take_changed().tolist() == list(range(10))
    assert buffer.take_changed().tolist() == []
    buffer.offer(labelled(range(3)))
    assert buffer.take_changed().tolist() == [10, 11, 12]


# Sampling


def test_a_sample_has_no_row_twice() -> None:
    buffer = filled(40, capacity=40)
    for count in (1, 13, 20, 21, 39, 40):
        numbers = buffer.sample(count)["number"].tolist()
        assert len(set(numbers)) == len(numbers) == count


def test_a_sample_of_more_than_there_is_has_all_there_is() -> None:
    assert sorted(filled(7).sample(100)["number"].tolist()) == list(range(7))


def test_a_sample_of_an_empty_buffer_is_empty() -> None:
    assert make(10).sample(3)["number"].tolist() == []


def test_every_row_has_the_same_chance_to_be_sampled() -> None:
    buffer = filled(25, capacity=25)
    counts = np.zeros(25, dtype=np.int64)
    for _ in range(1000):
        counts[buffer.sample(8)["number"].numpy()] += 1
    assert equally_included(counts.tolist(), 1000, 8) > SIGNIFICANCE


def test_a_sample_can_use_the_memory_of_an_earlier_one() -> None:
    buffer = filled(100, capacity=100)
    room = buffer.room(10)
    first = buffer.sample(10, out=room)
    kept = first["number"].clone()
    second = buffer.sample(10, out=room)
    assert second["number"].data_ptr() == first["number"].data_ptr()
    assert len(set(kept.tolist())) == len(set(second["number"].tolist())) == 10
    assert kept.tolist() != second["number"].tolist()


def test_memory_of_another_size_is_left_alone() -> None:
    buffer = filled(3)
    room = buffer.room(10)
    assert sorted(buffer.sample(10, out=room)["number"].tolist()) == [0, 1, 2]
    assert room.batch["number"].tolist() == [0] * 10


@pytest.mark.parametrize("row_bytes", [3072, 16384])
def test_a_stored_row_takes_two_percent_more_than_itself_at_most_and_nothing_grows_with_steps(row_bytes: int) -> None:
    capacity, rows = 20_000, torch.zeros(100, row_bytes - 16, dtype=torch.uint8)
    batches = [{"x": rows, "y": (torch.arange(100) + shift) % 10} for shift in range(2)]
    layout = RowLayout.infer(batches[0])
    tracemalloc.start()
    buffer = RehearsalBuffer(BufferConfig(capacity=capacity, policy="balanced", partition_by="y"), layout)
    held = []
    for step in range(400):
        buffer.offer(batches[step % 2])
        if step in (250, 399):
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert layout.row_bytes == row_bytes
    assert held[0] <= 1.02 * capacity * row_bytes
    assert held[1] - held[0] < row_bytes


def test_rows_that_are_sampled_are_a_copy() -> None:
    buffer = filled(5)
    buffer.sample(5)["number"].zero_()
    assert sorted(buffer.sample(5)["number"].tolist()) == [0, 1, 2, 3, 4]


# Chance


def numbers_kept(**keys: Any) -> list[int]:
    buffer = make(10, **keys)
    for start in range(0, 200, 10):
        buffer.offer(labelled(range(start, start + 10)))
    return sorted(buffer.sample(10)["number"].tolist())


@pytest.mark.parametrize("policy", ALL)
def test_the_same_seed_keeps_the_same_rows(policy: str) -> None:
    assert numbers_kept(policy=policy, seed=3) == numbers_kept(policy=policy, seed=3)


@pytest.mark.parametrize("other", [{"seed": 4, "rank": 0}, {"seed": 3, "rank": 1}], ids=["seed", "rank"])
def test_another_seed_or_rank_keeps_other_rows(other: dict[str, int]) -> None:
    assert numbers_kept(seed=3, rank=0) != numbers_kept(**other)


def test_all_sets_of_rows_are_kept_with_the_same_chance_over_all_seeds() -> None:
    def kept(seed: int) -> tuple[int, ...]:
        buffer = make(2, seed=seed, partition_by=None)
        for numbers in ([0, 1, 2], [3], [4]):
            buffer.offer(labelled(numbers))
        return tuple(sorted(buffer.sample(2)["number"].tolist()))

    assert equally_likely(map(kept, range(1500)), 10) > SIGNIFICANCE


# Candidates


def offered(candidates: int | None, batches: list[Batch]) -> list[int]:
    """Numbers of the samples that reached a buffer with room for all."""
    section = {"buffer": {"capacity": 10_000}, "ratio": 0.0, "candidates": candidates}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for batch in batches:
            rehearsal.update(batch)
        buffer = rehearsal.buffer
    assert buffer is not None
    numbers: list[int] = buffer.sample(10_000)["number"].tolist()
    return sorted(numbers)


def test_all_samples_are_candidates_when_no_number_is_given() -> None:
    assert offered(None, [labelled(range(8)), labelled(range(8, 13))]) == list(range(13))


def test_all_samples_of_a_batch_smaller_than_the_number_of_candidates_are_candidates() -> None:
    assert offered(6, [labelled(range(4)), labelled(range(4, 10))]) == list(range(10))


def test_every_set_of_candidates_of_a_batch_has_the_same_chance() -> None:
    """All 15 pairs of a batch of 6, at every step."""
    by_step = defaultdict(list)
    for number in offered(2, [labelled(range(6 * step, 6 * step + 6)) for step in range(1500)]):
        by_step[number // 6].append(number % 6)
    pairs = [tuple(chosen) for chosen in by_step.values()]
    assert len(pairs) == 1500
    assert equally_likely(pairs, 15) > SIGNIFICANCE
