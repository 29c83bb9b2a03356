"""The batch size is the length that most leaves have, unless another fits as well: then the batch is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.batch_size import batch_size, entries_of, holds_integers, size_of
from rehearsal_plugin.errors import BatchError


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


TIME_FIRST: dict[str, dict[str, Any]] = {
    "sequence, mask, label": {"x": floats(7, 4, 3), "mask": floats(7, 4), "y": floats(4)},
    "integers": {"ids": integers(7, 4), "mask": integers(7, 4), "y": integers(4)},
    "arrays": {"x": np.zeros((7, 4, 3)), "mask": np.zeros((7, 4)), "y": [0, 1, 2, 3]},
    "more leaves": {"x": floats(7, 4, 3), "a": floats(7, 4), "b": floats(7, 4), "c": floats(7, 4), "y": floats(4)},
    "times shared by all rows": {"x": floats(7, 4, 3), "mask": floats(7, 4), "times": floats(7), "y": floats(4)},
    "one sequence with its times": {"x": floats(7, 4, 3), "times": floats(7), "y": integers(4)},
    "as many of each": {"x": floats(7, 4), "z": floats(7, 4), "t": floats(7), "y": floats(4)},
    "lengths of token rows, or positions": {"ids": integers(8, 12), "labels": integers(8, 12), "p": integers(12)},
    "two labels": {"x": floats(7, 4), "z": floats(7, 4), "m": floats(7, 4), "y": floats(4), "w": floats(4)},
}


@pytest.mark.parametrize("name", TIME_FIRST)
def test_time_steps_that_outnumber_rows_are_no_batch_size(name: str) -> None:
    words = r"batch size cannot be told: \[.*\] have \d+ entries and .*dimension 1.*to dimension 0.*rehearsal\.fields"
    with pytest.raises(BatchError, match=words):
        batch_size(TIME_FIRST[name])


USUAL: dict[str, tuple[dict[str, Any], int]] = {
    "images and labels": ({"x": floats(8, 3, 4, 4), "y": integers(8)}, 8),
    "mean of each channel": ({"x": floats(8, 3, 4, 4), "y": integers(8), "mean": floats(3)}, 8),
    "mean of each feature": ({"x": floats(8, 3), "y": integers(8), "mean": floats(3)}, 8),
    "weights of classes": ({"x": floats(8, 3), "y": integers(8), "weights": floats(10)}, 8),
    "classes of one-hot labels": (
        {"x": floats(8, 3), "y": floats(8, 10), "id": integers(8), "weights": floats(10)},
        8,
    ),
    "tokens with lengths": (
        {"ids": integers(8, 12), "mask": integers(8, 12), "labels": integers(8, 12), "lengths": integers(8)},
        8,
    ),
    "scalars": ({"ids": integers(8, 12), "labels": integers(8, 12), "n": torch.tensor(3), "epoch": 2, "s": "a"}, 8),
    "square": ({"x": floats(4, 4), "y": floats(4)}, 4),
    "one row": ({"ids": integers(1, 5), "labels": integers(1, 5), "positions": integers(5)}, 1),
    "ragged list": ({"x": floats(3, 2), "y": floats(3, 2), "boxes.0": floats(5), "boxes.1": floats(2)}, 3),
    "table of another length": ({"x": floats(4, 3), "y": floats(4), "table": floats(9, 4)}, 4),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_batches_have_their_size(name: str) -> None:
    leaves, size = USUAL[name]
    assert batch_size(leaves) == size


@pytest.mark.parametrize("leaves", [{}, {"n": 3, "s": "a", "t": torch.tensor(1.0)}], ids=["none", "no entries"])
def test_a_batch_without_entries_is_refused(leaves: dict[str, Any]) -> None:
    with pytest.raises(BatchError, match="no tensor with a batch dimension"):
        batch_size(leaves)


@pytest.mark.parametrize(
    ("leaves", "size"),
    [
        ({"tokens": floats(8, 5), "margin": floats(4)}, 8),
        ({"margin": floats(4), "tokens": floats(8, 5)}, 8),
        ({"tokens": floats(8, 5), "margin": floats(4), "weight": floats(4)}, 8),
        ({"tokens": floats(8, 5), "table": floats(9), "margin": floats(4)}, 8),
        ({"tokens": floats(8), "labels": floats(8)}, 8),
        ({"tokens": floats(8, 4), "labels": floats(8, 4), "margin": floats(4)}, 8),
    ],
    ids=[
        "one of each",
        "the other order",
        "more samples than rows",
        "table",
        "rows alone",
        "square",
    ],
)
def test_leaves_of_samples_vote_for_their_rows(leaves: dict[str, Any], size: int) -> None:
    assert batch_size(leaves, rows_per_sample=2) == size


def test_without_samples_the_same_batch_is_a_tie() -> None:
    with pytest.raises(BatchError, match="cannot be told"):
        batch_size({"tokens": floats(8, 5), "margin": floats(4)})


def test_lengths_of_leaves() -> None:
    assert [entries_of(leaf) for leaf in (floats(3, 2), [1, 2], (1,), torch.tensor(1), "ab", range(3))] == [
        3, 2, 1, None, None, None,
    ]  # fmt: skip
    assert [size_of(leaf) for leaf in (floats(3, 2), "ab", range(3), object())] == [3, None, 3, None]


def test_integers_are_told_from_other_numbers() -> None:
    assert all(map(holds_integers, (integers(2), torch.ones(2, dtype=torch.bool), [1, 2], np.zeros(2, np.uint8))))
    assert not any(map(holds_integers, (floats(2), [0.5, 1], np.zeros(2), ["a"])))
