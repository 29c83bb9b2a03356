"""What becomes of a batch: rows behind it, in its nesting, and nothing where there are none."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.batch_augmenter import check_room
from tests.helpers.samples import intact, new_batch

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 3}


def run(batches: list[Any], **keys: Any) -> list[Any]:
    """What the model sees of each batch."""
    with Rehearsal({**SECTION, **keys}, LocalTransport()) as rehearsal:
        return [rehearsal.update(batch) for batch in batches]


def test_a_batch_without_replayed_rows_is_the_batch_itself() -> None:
    first = new_batch(0, 0, 6)
    assert run([first])[0] is first


def test_replayed_rows_stand_behind_the_batchs_own() -> None:
    *_, last = run([new_batch(0, step, 6) for step in range(6)])
    assert torch.equal(last["id"][:6], new_batch(0, 5, 6)["id"])
    assert len(last["id"]) == 9
    assert intact(last)


def test_what_is_no_field_is_that_of_the_batch() -> None:
    *_, last = run([{**new_batch(0, step, 6), "epoch": step, "table": torch.full((2,), step)} for step in range(6)])
    assert last["epoch"] == 5
    assert last["table"].tolist() == [5, 5]


Pair = collections.namedtuple("Pair", "inputs targets")


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: [rows, rows + 1],
        lambda rows: (rows, {"deep": [rows + 1]}),
        lambda rows: Pair(rows, rows + 1),
        lambda rows: collections.UserDict({"inputs": rows}),
        lambda rows: rows,
    ],
    ids=["list", "tuple", "namedtuple", "mapping", "tensor"],
)
def test_a_batch_keeps_its_nesting(make: Any) -> None:
    *_, last = run([make(torch.arange(6.0)) for _ in range(6)])
    assert type(last) is type(make(torch.zeros(1)))
    assert {len(leaf) for leaf in flatten(last).leaves} == {9}


def test_a_flat_batch_comes_back_in_its_nesting() -> None:
    *_, last = run([flatten({"x": torch.arange(6.0)}) for _ in range(6)])
    assert len(last["x"]) == 9


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_the_model_does_not_get_hidden_fields(mode: str) -> None:
    *_, last = run(
        [{**new_batch(0, step, 6), "domain": torch.ones(6)} for step in range(6)], hidden=["domain"], mode=mode
    )
    assert "domain" not in last
    assert intact(last)


def test_a_transform_of_replayed_rows_leaves_the_batchs_own() -> None:
    with Rehearsal(SECTION, LocalTransport(), transform=lambda batch: {"x": -batch["x"]}) as rehearsal:
        for _ in range(6):
            last = rehearsal.update({"x": torch.ones(6)})
    assert last["x"].tolist() == [1.0] * 6 + [-1.0] * 3


def test_rows_may_not_take_the_place_of_a_whole_batch() -> None:
    check_room(3, 1, 4)
    check_room(None, 2, 1)
    with pytest.raises(ConfigError, match=r"a batch has 6 rows.* 2 draw"):
        check_room(3, 2, 6)
