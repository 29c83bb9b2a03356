"""Lists whose entries may be one row each are refused by name; fields in lists are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.buffer.rows.leaves import classify
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError


def image(height: int = 4, width: int = 4, channels: int = 3) -> Tensor:
    return torch.zeros(channels, height, width)


def rows(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([image()] * 8, "the batch is a list of 8 tensors alike"),
        ((image(), image()), "the batch is a list of 2 tensors alike"),
        ([image(4, 4), image(5, 4), image(4, 6)], "the batch is a list of 3 tensors alike"),
        ([image(channels=1)] * 3, "the batch is a list of 3 tensors alike"),
        ({"images": [image()] * 8}, "'images' is a list of 8 tensors alike"),
        ({"images": [image()] * 8, "epoch": 3, "name": "a"}, "'images' is a list of 8 tensors alike"),
        ({"images": [image()] * 8, "masks": [image()] * 8}, "'images' is a list of 8 tensors alike"),
        (([image()] * 8, [image()] * 8), "'0' is a list of 8 tensors alike"),
        ([rows(5)] * 8, "the batch is a list of 8 tensors alike"),
        ([rows(5, 2)] * 5, "the batch is a list of 5 tensors alike"),
        ([image().numpy()] * 8, "the batch is a list of 8 tensors alike"),
    ],
    ids=[
        "images", "tuple", "sizes", "one channel", "in a mapping", "beside values", "two lists", "nested", "vectors",
        "matrices", "arrays",
    ],
)  # fmt: skip
def test_a_batch_of_nothing_but_alike_tensors_in_a_list_is_refused(batch: Any, words: str) -> None:
    with pytest.raises(BatchError, match=rf"{words}, so each may be one row.*stack them.*rehearsal\.fields"):
        classify(flatten(batch), None)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ([rows(8, 3), rows(8)], 2),
        ([torch.zeros(8, 5, dtype=torch.int64)] * 3, 3),
        ([rows(8, 3, 4, 4), rows(8, 3, 4, 4)], 2),
        ([rows(8, 5, 2), rows(8, 5, 2)], 2),
        ([rows(8, 5)] * 6 + [torch.zeros(8, dtype=torch.int64)], 7),
        ({"views": [rows(8, 5)] * 6, "y": rows(8)}, 7),
        ([rows(4, 28, 28)], 1),
    ],
    ids=["pair", "token fields", "views", "sequences", "six and labels", "views and labels", "alone"],
)
def test_fields_in_a_list_are_taken(batch: Any, count: int) -> None:
    assert len(classify(flatten(batch), None).columns) == count


def test_named_fields_of_a_list_are_taken() -> None:
    assert len(classify(flatten([rows(5, 2)] * 6), [str(place) for place in range(6)]).columns) == 6


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_short_tuple_of_as_many_numbers_as_rows_is_refused_by_name(count: int) -> None:
    batch = {"x": rows(count, 5), "y": rows(count), "size": (224,) * count}
    with pytest.raises(BatchError, match=f"'size' is a tuple of {count} numbers in a batch of {count} rows.*a list"):
        classify(flatten(batch), None)
    named = classify(flatten(batch), ["x", "y"])
    assert named.passing == {"size": "not in rehearsal.fields"}


def test_a_short_tuple_passes_as_it_is_where_rows_are_more() -> None:
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 3}, LocalTransport()) as rehearsal:
        for size in (8, 8, 8, 8, 2):
            out = rehearsal.update({"x": rows(size, 5), "y": rows(size), "size": (224, 224)})
    assert out["size"] == (224, 224)
    assert len(out["x"]) == 5


def test_a_list_of_numbers_is_one_a_row() -> None:
    assert set(classify(flatten({"x": rows(2, 5), "y": [0, 1]}), None).columns) == {"x", "y"}
