"""Something to be done as soon as a script has imported a module, and not before: importing it may take seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action()` once, right after the module called `name` was imported; at once if it is there already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Finds one module as all others are found, and adds to what its loader does."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def followed(module: ModuleType) -> None:
                execute(module)
                self._action()

            spec.loader.exec_module = followed  # type: ignore[method-assign]
        return spec
