"""The optional dependency faiss."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.errors import MissingDependencyError

__all__ = ["import_faiss"]


def import_faiss() -> Any:
    """The module `faiss`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "retrieval needs faiss, which is not installed; pip install 'rehearsal_plugin[retrieval]'"
        ) from error
    return faiss
