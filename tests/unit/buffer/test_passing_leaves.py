"""Leaves that pass through are refused once they look like a field."""

from __future__ import annotations

import pytest
import torch

from rehearsal_plugin.buffer.rows.passing_leaves import refuse_entries_of_rows
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError


def test_leaves_as_in_the_first_batch_pass() -> None:
    batch = flatten({"table": torch.zeros(7), "scale": 2.0, "x": torch.zeros(4)})
    refuse_entries_of_rows(batch, 4, {"table": 7, "scale": None})


@pytest.mark.parametrize(
    ("length", "words"),
    [(None, "a value without entries"), (3, "of 3 entries")],
)
def test_one_entry_a_row_is_refused(length: int | None, words: str) -> None:
    with pytest.raises(BatchError, match=f"'w' was {words} in the first batch"):
        refuse_entries_of_rows(flatten({"w": torch.zeros(4)}), 4, {"w": length})


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(BatchError, match="'w' had 3 entries in the first batch and has 5 in this one of 4 rows"):
        refuse_entries_of_rows(flatten({"w": torch.zeros(5)}), 4, {"w": 3})
