"""What a buffer knows of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.row_records import RowRecords
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import Float32Array

BATCH = {"task": torch.tensor([0]), "score": torch.tensor([0.5])}
JUDGED: dict[str, Any] = {"policy": "score", "score_by": "score"}
SLOTS, NO_OWNERS = np.array([0, 1]), np.array([0, 0])


def empty(content_bytes: int | None = None, **keys: Any) -> RowRecords:
    section = BufferConfig.model_validate({"capacity": 4, **keys})
    return RowRecords.empty(4, 0, KeysAndScores(RowLayout.infer(BATCH), section), content_bytes)


def column(*scores: float) -> Float32Array:
    return np.array(scores, dtype=np.float32).reshape(-1, 1)


@pytest.mark.parametrize("partition_by", [None, "task"])
def test_rows_have_partitions_where_the_config_names_a_key(partition_by: str | None) -> None:
    assert (empty(partition_by=partition_by).slot_index.partitions is None) == (partition_by is None)


def test_rows_have_scores_where_the_config_names_a_score() -> None:
    assert empty().slot_index.scores is None
    assert empty(**JUDGED).slot_index.scores is not None


def test_contents_are_known_where_duplicates_are_refused() -> None:
    assert empty().contents is None
    assert empty(content_bytes=16).contents is not None


def test_new_scores_count_once_they_are_settled() -> None:
    records = empty(**JUDGED)
    records.slot_index.record(SLOTS, NO_OWNERS, column(1, 2))
    scores = records.slot_index.scores
    assert scores is not None
    records.postpone_scores(np.array([1]), column(5))
    records.postpone_scores(np.array([1]), column(7))
    assert scores.stored[:2, 0].tolist() == [1, 2]
    records.settle_scores()
    assert scores.stored[:2, 0].tolist() == [1, 7]


def test_scores_of_rows_without_scores_are_ignored() -> None:
    records = empty()
    records.postpone_scores(SLOTS, None)
    records.settle_scores()


def test_a_row_whose_content_was_noted_is_a_duplicate() -> None:
    records, rows = empty(content_bytes=16), torch.arange(32, dtype=torch.uint8).view(2, 16)
    records.note_contents(SLOTS, rows)
    assert records.contents is not None
    again = rows[1:].clone()
    found = records.contents.duplicates(again, records.contents.hashes(again), lambda slots: rows[slots])
    assert found.tolist() == [True]


def test_contents_that_nobody_looks_for_are_not_noted() -> None:
    empty().note_contents(SLOTS, torch.zeros((2, 16), dtype=torch.uint8))
