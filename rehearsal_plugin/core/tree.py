"""Batches and outputs as flat lists of leaves: any nesting of mappings, dataclasses, lists and tuples, by optree.

A leaf is called by the keys on the way to it, joined by dots: in `{"inputs": {"ids": a}, "labels": [b]}` the leaves are
`inputs.ids` and `labels.0`. They stand in the order in which the mappings were filled. A list or tuple of plain values,
such as numbers or strings, is one leaf: in `{"inputs": a, "captions": ["x", "y"]}` the second leaf is `captions`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rehearsal_plugin.core.containers import NAMESPACE, copied, fields_and_values, is_container, register
from rehearsal_plugin.errors import BatchError

__all__ = ["FlatBatch", "flatten", "leaves_of", "map_leaves", "without"]

MOST_STRUCTURES = 256  # whose names are kept

# optree sorts the keys of mappings elsewhere; entered for good.
_INSERTION_ORDER = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
_INSERTION_ORDER.__enter__()

_structures: dict[Any, Structure] = {}
_making_structure = threading.Lock()  # known structures are looked up without it


@dataclass(frozen=True)
class Structure:
    """What batches of one nesting share.

    Attributes:
        names: Of the leaves, in their order.
        places: Which leaf each name is.
        sequences: First leaf and end of every list and tuple whose items are all leaves.
        packed: Names of the packed sequences (`torch.nn.utils.rnn`), whose leaves are no rows.
    """

    names: tuple[str, ...]
    places: Mapping[str, int]
    sequences: tuple[tuple[int, int], ...] = ()
    packed: tuple[str, ...] = ()


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

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has to be told of the types of containers, which `flatten` does.
        return flatten, (self.rebuild(),)


def flatten(batch: Any) -> FlatBatch:
    """Walk a batch once; one that is flat already is returned as it is.

    Raises:
        BatchError: Two leaves have the same name.
    """
    if isinstance(batch, FlatBatch):
        return batch
    leaves, spec = optree.tree_flatten(batch, none_is_leaf=True, namespace=NAMESPACE)
    unknown = [leaf for leaf in leaves if type(leaf) is not Tensor and is_container(leaf)]  # not registered yet
    if unknown:
        for container in unknown:
            register(type(container))
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
    """The batch without the leaves called `names`; those behind them in a list or tuple move up.

    In a dataclass or a named tuple, which cannot do without a part, None takes their place.
    """
    prefix = f"{path}." if path else ""
    if isinstance(tree, MutableMapping):
        rest, _ = copied(tree)
        for key in tuple(tree):
            if f"{prefix}{key}" in names:
                del rest[key]
            else:
                rest[key] = without(tree[key], names, f"{prefix}{key}")
        return rest
    if isinstance(tree, Mapping):
        kept = {key: without(value, names, f"{prefix}{key}") for key, value in tree.items()}
        return type(tree)({key: value for key, value in kept.items() if f"{prefix}{key}" not in names})  # type: ignore[call-arg]
    if isinstance(tree, (list, tuple)):
        items = [(f"{prefix}{i}", value) for i, value in enumerate(tree)]
        if hasattr(tree, "_fields"):
            kind: Any = type(tree)
            return kind(*(None if name in names else without(value, names, name) for name, value in items))
        return type(tree)(without(value, names, name) for name, value in items if name not in names)
    if hasattr(type(tree), "__dataclass_fields__"):
        values, frame, keys = fields_and_values(tree)
        items = [(f"{prefix}{key}", value) for key, value in zip(keys, values, strict=True)]
        return frame.fill(None if name in names else without(value, names, name) for name, value in items)
    return tree


def _structure(spec: Any) -> Structure:
    """The structure of a nesting, made once; called from any thread."""
    structure = _structures.get(spec)
    if structure is None:
        with _making_structure:
            structure = _structures.get(spec) or _structure_of(spec)  # another thread may have made it meanwhile
            _structures[spec] = structure
            if len(_structures) > MOST_STRUCTURES:
                del _structures[next(iter(_structures))]
    return structure


def _structure_of(spec: Any) -> Structure:
    names = tuple(".".join(map(str, path)) for path in spec.paths())
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names):
        twice = next(name for place, name in enumerate(names) if places[name] != place)
        raise BatchError(f"the batch has two leaves called '{twice}'; rename one (keys are joined by dots)")
    packed = tuple(names[start].rpartition(".")[0] for start in _packed_in(spec, 0))
    return Structure(names, places, tuple(_sequences_in(spec, 0)), packed)


def _sequences_in(spec: Any, start: int) -> Iterator[tuple[int, int]]:
    """First leaf and end of lists and tuples below a node whose items are all leaves; the node's begin at `start`."""
    children = spec.children()
    if spec.type in (list, tuple) and children and all(child.is_leaf() for child in children):
        yield start, start + len(children)
        return
    for child in children:
        yield from _sequences_in(child, start)
        start += child.num_leaves


def _packed_in(spec: Any, start: int) -> Iterator[int]:
    """First leaves of the packed sequences below a node whose leaves begin at `start`."""
    if spec.type is PackedSequence:
        yield start
        return
    for child in spec.children():
        yield from _packed_in(child, start)
        start += child.num_leaves


def _is_plain(leaf: object) -> bool:
    """Whether a leaf is a value such as a number, a string or an object, and holds no rows itself."""
    return not isinstance(leaf, (Tensor, np.ndarray, list, tuple)) and not is_container(leaf)


def _is_plain_sequence(node: object) -> bool:
    """Whether a list or tuple (no named one) holds plain values only."""
    return type(node) in (list, tuple) and bool(node) and all(map(_is_plain, node))  # type: ignore[call-overload]
