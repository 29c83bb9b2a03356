"""The optional dependency faiss."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.core.optional_import import optional_import

__all__ = ["import_faiss"]


def import_faiss() -> Any:
    """The module `faiss`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return optional_import("faiss", extra="retrieval", needed_by="retrieval")
