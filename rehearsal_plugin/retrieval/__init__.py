"""Nearest-neighbour search over the rows of all ranks; see `docs/guides/retrieval.md`."""

from __future__ import annotations

from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.index import RowIndex
from rehearsal_plugin.buffer.vector_index.known_rows import Embed
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.retriever import Retriever
from rehearsal_plugin.retrieval.texts import TextEmbedder, pack_texts, unpack_texts
from rehearsal_plugin.strategies.hidden_states import HiddenStates, pooled

__all__ = [
    "Embed",
    "HiddenStates",
    "Retrieved",
    "Retriever",
    "RowIndex",
    "TextEmbedder",
    "Where",
    "pack_texts",
    "pooled",
    "unpack_texts",
]
