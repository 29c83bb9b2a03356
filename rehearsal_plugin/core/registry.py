"""Names that stand for an implementation: the package's own, and those that you register."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from rehearsal_plugin.errors import ConfigError

__all__ = ["Registry"]

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """Implementations by the name that a config key gives.

    Args:
        key: Path of the config key, such as `"rehearsal.buffer.policy"`.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        """The implementation called `name`.

        Raises:
            ConfigError: None is; the message has the nearest name.
        """
        if name not in self._entries:
            raise ConfigError(f"{self.key} is '{name}'; {self.nearest(name)}registered are {', '.join(self.names)}")
        return self._entries[name]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order in which they were registered."""
        return tuple(self._entries)

    def add(self, name: str, entry: T) -> None:
        """Make `entry` available as `name`; a name that is taken changes hands."""
        self._entries[name] = entry

    def register(self, name: str, wrap: Callable[[Any], T] = lambda implementation: implementation) -> Callable[[U], U]:
        """A decorator that adds `wrap(what it decorates)` and leaves that as it is."""

        def decorate(implementation: U) -> U:
            self.add(name, wrap(implementation))
            return implementation

        return decorate

    def nearest(self, name: str) -> str:
        """`"did you mean 'er'? "`, or nothing where no registered name is like `name`."""
        matches = get_close_matches(name.lower(), self.names, n=1)
        return f"did you mean '{matches[0]}'? " if matches else ""
