"""Empty buffers that are filled: with the state of another, or with rows of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer import storage
from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig

LAYOUT = RowLayout.infer({"number": torch.tensor([0]), "task": torch.tensor([0])})
RANKS = np.array([0, 1, 1], dtype=np.int32)


def batch_of(numbers: list[int]) -> dict[str, Tensor]:
    return {"number": torch.tensor(numbers), "task": torch.tensor(numbers) % 2}


def make(capacity: int = 5, **keys: Any) -> RehearsalBuffer:
    return RehearsalBuffer(BufferConfig.model_validate({"capacity": capacity, **keys}), LAYOUT)


def packed(numbers: list[int]) -> Tensor:
    rows = torch.zeros((len(numbers), LAYOUT.row_bytes), dtype=torch.uint8)
    LAYOUT.pack(LAYOUT.columns(batch_of(numbers)), rows)
    return rows


def numbers_in(buffer: RehearsalBuffer) -> list[int]:
    listed: list[int] = LAYOUT.field("number").view(buffer.state_dict()["rows"]).tolist()
    return listed


def adopting(offered: dict[int, int], **keys: Any) -> RehearsalBuffer:
    """A buffer with rows 7, 8 and 10, admitted in steps 3, 4 and 4."""
    buffer = make(**keys)
    buffer.adopt([packed([7, 8]), packed([10])], np.array([3, 4, 4]), RANKS, offered)
    return buffer


@pytest.mark.parametrize("chunk", [1, 3 * LAYOUT.row_bytes, 4 << 20], ids=["row by row", "in parts", "at once"])
def test_a_loaded_buffer_goes_on_as_the_saved_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", chunk)
    saved, loaded = make(partition_by="task"), make(partition_by="task")
    saved.offer(batch_of(list(range(12))))
    loaded.load_state_dict(saved.state_dict())
    for buffer in (saved, loaded):
        buffer.offer(batch_of(list(range(20, 30))))
    assert numbers_in(loaded) == numbers_in(saved)
    assert loaded.sample(3)["number"].tolist() == saved.sample(3)["number"].tolist()


def test_a_loaded_buffer_knows_its_duplicates() -> None:
    saved, loaded = make(deduplicate=True), make(deduplicate=True)
    saved.offer(batch_of([1, 2, 3]))
    loaded.load_state_dict(saved.state_dict())
    assert loaded.offer(batch_of([3, 1])) == 0


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("rows", torch.zeros((2, LAYOUT.row_bytes), dtype=torch.uint8), "rows of shape"),
        ("rows", torch.zeros((3, 16), dtype=torch.uint8), "rows of shape"),
        ("written", np.array([1]), "1 steps of 3 rows"),
        ("origin", np.array([1], dtype=np.int32), "3 steps and 1 ranks"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(name: str, wrong: object, message: str) -> None:
    saved = make()
    saved.offer(batch_of([1, 2, 3]))
    with pytest.raises(ValueError, match=message):
        make().load_state_dict(saved.state_dict() | {name: wrong})


def test_adopted_rows_lie_in_their_order_with_their_step_and_rank() -> None:
    buffer = adopting({0: 100})
    assert numbers_in(buffer) == [7, 8, 10]
    assert buffer.written(np.arange(3)).tolist() == [3, 4, 4]
    assert buffer.origin(np.arange(3)).tolist() == RANKS.tolist()


def test_adopted_rows_are_found_by_their_partition() -> None:
    buffer = adopting({0: 60, 1: 40}, partition_by="task")
    assert dict(zip(*(listed.tolist() for listed in buffer.counts()), strict=True)) == {0: 2, 1: 1}


def test_offers_before_the_adoption_count() -> None:
    buffer = adopting({0: 60, 1: 40}, partition_by="task")
    partitions = buffer.slot_index.partitions
    assert partitions is not None
    assert dict(zip(partitions.keys.tolist(), partitions.offered.tolist(), strict=True)) == {0: 60, 1: 40}
    assert buffer.slot_index.offered == 100


def test_every_adopted_row_was_offered_at_least_once() -> None:
    buffer = adopting({}, partition_by="task")
    partitions = buffer.slot_index.partitions
    assert partitions is not None
    assert partitions.offered.tolist() == partitions.sizes.tolist()
    assert buffer.slot_index.offered == 3


def test_adopted_rows_are_known_as_duplicates() -> None:
    assert adopting({}, deduplicate=True).offer(batch_of([10, 7])) == 0


def test_a_step_must_be_given_for_every_adopted_row() -> None:
    with pytest.raises(ValueError, match="2 steps of 3 rows"):
        make().adopt([packed([1, 2, 3])], np.array([0, 0]), RANKS[:2], {})
