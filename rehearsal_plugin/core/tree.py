"""Batches and outputs as flat lists of leaves: any nesting of mappings, dataclasses, lists and tuples, by optree.

A leaf is called by the keys on the way to it, joined by dots: in `{"inputs": {"ids": a}, "labels": [b]}` the leaves are
`inputs.ids` and `labels.0`. They stand in the order in which the mappings were filled. A list or tuple of plain values,
such as numbers or strings, is one leaf: in `{"inputs": a, "captions": ["x", "y"]}` the second leaf is `captions`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import optree
from torch import Tensor

from rehearsal_plugin.errors import BatchError

__all__ = ["FlatBatch", "flatten", "leaves_of", "map_leaves", "without"]

NAMESPACE = "rehearsal_plugin"  # of optree: what is registered here changes nothing for others

MOST_STRUCTURES = 256  # whose names are kept

# optree sorts the keys of mappings elsewhere; entered for good.
_INSERTION_ORDER = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
_INSERTION_ORDER.__enter__()

_registered: set[type] = set()
_structures: dict[Any, Structure] = {}


@dataclass(frozen=True)
class Structure:
    """What batches of one nesting share.

    Attributes:
        names: Of the leaves, in their order.
        places: Which leaf each name is.
        sequences: First leaf and end of every list and tuple whose items are all leaves.
    """

    names: tuple[str, ...]
    places: Mapping[str, int]
    sequences: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FlatBatch:
    """The leaves of a batch, and how to make the batch of them again.

    Attributes:
        leaves: All leaves, in the order of `names`.
        structure: Their names.
        spec: The nesting, as optree has it.
    """

    leaves: list[Any]
    structure: Structure
    spec: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the leaves."""
        return self.structure.names

    def get(self, name: str) -> Any:
        """The leaf called `name`, or None."""
        place = self.structure.places.get(name)
        return None if place is None else self.leaves[place]

    def __getitem__(self, name: str) -> Any:
        return self.leaves[self.structure.places[name]]

    def with_leaves(self, changed: Mapping[str, Any]) -> FlatBatch:
        """The same batch with other leaves for some names."""
        leaves = list(self.leaves)
        for name, leaf in changed.items():
            leaves[self.structure.places[name]] = leaf
        return FlatBatch(leaves, self.structure, self.spec)

    def rebuild(self) -> Any:
        """The batch in its nesting, with containers of the same types."""
        return optree.tree_unflatten(self.spec, self.leaves)


def flatten(batch: Any) -> FlatBatch:
    """Walk a batch once; one that is flat already is returned as it is.

    Raises:
        BatchError: Two leaves have the same name.
    """
    if isinstance(batch, FlatBatch):
        return batch
    leaves, spec = optree.tree_flatten(batch, none_is_leaf=True, namespace=NAMESPACE)
    unknown = [leaf for leaf in leaves if type(leaf) is not Tensor and _is_container(leaf)]  # not registered yet
    if unknown:
        for container in unknown:
            _register(type(container))
        return flatten(batch)
    structure = _structure(spec)
    if any(_is_plain(leaves[start]) and all(map(_is_plain, leaves[start:end])) for start, end in structure.sequences):
        leaves, spec = optree.tree_flatten(batch, _is_plain_sequence, none_is_leaf=True, namespace=NAMESPACE)
        structure = _structure(spec)
    return FlatBatch(leaves, structure, spec)


def map_leaves(tree: Any, function: Callable[[str, Any], Any]) -> Any:
    """Rebuild a batch with `function(name, leaf)` in place of every leaf."""
    flat = flatten(tree)
    leaves = [function(name, leaf) for name, leaf in zip(flat.names, flat.leaves, strict=True)]
    return optree.tree_unflatten(flat.spec, leaves)


def leaves_of(tree: Any) -> dict[str, Any]:
    """All leaves by name.

    Raises:
        BatchError: Two have the same.
    """
    flat = flatten(tree)
    return dict(zip(flat.names, flat.leaves, strict=True))


def without(tree: Any, names: Collection[str], path: str = "") -> Any:
    """The batch without the leaves called `names`; those behind them in a list or tuple move up."""
    prefix = f"{path}." if path else ""
    if isinstance(tree, MutableMapping):
        rest = copy.copy(tree)
        for key in tree:
            if f"{prefix}{key}" in names:
                del rest[key]
            else:
                rest[key] = without(tree[key], names, f"{prefix}{key}")
        return rest
    if isinstance(tree, Mapping):
        kept = {key: without(value, names, f"{prefix}{key}") for key, value in tree.items()}
        return type(tree)({key: value for key, value in kept.items() if f"{prefix}{key}" not in names})  # type: ignore[call-arg]
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        items = [(f"{prefix}{i}", value) for i, value in enumerate(tree)]
        return type(tree)(without(value, names, name) for name, value in items if name not in names)
    return tree


def _structure(spec: Any) -> Structure:
    """The structure of a nesting, made once."""
    structure = _structures.get(spec)
    if structure is None:
        structure = _structures[spec] = _structure_of(spec)
        if len(_structures) > MOST_STRUCTURES:
            del _structures[next(iter(_structures))]
    return structure


def _structure_of(spec: Any) -> Structure:
    names = tuple(".".join(map(str, path)) for path in spec.paths())
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names):
        twice = next(name for place, name in enumerate(names) if places[name] != place)
        raise BatchError(f"the batch has two leaves called '{twice}'; rename one (keys are joined by dots)")
    return Structure(names, places, tuple(_sequences_in(spec, 0)))


def _sequences_in(spec: Any, start: int) -> Iterator[tuple[int, int]]:
    """First leaf and end of lists and tuples below a node whose items are all leaves; the node's begin at `start`."""
    children = spec.children()
    if spec.type in (list, tuple) and children and all(child.is_leaf() for child in children):
        yield start, start + len(children)
        return
    for child in children:
        yield from _sequences_in(child, start)
        start += child.num_leaves


def _is_plain(leaf: object) -> bool:
    """Whether a leaf is a value such as a number, a string or an object, and holds no rows itself."""
    return not isinstance(leaf, (Tensor, np.ndarray, list, tuple)) and not _is_container(leaf)


def _is_plain_sequence(node: object) -> bool:
    """Whether a list or tuple (no named one) holds plain values only."""
    return type(node) in (list, tuple) and bool(node) and all(map(_is_plain, node))  # type: ignore[call-overload]


def _is_container(leaf: object) -> bool:
    """Whether a leaf is a container of a type that optree does not know yet; lists of plain values are leaves."""
    kind = type(leaf)
    if kind in (list, tuple):
        return False
    return isinstance(leaf, (Mapping, list, tuple)) or hasattr(kind, "__dataclass_fields__")


def _register(kind: type) -> None:
    """Tell optree how containers of a type come apart: by keys, by the fields of a dataclass, or by place."""
    if kind in _registered:
        return
    _registered.add(kind)
    come_apart: Any = _items
    if issubclass(kind, Mapping):
        come_apart = _keys_and_values
    elif not issubclass(kind, (list, tuple)):
        come_apart = _fields_and_values
    fill: Any = _Frame.fill
    optree.register_pytree_node(kind, come_apart, fill, namespace=NAMESPACE)


class _Frame:
    """A container without its items: its type, its keys, and what else it carries, such as a default factory."""

    def __init__(self, kind: Any, keys: tuple[Any, ...], empty: Any = None) -> None:
        self.kind, self.keys, self.empty = kind, keys, empty

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frame) and (self.kind, self.keys) == (other.kind, other.keys)

    def __hash__(self) -> int:
        return hash((self.kind, self.keys))

    def fill(self, items: Iterable[Any]) -> Any:
        """A container of the same type with other items."""
        if hasattr(self.kind, "__dataclass_fields__") and not issubclass(self.kind, Mapping):
            filled = copy.copy(self.empty)
            for name, item in zip(self.keys, items, strict=True):
                object.__setattr__(filled, name, item)  # frozen ones too
            return filled
        if not issubclass(self.kind, Mapping):
            return self.kind(items)
        filled = {} if self.empty is None else copy.copy(self.empty)
        for key, item in zip(self.keys, items, strict=True):
            filled[key] = item
        return self.kind(filled) if self.empty is None else filled


def _keys_and_values(container: Mapping[Any, Any]) -> tuple[list[Any], _Frame, tuple[Any, ...]]:
    keys, empty = tuple(container), None
    if isinstance(container, MutableMapping):
        empty = copy.copy(container)
        for key in keys:
            empty[key] = None  # a structure is kept, and must keep no batch alive
    return [container[key] for key in keys], _Frame(type(container), keys, empty), keys


def _fields_and_values(container: Any) -> tuple[list[Any], _Frame, tuple[str, ...]]:
    names, empty = tuple(field.name for field in fields(container)), copy.copy(container)
    values = [getattr(container, name) for name in names]
    for name in names:
        object.__setattr__(empty, name, None)
    return values, _Frame(type(container), names, empty), names


def _items(container: Any) -> tuple[list[Any], _Frame]:
    return list(container), _Frame(type(container), tuple(range(len(container))))
