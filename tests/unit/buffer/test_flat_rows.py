"""Which batches are flat rows of documents, and what tells where these lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsal_plugin.buffer.rows.flat_rows import boundaries_of, has_documents, lengths_of, rows_of, stand_alone
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError
from tests.unit.buffer.test_documents import flat_row


def test_what_tells_no_documents_is_left_to_rows() -> None:
    row = {name: leaf for name, leaf in flat_row([3, 2]).items() if name in ("input_ids", "labels", "position_ids")}
    assert has_documents(flatten(row))
    assert lengths_of(flatten(row)).tolist() == [3, 2]
    assert not has_documents(flatten({**row, "attention_mask": torch.ones(1, 5)}))  # its tokens see all documents
    assert not has_documents(flatten({name: leaf.repeat(2, 1) for name, leaf in row.items()}))
    assert not has_documents(flatten({"input_ids": row["input_ids"]}))
    several = {"input_ids": row["input_ids"].repeat(4, 1), "position_ids": row["position_ids"]}
    assert not has_documents(flatten(several))  # the positions of every row


@pytest.mark.parametrize(
    ("positions", "rows", "alone"),
    [([[0, 1, 2, 0, 1]], 1, False), ([[0, 1, 2, 3, 4]], 1, True), ([[0, 1, 2], [0, 1, 2]], 2, True)],
)
def test_rows_of_one_document_may_be_no_flat_rows(positions: list[list[int]], rows: int, alone: bool) -> None:
    batch = flatten({"input_ids": torch.tensor(positions), "position_ids": torch.tensor(positions)})
    assert rows_of(batch) == rows
    assert stand_alone(batch, lengths_of(batch)) == alone


def test_boundaries_for_kernels_say_that_a_row_is_flat() -> None:
    batch = flatten(flat_row([4]))
    assert boundaries_of(batch) == ["cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"]
    assert not stand_alone(batch, lengths_of(batch))


@pytest.mark.parametrize("positions", [[[0, 1, 0], [0, 1, 2]], [[0, 1], [1, 2]], [[0, 1, 2, 2]]])
def test_rows_that_do_not_count_from_0_each_are_refused(positions: Any) -> None:
    batch = flatten({"input_ids": torch.tensor(positions), "position_ids": torch.tensor(positions)})
    with pytest.raises(BatchError, match="do not tell alike"):
        lengths_of(batch)
