"""Rows with new values in some fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.field_updates import updated_rows
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import BatchError

BATCH = {"x": torch.arange(8.0).view(4, 2), "y": torch.arange(4)}
LAYOUT = RowLayout.infer(BATCH).with_state({"seen": torch.zeros(4)})


@pytest.fixture
def stored() -> Tensor:
    """Rows 0 to 3 at the slots of their numbers."""
    rows = torch.zeros((4, LAYOUT.row_bytes), dtype=torch.uint8)
    for name, column in BATCH.items():
        LAYOUT.field(name).view(rows).copy_(column)
    return rows


def update(stored: Tensor, slots: list[int], values: dict[str, Tensor]) -> tuple[IntArray, Tensor]:
    return updated_rows(LAYOUT, np.array(slots, dtype=np.int64), values, lambda at: stored[torch.from_numpy(at)])


def test_a_field_has_its_new_values_and_the_others_keep_theirs(stored: Tensor) -> None:
    slots, rows = update(stored, [3, 1], {"y": torch.tensor([30, 10])})
    assert slots.tolist() == [3, 1]
    assert LAYOUT.field("y").view(rows).tolist() == [30, 10]
    assert LAYOUT.field("x").view(rows).tolist() == [[6, 7], [2, 3]]


def test_state_is_updated_as_fields_are(stored: Tensor) -> None:
    _, rows = update(stored, [2], {"seen": torch.tensor([0.5])})
    assert LAYOUT.field("seen").view(rows).tolist() == [0.5]


def test_the_last_of_several_values_for_a_row_counts(stored: Tensor) -> None:
    slots, rows = update(stored, [1, 2, 1], {"y": torch.tensor([7, 8, 9])})
    assert dict(zip(slots.tolist(), LAYOUT.field("y").view(rows).tolist(), strict=True)) == {1: 9, 2: 8}


def test_no_rows_are_updated_by_no_values(stored: Tensor) -> None:
    slots, rows = update(stored, [], {"y": torch.empty(0, dtype=torch.int64)})
    assert (len(slots), len(rows)) == (0, 0)


@pytest.mark.parametrize(
    "values",
    [{"z": torch.zeros(1)}, {"y": torch.zeros(1)}, {"y": torch.zeros(2, dtype=torch.int64)}],
    ids=["no such field", "another dtype", "another size"],
)
def test_a_value_that_does_not_fit_is_refused_before_a_row_is_read(values: dict[str, Tensor]) -> None:
    def read_rows(slots: IntArray) -> Tensor:
        raise AssertionError("read")

    with pytest.raises(BatchError):
        updated_rows(LAYOUT, np.array([0]), values, read_rows)
