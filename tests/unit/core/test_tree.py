"""Batches as flat lists of leaves: names, order, containers of any type, and how often a batch is walked."""

from __future__ import annotations

import collections
import copy
import gc
import multiprocessing
import pickle
import threading
import time
import types
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.core import tree
from rehearsal_plugin.core.tree import FlatBatch, flatten, leaves_of, map_leaves, without
from rehearsal_plugin.errors import BatchError
from tests.helpers.samples import new_batch

Point = collections.namedtuple("Point", "x y")


class Items(list[Any]):
    pass


class Attributed(collections.UserDict[str, Any]):
    """A mapping that carries more than its items, as batches of Hugging Face tokenizers do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kind = "attributed"


NESTED: list[Any] = [
    {"b": 1, "a": {"c": 2}},
    [1, (2, 3), Items([4])],
    Point(1, None),
    collections.defaultdict(list, {"z": 1, "a": 2}),
    collections.OrderedDict(z=1, a=2),
    types.MappingProxyType({"q": 3}),
    {"outer": Attributed({"inner": 1})},
    5,
]


@pytest.mark.parametrize("batch", NESTED, ids=lambda batch: type(batch).__name__)
def test_a_batch_is_rebuilt_with_containers_of_the_same_types(batch: Any) -> None:
    rebuilt = flatten(batch).rebuild()
    assert rebuilt == batch
    assert type(rebuilt) is type(batch)


def test_leaves_are_called_by_the_keys_on_the_way() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    batch = {"inputs": {"ids": 1}, "labels": [x, (y,)], "none": None}
    assert leaves_of(batch) == {"inputs.ids": 1, "labels.0": x, "labels.1.0": y, "none": None}


@pytest.mark.parametrize(
    "values",
    [[1, 2, 3], ("a", "b"), [None, "a"], [object()], [True]],
    ids=["integers", "texts", "nothing", "objects", "truth"],
)
def test_a_list_of_plain_values_is_one_leaf(values: Any) -> None:
    assert leaves_of({"x": torch.zeros(2), "deep": {"y": values}})["deep.y"] is values


@pytest.mark.parametrize("values", [[], [torch.zeros(1), 2], [[1], [2]], Point(1, 2)], ids=str)
def test_other_lists_are_walked(values: Any) -> None:
    assert "y" not in leaves_of({"y": values})


def test_lists_of_plain_values_of_any_length_are_one_structure() -> None:
    assert flatten({"y": [1, 2]}).structure is flatten({"y": [1, 2, 3]}).structure


def test_leaves_stand_in_the_order_in_which_mappings_were_filled() -> None:
    assert flatten({"z": 1, "a": 2, "m": 3}).names == ("z", "a", "m")


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(BatchError, match=r"two leaves called 'a\.b'"):
        flatten({"a": {"b": 1}, "a.b": 2})


def test_other_leaves_can_be_put_in_place_of_some() -> None:
    flat = flatten({"a": 1, "b": {"c": 2, "d": 3}})
    assert flat.with_leaves({"b.d": 9}).rebuild() == {"a": 1, "b": {"c": 2, "d": 9}}
    assert flat.rebuild() == {"a": 1, "b": {"c": 2, "d": 3}}


def test_what_is_flat_already_is_not_walked_again() -> None:
    flat = flatten({"a": 1})
    assert flatten(flat) is flat


def test_a_mapping_keeps_what_else_it_carries() -> None:
    doubled = map_leaves(Attributed({"a": 1}), lambda _, leaf: 2 * leaf)
    assert (doubled["a"], doubled.kind) == (2, "attributed")


def test_every_batch_keeps_what_it_carries_itself() -> None:
    first, second = Attributed({"a": 1}), Attributed({"a": 2})
    second.kind = "second"
    flatten(first)
    assert flatten(second).rebuild().kind == "second"


@pytest.mark.parametrize("kind", [dict, Attributed], ids=lambda kind: kind.__name__)
def test_no_batch_is_kept_alive(kind: Any) -> None:
    batch = kind({"a": torch.zeros(3)})
    watched = weakref.ref(batch["a"])
    flatten(batch)
    del batch
    gc.collect()
    assert watched() is None


def test_structures_that_are_kept_are_bounded() -> None:
    for number in range(2 * tree.MOST_STRUCTURES):
        flatten({f"leaf{number}": 0})
    assert len(tree._structures) <= tree.MOST_STRUCTURES + 1


def test_others_flatten_as_ever() -> None:
    flatten({"z": 1, "a": Items([2])})
    nested: Any = {"z": 1, "a": Items([2])}
    leaves, _ = optree.tree_flatten(nested)
    assert leaves == [Items([2]), 1], "sorted keys, and a list of another type is a leaf"


def test_leaves_can_be_left_out() -> None:
    assert without({"a": 1, "b": {"c": 2, "d": 3}, "e": [4, 5]}, {"b.c", "e.0"}) == {"a": 1, "b": {"d": 3}, "e": [5]}


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Masked:
    x: Any
    mask: Any = field(init=False)
    scale: Any = field(init=False)

    def __post_init__(self) -> None:
        self.mask = self.x + 1
        self.ids = self.x + 2


def test_none_takes_the_place_of_what_a_container_cannot_do_without() -> None:
    assert without({"pair": Pair(1, {"a": 2, "b": 3})}, {"pair.0", "pair.1.a"}) == {"pair": Pair(None, {"b": 3})}
    left = without(Masked(1), {"mask", "ids"})
    assert (left.x, left.mask, left.ids) == (1, None, None)


def test_all_that_a_dataclass_holds_is_a_leaf_and_what_is_not_set_is_none() -> None:
    flat = flatten(Masked(1))
    assert dict(zip(flat.names, flat.leaves, strict=True)) == {"x": 1, "mask": 2, "ids": 3}
    again = flat.with_leaves({"ids": 9}).rebuild()
    assert (again.x, again.mask, again.ids, hasattr(again, "scale")) == (1, 2, 9, False)


@pytest.mark.parametrize("make", [Attributed])
def test_a_flat_batch_can_be_copied_and_taken_to_another_process(make: Any, tmp_path: Path) -> None:
    flat = flatten({"batch": make({"x": torch.ones(2), "y": [1, 2]})})
    assert copy.deepcopy(flat).structure is flat.structure
    file = tmp_path / "flat"
    file.write_bytes(pickle.dumps(flat))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(names_in, file).result() == ("batch.x", "batch.y")


def names_in(file: Path) -> tuple[str, ...]:
    flat: FlatBatch = pickle.loads(file.read_bytes())
    return flat.names


# How often a step walks the batch


class Walks:
    """Counts how often a batch is flattened and rebuilt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flattened = self.rebuilt = 0
        flatten_tree, unflatten_tree = optree.tree_flatten, optree.tree_unflatten

        def count_flatten(*args: Any, **kwargs: Any) -> Any:
            self.flattened += 1
            return flatten_tree(*args, **kwargs)

        def count_unflatten(*args: Any, **kwargs: Any) -> Any:
            self.rebuilt += 1
            return unflatten_tree(*args, **kwargs)

        monkeypatch.setattr(optree, "tree_flatten", count_flatten)
        monkeypatch.setattr(optree, "tree_unflatten", count_unflatten)


PADDING = {"length": 8, "values": {"tokens": 0}}


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({}, 1),
        ({"mode": "replace"}, 1),
        ({"fields": ["id", "x"]}, 1),
        ({"padding": PADDING}, 2),
        ({"padding": PADDING, "ratio_in": "tokens"}, 2),
    ],
    ids=["append", "replace", "fields", "padding", "tokens"],
)
def test_a_step_flattens_a_batch_once_and_rebuilds_it_once(
    keys: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {**new_batch(0, 0, 12), "tokens": torch.ones(12, 5, dtype=torch.int64)}
    with Rehearsal({"buffer": {"capacity": 50}, "ratio": 0.25, **keys}, LocalTransport()) as rehearsal:
        for _ in range(8):
            rehearsal.update(batch)
        walks = Walks(monkeypatch)
        for _ in range(10):
            rehearsal.update(batch)
        assert rehearsal.metrics()["rows_replayed"] > 0
    assert walks.flattened <= 10 * most
    assert walks.rebuilt == 10


def test_a_second_thread_waits_until_a_new_container_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    make_known, entered = optree.register_pytree_node, threading.Event()

    def register_slowly(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        time.sleep(0.2)  # seconds
        return make_known(*args, **kwargs)

    class New(collections.UserDict[str, Any]):
        pass

    monkeypatch.setattr(optree, "register_pytree_node", register_slowly)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(flatten, New(a=1))
        entered.wait(20)
        assert flatten(New(a=1)).structure is other.result(20).structure
