"""How containers that optree does not know come apart, and are made again with other items."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import fields
from typing import Any

import optree
from torch import Size

__all__ = ["NAMESPACE", "copied", "fields_and_values", "is_container", "register"]

NAMESPACE = "rehearsal_plugin"  # of optree: what is registered here changes nothing for others

_registered: set[type] = set()
_registering = threading.Lock()


def is_container(leaf: object) -> bool:
    """Whether a leaf is a container of a type that optree does not know yet; lists of plain values are leaves."""
    kind = type(leaf)
    if kind in (list, tuple):
        return False
    return isinstance(leaf, (Mapping, list, tuple)) or hasattr(kind, "__dataclass_fields__")


def register(kind: type) -> None:
    """Tell optree how containers of a type come apart: by keys, by the fields of a dataclass, or by place.

    Called from any thread; the type is known when a call returns.
    """
    come_apart: Any = _items
    if issubclass(kind, Mapping):
        come_apart = _keys_and_values
    elif not issubclass(kind, (list, tuple)):
        come_apart = fields_and_values
    fill: Any = _Frame.fill
    with _registering:
        if kind not in _registered:
            optree.register_pytree_node(kind, come_apart, fill, namespace=NAMESPACE)
            _registered.add(kind)


class _Frame:
    """A container without its items: its type, its keys, and what else it carries, such as a default factory.

    Args:
        kind: The type.
        keys: Of the items, in their order.
        empty: A container with None for every item; None where one is made of its items alone.
        shares: Whether a copy of `empty` by `copy.copy` would share its items with it.
    """

    def __init__(self, kind: Any, keys: tuple[Any, ...], empty: Any = None, *, shares: bool = False) -> None:
        self.kind, self.keys, self.empty, self._shares = kind, keys, empty, shares

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
            items = tuple(items)
            return items if self.kind is Size and None in items else self.kind(items)  # a Size holds numbers only
        filled = {}
        if self.empty is not None:
            filled = copy.deepcopy(self.empty) if self._shares else copy.copy(self.empty)
        for key, item in zip(self.keys, items, strict=True):
            filled[key] = item
        return self.kind(filled) if self.empty is None else filled


def copied(container: MutableMapping[Any, Any]) -> tuple[MutableMapping[Any, Any], bool]:
    """A copy with items of its own, and whether `copy.copy` would share them with the container."""
    copied = copy.copy(container)
    key = next((key for key in container if container[key] is not None), None)
    if key is None:
        return copied, False
    value = container[key]
    copied[key] = None
    shares = container[key] is None
    copied[key] = value
    if not shares:
        return copied, False
    return copy.deepcopy(container, {id(value): value for value in container.values()}), True  # the items themselves


def _keys_and_values(container: Mapping[Any, Any]) -> tuple[list[Any], _Frame, tuple[Any, ...]]:
    keys, empty, shares = tuple(container), None, False
    values = [container[key] for key in keys]
    if isinstance(container, MutableMapping):
        empty, shares = copied(container)
        for key in keys:
            empty[key] = None  # a structure is kept, and must keep no batch alive
    return values, _Frame(type(container), keys, empty, shares=shares), keys


def fields_and_values(container: Any) -> tuple[list[Any], _Frame, tuple[str, ...]]:
    """All that a dataclass holds: its fields that are set, and attributes that it made of them, such as a mask."""
    declared = [field.name for field in fields(container) if hasattr(container, field.name)]
    names = (*declared, *(name for name in getattr(container, "__dict__", ()) if name not in declared))
    empty = copy.copy(container)
    values = [getattr(container, name) for name in names]
    for name in names:
        object.__setattr__(empty, name, None)
    return values, _Frame(type(container), names, empty), names


def _items(container: Any) -> tuple[list[Any], _Frame]:
    return list(container), _Frame(type(container), tuple(range(len(container))))
