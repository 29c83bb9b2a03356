"""faiss is imported when it is needed, and asked for by name when it is missing."""

from __future__ import annotations

import sys

import pytest

from rehearsal_plugin.buffer.vector_index.faiss_library import import_faiss
from rehearsal_plugin.errors import MissingDependencyError


def test_the_module_is_returned() -> None:
    faiss = pytest.importorskip("faiss")
    assert import_faiss() is faiss


def test_without_faiss_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rehearsal_plugin\[retrieval\]'"):
        import_faiss()
