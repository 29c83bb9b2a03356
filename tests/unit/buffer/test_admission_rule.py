"""Decisions on offered rows: by the policy, recorded in the index, without duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.admission_rule import AdmissionRule
from rehearsal_plugin.buffer.dedup import DUPLICATE
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.policies import Offer, fifo
from rehearsal_plugin.buffer.row_records import RowRecords
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, RandomStream

CAPACITY = 4


class Job:
    """A rule with the records and the rows that it decides on, of fields `task` and `score`."""

    def __init__(self, deduplicate: bool = False, policy: Any = fifo, rank: int = 0) -> None:
        section = BufferConfig(capacity=CAPACITY, partition_by="task", policy="score", score_by="score")
        self.layout = RowLayout.infer(batch_of([0]))
        keys_and_scores = KeysAndScores(self.layout, section)
        content_bytes = self.layout.row_bytes if deduplicate else None
        self.records = RowRecords.empty(CAPACITY, rank, keys_and_scores, content_bytes)
        self.rule = AdmissionRule(policy, keys_and_scores, RandomStream(0, Purpose.ADMISSION), rank)
        self.stored = torch.zeros((CAPACITY, self.layout.row_bytes), dtype=torch.uint8)

    def admit(self, numbers: list[int], step: int = 0) -> list[int]:
        rows = torch.zeros((len(numbers), self.layout.row_bytes), dtype=torch.uint8)
        self.layout.pack(self.layout.columns(batch_of(numbers)), rows)
        slots = self.rule.admit_rows(self.records, rows, step, lambda at: self.stored[torch.from_numpy(at)])
        self.stored[torch.from_numpy(slots[slots >= 0])] = rows[torch.from_numpy(slots >= 0)]
        return list(slots.tolist())


def batch_of(numbers: list[int]) -> dict[str, Tensor]:
    number = torch.tensor(numbers, dtype=torch.int64)
    return {"task": number % 3, "score": number.float()}


def test_rows_go_where_the_policy_puts_them() -> None:
    job = Job()
    assert job.admit([10, 11, 12]) == [0, 1, 2]
    assert job.admit([13, 14]) == [3, 0]


def test_decisions_are_recorded_with_owner_score_and_step() -> None:
    job = Job()
    job.admit([1, 2], step=7)
    partitions, scores = job.records.slot_index.partitions, job.records.slot_index.scores
    assert partitions is not None
    assert scores is not None
    assert dict(zip(partitions.keys.tolist(), partitions.sizes.tolist(), strict=True)) == {1: 1, 2: 1}
    assert scores.stored[:2, 0].tolist() == [1, 2]
    assert job.records.admissions.steps(slice(2)).tolist() == [7, 7]


def test_columns_are_decided_on_as_packed_rows_are() -> None:
    packed, columns = Job(), Job()
    slots = packed.admit([1, 2, 5])
    decided, kept = columns.rule.admit_columns(columns.records, columns.layout.columns(batch_of([1, 2, 5])), 0)
    assert decided.tolist() == kept.tolist() == slots
    np.testing.assert_equal(columns.records.slot_index.state_dict(), packed.records.slot_index.state_dict())


def test_duplicates_are_not_offered() -> None:
    job = Job(deduplicate=True)
    assert job.admit([1, 2]) == [0, 1]
    assert job.admit([2, 3, 3, 1]) == [DUPLICATE, 2, DUPLICATE, DUPLICATE]
    assert job.records.slot_index.offered == 3


def test_a_row_that_has_left_is_new_again() -> None:
    job = Job(deduplicate=True)
    job.admit([0, 1, 2, 3])
    assert job.admit([4]) == [0]
    assert job.admit([0]) == [1]


@pytest.mark.parametrize(
    ("steps", "ranks", "same"), [((3, 3), (1, 1), True), ((3, 4), (1, 1), False), ((3, 3), (1, 2), False)]
)
def test_random_numbers_are_those_of_the_step_and_the_rank(
    steps: tuple[int, int], ranks: tuple[int, int], same: bool
) -> None:
    def numbers(slot_index: SlotIndex, offer: Offer, rng: np.random.Generator) -> IntArray:
        drawn.append(float(rng.random()))
        return np.full(len(offer), -1)

    drawn: list[float] = []
    for step, rank in zip(steps, ranks, strict=True):
        Job(policy=numbers, rank=rank).admit([1], step)
    assert (drawn[0] == drawn[1]) == same
