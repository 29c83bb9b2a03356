"""Containers that optree does not know, by whatever they carry beside their items."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rehearsal_plugin.core.containers import is_container
from rehearsal_plugin.core.tree import flatten, without


class Shelf(MutableMapping[str, Any]):
    """A mapping that `copy.copy` copies without its items."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_a_mapping_whose_copies_share_their_items_is_left_as_it_is() -> None:
    shelf, tensor = Shelf({"x": 1, "y": torch.ones(2)}), torch.zeros(3)
    flat = flatten(shelf)
    first, second = (flat.with_leaves({"y": value}).rebuild() for value in (tensor, 5))
    assert (dict(first), dict(second)) == ({"x": 1, "y": tensor}, {"x": 1, "y": 5})
    assert dict(without(shelf, {"x"})).keys() == {"y"}
    assert shelf.keys() == {"x", "y"}
    assert shelf["y"].tolist() == [1, 1]


def test_a_size_without_its_numbers_is_a_tuple() -> None:
    flat = flatten({"size": torch.Size([3, 4])})
    assert flat.rebuild() == {"size": torch.Size([3, 4])}
    assert type(flat.rebuild()["size"]) is torch.Size
    assert flat.with_leaves(dict.fromkeys(flat.names)).rebuild() == {"size": (None, None)}


@dataclass
class Sample:
    x: int


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [(Shelf({}), True), (Sample(1), True), (torch.Size([1]), True), ([1], False), ((1,), False), ("x", False)],
    ids=lambda value: type(value).__name__,
)
def test_lists_and_tuples_of_values_are_leaves_and_their_subclasses_are_containers(leaf: Any, expected: bool) -> None:
    assert is_container(leaf) is expected
