"""Conditions on rows: partitions, ranks of origin and ages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rehearsal_plugin.buffer.vector_index.filters import Where, whole_number
from rehearsal_plugin.errors import BatchError

KEYS, ORIGIN, WRITTEN = np.array([0, 1, 0, 2]), np.array([0, 0, 1, 1]), np.array([10, 8, 6, 4])
NOW = 10


def meant(where: Where) -> list[int] | None:
    mask = where.mask(KEYS, ORIGIN, WRITTEN, NOW)
    return None if mask is None else np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ({"partitions": [0]}, [0, 2]),
        ({"partitions": {1, 2}}, [1, 3]),
        ({"partitions": []}, []),
        ({"origins": [1]}, [2, 3]),
        ({"min_age": 2}, [1, 2, 3]),
        ({"max_age": 2}, [0, 1]),
        ({"min_age": 1, "max_age": 4}, [1, 2]),
        ({"partitions": [0], "origins": [1], "min_age": 4}, [2]),
        ({"partitions": [0], "origins": [0], "min_age": 1}, []),
    ],
    ids=str,
)
def test_rows_meet_all_conditions(conditions: dict[str, Any], rows: list[int]) -> None:
    assert meant(Where(**conditions)) == rows


def test_without_conditions_all_rows_are_meant() -> None:
    assert meant(Where()) is None


def test_conditions_travel_as_json() -> None:
    conditions: dict[str, Any] = {"partitions": {np.int64(2), 1}, "origins": np.array([3]), "min_age": np.int32(4)}
    where = Where(**conditions)
    assert Where.from_json(json.loads(json.dumps(where.to_json()))) == where


def test_keys_are_sorted_and_each_is_named_once() -> None:
    assert Where(partitions=[3, 1, 3]).partitions == (1, 3)


@pytest.mark.parametrize("conditions", [{"partitions": 3}, {"partitions": [0.5]}, {"origins": ["0"]}, {"min_age": 1.5}])
def test_a_condition_of_no_whole_number_is_refused_by_name(conditions: dict[str, Any]) -> None:
    (name,) = conditions
    with pytest.raises(BatchError, match=name):
        Where(**conditions)


def test_a_whole_number_of_any_type_becomes_a_plain_one() -> None:
    assert type(whole_number(np.int16(7), "k")) is int
    with pytest.raises(BatchError, match=r"k is 7\.0"):
        whole_number(7.0, "k")
