"""Hooks that run as they are in a compiled model. To import this is to import a compiler, which takes a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["UncompiledHook"]


class UncompiledHook:
    """A forward hook that is not compiled with its model: a compiler replaces optree, by which leaves are named.

    A model can be copied and pickled with it, where it can be with the hook.

    Args:
        hook: What to call.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        """What the hook gives."""
        return self._hook(*args)
