"""The distributed buffer as a memory that can be asked: nearest rows of all ranks; see `docs/retrieval.md`."""

from __future__ import annotations

from rehearsal_plugin.retrieval.filters import Where
from rehearsal_plugin.retrieval.index import RowIndex
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.retriever import Retriever

__all__ = ["Retrieved", "Retriever", "RowIndex", "Where"]
