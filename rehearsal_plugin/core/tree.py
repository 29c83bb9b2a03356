"""Any nesting of mappings, lists and tuples, leaf by leaf; the keys on the way to a leaf, by dots, are its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from rehearsal_plugin.errors import BatchError

__all__ = ["leaves_of", "map_leaves", "without"]


def map_leaves(tree: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """Rebuild nested mappings, lists and tuples with `function(dotted path, leaf)` at every leaf."""
    prefix = f"{path}." if path else ""
    if isinstance(tree, MutableMapping):
        rebuilt = copy.copy(tree)  # keeps what a constructor would ask for, such as a default factory
        for key, value in tree.items():
            rebuilt[key] = map_leaves(value, function, f"{prefix}{key}")
        return rebuilt
    if isinstance(tree, Mapping):
        mapped = {key: map_leaves(value, function, f"{prefix}{key}") for key, value in tree.items()}
        return type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, (list, tuple)):
        items = [map_leaves(value, function, f"{prefix}{i}") for i, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(path, tree)


def leaves_of(tree: Any) -> dict[str, Any]:
    """All leaves by name.

    Raises:
        BatchError: Two have the same.
    """
    leaves: dict[str, Any] = {}
    _collect(tree, "", leaves)
    return leaves


def _collect(tree: Any, path: str, leaves: dict[str, Any]) -> None:
    # Tensors first: to find out that one is no mapping takes longest.
    if isinstance(tree, Tensor) or not isinstance(tree, (dict, Mapping, list, tuple)):
        if path in leaves:
            raise BatchError(f"the batch has two leaves called '{path}'; rename one (keys are joined by dots)")
        leaves[path] = tree
        return
    for key, value in enumerate(tree) if isinstance(tree, (list, tuple)) else tree.items():
        _collect(value, f"{path}.{key}" if path else f"{key}", leaves)


def without(tree: Any, names: Collection[str], path: str = "") -> Any:
    """The tree without the leaves called `names`; those behind them in a list or tuple move up."""
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
