"""The distributed buffer as a memory that can be asked: nearest rows of all ranks; see `docs/retrieval.md`."""

from __future__ import annotations

from rehearsal_plugin.hidden_states import HiddenStates, pooled
from rehearsal_plugin.nearest.filters import Where
from rehearsal_plugin.nearest.index import RowIndex
from rehearsal_plugin.nearest.known import Embed
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.retriever import Retriever
from rehearsal_plugin.retrieval.texts import TextEmbedder, pack_texts, unpack_texts

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
