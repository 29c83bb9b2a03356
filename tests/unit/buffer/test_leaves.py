"""Which leaves of a batch are fields of a row: numbers in any form, the size that most have, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from rehearsal_plugin import LocalTransport, Rehearsal, RowLayout
from rehearsal_plugin.buffer.rows.leaves import as_column, classify, like
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError


@dataclass
class Box:
    corner: int


class Pair(NamedTuple):
    x: Any
    label: Any


def fields_of(batch: Any, only: list[str] | None = None) -> list[str]:
    return list(classify(flatten(batch), only).columns)


def rows(count: int, width: int = 2) -> Tensor:
    return torch.zeros(count, width)


# The batch size


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"table": rows(9), "x": rows(4), "y": rows(4)}, ["x", "y"]),
        ({"x": rows(1), "y": rows(1), "table": rows(9)}, ["x", "y"]),
        ({"x": rows(4), "y": [1, 2, 3, 4], "table": rows(9)}, ["x", "y"]),
        ({"x": rows(4), "y": np.zeros(4), "epoch": 3, "name": "a", "scale": torch.tensor(1.0)}, ["x", "y"]),
        (
            {"x": rows(4), "views": [rows(4), rows(4), rows(4)], "table": rows(9)},
            ["x", "views.0", "views.1", "views.2"],
        ),
        ({"x": rows(4), "y": rows(4), "pyramid": [rows(9), rows(9), rows(9)]}, ["x", "y"]),
        ((rows(2), rows(2)), ["0", "1"]),
        ({"batch": (rows(2), rows(2))}, ["batch.0", "batch.1"]),
        ({"x": rows(0), "y": []}, ["x"]),
    ],
    ids=[
        "table first",
        "one row",
        "list",
        "array",
        "views",
        "pyramid",
        "tuple of two rows",
        "two tensors of two rows",
        "no rows",
    ],
)
def test_fields_are_the_leaves_of_the_length_that_most_have(batch: Any, names: list[str]) -> None:
    assert fields_of(batch) == names


@pytest.mark.parametrize(
    "batch",
    [
        {"x": rows(4), "table": rows(9)},
        {"x": rows(8), "scale": torch.zeros(1)},
        {"x": rows(8), "boxes": [rows(5) for _ in range(3)]},
        {"a": rows(3), "b": rows(3), "c": rows(5), "d": rows(5)},
    ],
    ids=["two leaves", "one entry", "list against leaf", "two against two"],
)
def test_a_batch_whose_size_cannot_be_told_is_refused_with_the_cure(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"batch size cannot be told: \[.*\] have \d+ entries.*rehearsal\.fields"):
        fields_of(batch)


def test_named_fields_settle_it() -> None:
    assert fields_of({"x": rows(4), "table": rows(9)}, ["x"]) == ["x"]


# One entry a row, and no number


@pytest.mark.parametrize(
    ("leaf", "what"),
    [
        (["a", "b", "c"], "a list of str"),
        (("a", "b", "c"), "a tuple of str"),
        ([object()] * 3, "a list of object"),
        ([None, None, None], "a list of NoneType"),
        (np.array(["a", "b", "c"]), "an array of <U1"),
        (np.array([Box(1), Box(2), Box(3)]), "an array of object"),
        ({"a", "b", "c"}, "a set"),
        (range(3), "a range"),
    ],
    ids=["list", "tuple", "objects", "nothing", "array of strings", "array of objects", "set", "range"],
)
def test_values_of_each_row_that_are_no_numbers_are_refused_by_name(leaf: Any, what: str) -> None:
    with pytest.raises(BatchError, match=rf"'meta' is {what} with one entry a row.*encode it as numbers"):
        fields_of({"x": rows(3), "y": rows(3), "meta": leaf})


@pytest.mark.parametrize(
    "leaf",
    [
        [rows(5), rows(2), rows(7)],
        [Box(1), Box(2), Box(3)],
        [{"box": rows(5)}, {"box": rows(2)}, {"box": rows(7)}],
        [[1, 2], [3], [4]],
        [[1, 2, 3], [3, 4, 5], [4, 5, 6]],
    ],
    ids=["tensors", "dataclasses", "mappings", "lists", "square lists"],
)
def test_a_list_with_one_container_or_tensor_a_row_is_refused_by_name(leaf: Any) -> None:
    with pytest.raises(BatchError, match="'targets' is a list of 3 entries in a batch of 3 rows"):
        fields_of({"x": rows(3), "y": rows(3), "targets": leaf})


@dataclass(frozen=True)
class Sample:
    x: Tensor
    label: Tensor
    name: str = "a"


def test_the_fields_of_a_dataclass_are_leaves() -> None:
    assert fields_of({"sample": Sample(rows(4), rows(4))}) == ["sample.x", "sample.label"]


def test_a_dataclass_comes_back_with_replayed_rows() -> None:
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 3}, LocalTransport()) as rehearsal:
        for step in range(6):
            ids = torch.arange(8) + 8 * step
            out = rehearsal.update({"sample": Sample(ids.float(), ids, f"step {step}")})["sample"]
    assert isinstance(out, Sample)
    assert out.x.tolist() == out.label.tolist()
    assert (len(out.x), out.name) == (11, "step 5")


# Rows that do not lie apart


def det(count: int) -> list[dict[str, Any]]:
    return [{"image": torch.zeros(3, 4, 4), "height": 4} for _ in range(count)]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (det(8), r"^the batch is a list of 8 mappings with the same keys"),
        ({"inputs": det(8)}, r"'inputs' is a list of 8 mappings with the same keys"),
        ({"x": rows(1), "y": rows(1), "boxes": [rows(5, 4)]}, r"'boxes' is a list of 1 entries in a batch of 1 rows"),
        (
            {"x": rows(1), "y": rows(1), "targets": [{"boxes": rows(5, 4)}]},
            r"'targets' is a list of 1 entries in a batch of 1 rows",
        ),
        (
            {"x": pack_padded_sequence(rows(5, 4), torch.tensor([4, 3, 2, 2, 1]), batch_first=True), "y": rows(5)},
            "'x' is a PackedSequence, in which rows do not lie apart",
        ),
        (
            {"x": torch.nested.nested_tensor([rows(2), rows(3)], layout=torch.jagged), "y": rows(2)},
            "'x' is a nested tensor",
        ),
        ({"graph": SimpleNamespace(nodes={"x": rows(4)}), "y": rows(4)}, "'graph' is a SimpleNamespace"),
        (
            {"x": rows(4), "y": rows(4), "positions": torch.zeros(3, 4, 7)},
            r"'positions' has shape \(3, 4, 7\) in a batch of 4 rows",
        ),
        (
            {"x": rows(4), "y": rows(4), "cache": torch.zeros(3, 4, 7, 5)},
            r"'cache' has shape \(3, 4, 7, 5\) in a batch of 4 rows",
        ),
        (
            {"tokens": torch.zeros(7, 4, dtype=torch.int64), "y": rows(4), "length": rows(4)},
            r"'tokens' has shape \(7, 4\) in a batch of 4 rows",
        ),
        ({"x": rows(4), "y": [1, None, 2, 3]}, "'y' is a list of NoneType and int with one entry a row"),
        (
            {"x": rows(4), "y": rows(4), "m": np.ma.array(np.zeros(4), mask=[False, True, False, False])},
            "'m' is a MaskedArray with",
        ),
    ],
    ids=[
        "mappings",
        "inner mappings",
        "one row, tensors",
        "one row, mappings",
        "packed",
        "nested",
        "object",
        "dimension 1",
        "dimension 1 of four",
        "tokens",
        "gap",
        "masked array",
    ],
)
def test_rows_that_do_not_lie_apart_are_refused_by_name(batch: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        fields_of(batch)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (([{"ids": rows(8), "mask": rows(8)}, {"ids": rows(8, 7), "mask": rows(8, 7)}], rows(8)), 5),
        (({"ids": rows(8)}, {"labels": rows(8)}), 2),
        (({"a": (rows(4), rows(4))}, 0, 0), 2),
        ((rows(3), rows(3), None), 2),
        ((rows(1), rows(1), None), 2),
        ({"x": rows(4), "table": torch.zeros(3, 4), "config": SimpleNamespace(rate=0.1)}, 1),
    ],
    ids=["views", "two mappings", "loaders", "none of three", "one row", "table"],
)
def test_usual_batches_are_not_refused(batch: Any, count: int) -> None:
    if count == 1:
        batch = {**batch, "y": rows(4)}
        count = 2
    assert len(fields_of(batch)) == count


def test_a_table_as_wide_as_the_batch_passes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert fields_of({"x": rows(4), "y": rows(4), "table": torch.zeros(3, 4)}) == ["x", "y"]
    (message,) = caplog.messages
    assert message.startswith("batch field 'table' has shape (3, 4) in a batch of 4 rows and is taken for a table")


def test_what_a_dataclass_made_of_its_fields_follows_its_rows() -> None:
    @dataclass
    class Weighted:
        x: Tensor

        def __post_init__(self) -> None:
            self.twice = 2 * self.x

    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 3}, LocalTransport()) as rehearsal:
        for step in range(6):
            out = rehearsal.update(Weighted(torch.arange(8.0) + 8 * step))
    assert out.twice.tolist() == (2 * out.x).tolist()
    assert len(out.x) == 11


@pytest.mark.parametrize("cls", [Sample, Pair])
def test_a_hidden_field_never_reaches_the_model(cls: Any) -> None:
    section = {"buffer": {"capacity": 100}, "hidden": ["label" if cls is Sample else "1"]}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        out = rehearsal.update(cls(rows(4), rows(4)))
    assert out.label is None


# Later batches


def later(first: Any, batch: Any) -> str:
    with pytest.raises(BatchError) as caught:
        RowLayout.infer(first).columns(batch)
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [rows(8), np.zeros(8), list(range(8)), ["a"] * 8, range(8)],
    ids=["tensor", "array", "numbers", "strings", "object"],
)
@pytest.mark.parametrize("first", [None, torch.tensor(1.0), "a", 3], ids=["none", "scalar", "string", "number"])
def test_a_leaf_that_has_one_entry_a_row_only_later_is_refused_by_name(first: Any, value: Any) -> None:
    message = later({"x": rows(8), "y": rows(8), "mask": first}, {"x": rows(8), "y": rows(8), "mask": value})
    assert message.startswith("batch field 'mask' was a value without entries in the first batch")


@pytest.mark.parametrize(
    "value", [["a"] * 8, list(range(8)), [rows(3)] * 8, range(8)], ids=["strings", "numbers", "tensors", "object"]
)
def test_a_new_leaf_with_one_entry_a_row_is_refused_by_name(value: Any) -> None:
    assert "'new'" in later({"x": rows(8), "y": rows(8)}, {"x": rows(8), "y": rows(8), "new": value})


@pytest.mark.parametrize("count", [0, 11], ids=["fewer", "more"])
def test_a_tensor_of_another_length_than_in_the_first_batch_is_no_table(count: int) -> None:
    first = {"x": rows(4), "y": rows(4), "boxes": rows(9)}
    assert later(first, {"x": rows(4), "y": rows(4), "boxes": rows(count)}).startswith(
        f"batch field 'boxes' had 9 entries in the first batch and has {count} in this one of 4 rows"
    )
    named = RowLayout.infer(first, ["x", "y"])
    assert len(named.columns({"x": rows(4), "y": rows(4), "boxes": rows(count)})) == 2


def test_a_table_keeps_its_length_and_passes() -> None:
    layout = RowLayout.infer({"x": rows(4), "y": rows(4), "table": rows(9)})
    assert len(layout.columns({"x": rows(9), "y": rows(9), "table": rows(9)})) == 2


# Numbers in any form follow their rows


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, lambda ids: np.array(ids, dtype=np.float32), lambda ids: [i + 0.5 for i in ids]],
    ids=["list", "tuple", "array", "float32", "floats"],
)
def test_numbers_of_each_row_stay_with_it_and_keep_their_form(make: Any, mode: str) -> None:
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 3, "mode": mode}, LocalTransport()) as rehearsal:
        for step in range(6):
            ids = list(range(8 * step, 8 * step + 8))
            out = rehearsal.update({"x": torch.tensor(ids).float(), "y": make(ids)})
    assert type(out["y"]) is type(make([1, 2]))
    assert len(out["y"]) == (11 if mode == "append" else 8)
    assert [int(value) for value in out["y"]] == out["x"].tolist()
    if isinstance(out["y"], np.ndarray):
        assert out["y"].dtype == make([1]).dtype


@pytest.mark.parametrize("leaf", [[1, 2], (1.5, 2.5), np.arange(3), [True, False], torch.zeros(2)], ids=repr)
def test_a_column_goes_back_to_the_form_of_its_leaf(leaf: Any) -> None:
    column = as_column(leaf)
    assert column is not None
    again = like(column, leaf)
    assert type(again) is type(leaf)
    assert list(again) == list(leaf)


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0)[::-1], np.arange(6, dtype=">i4"), np.broadcast_to(np.arange(2.0), (3, 2))],
    ids=["reversed", "big endian", "read-only"],
)
def test_an_array_that_torch_cannot_view_is_copied(array: Any, recwarn: pytest.WarningsRecorder) -> None:
    column = as_column(array)
    assert column is not None
    assert column.tolist() == array.tolist()
    assert not recwarn.list


def test_numbers_that_torch_lacks_are_no_column() -> None:
    assert as_column(np.array(["2020-01-01"], dtype="datetime64[D]")) is None
    assert as_column([[1], [2, 3]]) is None


@pytest.mark.parametrize(
    ("name", "leaf", "warned"),
    [
        ("pixels", np.zeros((64, 12)), True),
        ("mask", torch.ones(1, 1, 6, 6), True),
        ("table", torch.zeros(9, 6), False),
        ("weights", torch.zeros(8), True),
        ("weights", torch.zeros(9), False),
        ("positions", torch.zeros(1, 6, dtype=torch.int64), False),
    ],
)
def test_what_may_have_several_entries_a_row_passes_with_a_warning(
    name: str, leaf: object, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert fields_of({"x": rows(4), "y": rows(4), name: leaf}) == ["x", "y"]
    told = [message for message in caplog.messages if message.startswith(f"batch field '{name}' has shape")]
    assert [("if it belongs to them" in message) for message in told] == [True] * warned


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (torch.zeros(5, 3, 2, 2), r"has shape \(5, 3, 2, 2\) in a batch of 4 rows, so"),  # boxes are the rows
        (np.zeros((8, 3, 2, 2)), "2 entries for each"),
        (torch.zeros(8, 6, dtype=torch.int64), "2 entries for each"),  # passages of each query
        (torch.zeros(12, dtype=torch.int64), "3 entries for each"),  # labels of all tokens in one line
    ],
)
def test_what_belongs_to_rows_without_one_entry_for_each_is_refused(leaf: object, words: str) -> None:
    with pytest.raises(BatchError, match=rf"'others' .*{words}.*rows_per_sample.*rehearsal\.fields"):
        fields_of({"x": rows(4), "y": rows(4), "others": leaf})
    assert RowLayout.infer({"x": rows(4), "others": leaf}, ["x"]).names == ("x",)


def test_one_entry_a_sample_of_several_rows_is_not() -> None:
    pictures = torch.zeros(4, 3, 2, 2)
    assert classify(flatten({"x": rows(8), "pictures": pictures}), None, 2).lengths == {"pictures": 4}


def test_what_may_belong_to_a_single_row_passes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert fields_of({"x": rows(1), "y": rows(1), "pictures": torch.zeros(3, 12)}) == ["x", "y"]
    assert "'pictures' has shape (3, 12) in a batch of 1 row, and passes through unreplayed" in caplog.text
