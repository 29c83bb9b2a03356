"""Partition keys and scores, read from packed rows or from columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.errors import BatchError

Batch = dict[str, Tensor]


def batch_of(key: torch.dtype = torch.int64, score: torch.dtype = torch.float32) -> Batch:
    return {
        "x": torch.ones(3, 2),
        "task": torch.tensor([2, 0, 2]).to(key),
        "score": torch.tensor([0.5, 1.5, -2.0]).to(score),
        "features": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    }


def reader(batch: Batch, **keys: Any) -> KeysAndScores:
    section = BufferConfig.model_validate({"capacity": 10, **keys})
    return KeysAndScores(RowLayout.infer(batch), section)


def packed(batch: Batch) -> Tensor:
    layout = RowLayout.infer(batch)
    rows = torch.zeros((3, layout.row_bytes), dtype=torch.uint8)
    layout.pack(layout.columns(batch), rows)
    return rows


JUDGED = {"policy": "score", "score_by": "score"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.uint16], ids=str)
def test_keys_are_64_bit_integers_whatever_the_field(dtype: torch.dtype) -> None:
    batch = batch_of(key=dtype)
    keys = reader(batch, partition_by="task").keys(packed(batch))
    assert keys.dtype == np.int64
    assert keys.tolist() == batch["task"].to(torch.int64).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scores_are_single_precision_whatever_the_field(dtype: torch.dtype) -> None:
    batch = batch_of(score=dtype)
    scores = reader(batch, **JUDGED).scores(packed(batch))
    assert scores is not None
    assert scores.dtype == np.float32
    assert scores.tolist() == [[0.5], [1.5], [-2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_give_what_packed_rows_give(dtype: torch.dtype) -> None:
    batch = batch_of(score=dtype)
    both = reader(batch, partition_by="task", **JUDGED)
    columns = RowLayout.infer(batch).columns(batch)
    np.testing.assert_equal(both.of_columns(columns), both.of_rows(packed(batch)))


def test_a_column_with_a_history_is_read() -> None:
    batch = batch_of()
    batch["score"].requires_grad_()
    both = reader(batch, **JUDGED)
    scores = both.of_columns(RowLayout.infer(batch).columns(batch))[1]
    assert scores is not None
    assert scores[:, 0].tolist() == [0.5, 1.5, -2.0]


def test_features_are_as_wide_as_their_field() -> None:
    batch = batch_of()
    both = reader(batch, policy="herding", score_by="features")
    scores = both.scores(packed(batch))
    assert (both.width, both.features) == (2, True)
    assert scores is not None
    assert scores.tolist() == batch["features"].tolist()


def test_a_score_that_is_no_number_becomes_one() -> None:
    batch = batch_of()
    batch["score"][:2] = torch.tensor([torch.nan, torch.inf])
    scores = reader(batch, **JUDGED).scores(packed(batch))
    assert scores is not None
    assert scores[:, 0].tolist() == [0, 1e9, -2]


def test_without_a_key_and_a_score_keys_are_zeros_and_scores_none() -> None:
    batch = batch_of()
    both = reader(batch)
    assert (both.key_field, both.score_field, both.width) == (None, None, 0)
    keys, scores = both.of_rows(packed(batch))
    assert (keys.tolist(), scores) == ([0, 0, 0], None)


def test_a_key_that_is_no_integer_is_refused() -> None:
    with pytest.raises(BatchError, match=r"partition_by names 'features'.*one integer a sample"):
        reader(batch_of(), partition_by="features")


@pytest.mark.parametrize(("name", "reason"), [("task", "floating-point"), ("features", "one number a sample")])
def test_a_score_that_is_no_number_a_sample_is_refused(name: str, reason: str) -> None:
    with pytest.raises(BatchError, match=rf"score_by names '{name}'.*{reason}"):
        reader(batch_of(), policy="score", score_by=name)


@pytest.mark.parametrize("key", ["partition_by", "score_by"])
def test_the_key_that_names_a_missing_field_is_told(key: str) -> None:
    keys = {"policy": "score", "score_by": "scores"} if key == "score_by" else {"partition_by": "domain"}
    with pytest.raises(BatchError, match=rf"has no field '\w+', which rehearsal\.buffer\.{key} names; it has \['x'"):
        reader(batch_of(), **keys)


def test_fields_of_a_tuple_are_said_to_be_called_by_their_place() -> None:
    layout = RowLayout.infer((torch.ones(3, 2), torch.ones(3)))
    with pytest.raises(BatchError, match=r"it has \['0', '1'\] \(entries of a tuple are called by their place\)"):
        KeysAndScores(layout, BufferConfig(capacity=10, partition_by="label"))
