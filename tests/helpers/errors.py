"""Errors that jobs on several ranks have to raise, as text that a rank can return."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["message"]


def message(kind: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error of this kind that the call raises.

    Raises:
        AssertionError: The call raises none.
    """
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
