"""Arguments of a model's forward as a batch of named fields, and back again."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from rehearsal_plugin.errors import ConfigError

__all__ = ["ForwardArguments"]

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class ForwardArguments:
    """Names the positional arguments of a model's forward, by its parameters; those in `*args` by their number.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        original = getattr(module, "_orig_mod", module)  # a compiled module takes any arguments
        parameters = [p for p in inspect.signature(original.forward).parameters.values() if p.kind in POSITIONAL]
        self._parameters = [p.name for p in parameters]
        self._by_keyword = {p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}

    def names(self, count: int) -> list[str]:
        """Names of the first `count` positional arguments."""
        return self._parameters[:count] + [str(i) for i in range(len(self._parameters), count)]

    def place(self, names: list[str], fields: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the model, each for the parameter that it was given for.

        With `forward(x, domain=None, labels=None)` and `domain` hidden, `(x, domain, labels)` becomes
        `(x, labels=labels)`. What follows a hidden argument in `*args` moves up, as in a list.

        Args:
            names: Of the positional arguments, as they were given.
            fields: All arguments by name, without the hidden ones; it is changed.

        Raises:
            ConfigError: A hidden argument stands before one that cannot be given by name.
        """
        missing = next((i for i, name in enumerate(names) if name not in fields), len(names))
        first_by_name = min(missing, len(self._parameters))
        behind = [name for name in names[first_by_name:] if name in fields]
        if missing < len(self._parameters) and not self._by_keyword.issuperset(behind):
            raise ConfigError(
                f"rehearsal.hidden takes the argument '{names[missing]}' out of the model's call, and those behind it, "
                f"{behind}, can be given by position only; give '{names[missing]}' by name, or as the last one"
            )
        kept = names[:first_by_name] if missing < len(self._parameters) else [n for n in names if n in fields]
        return tuple(fields.pop(name) for name in kept), fields
