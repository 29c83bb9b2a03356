"""IVF and HNSW over rows that come and go.

faiss cannot take a row out of an HNSW graph, and out of an inverted file only slowly. So a row that is replaced stays
in the index as a tombstone, and its successor is appended. Slots 0 to 2, after slot 1 was replaced:

    entry    0  1  2  3
    _slot    0  1  2  1
    _alive   y  n  y  y        _entry of slots 0, 1, 2: 0, 3, 2

Invariant: a slot has one entry that is alive, or none. Searches pass over the dead, and the index is built anew when
there are enough of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rehearsal_plugin.buffer.vector_index.faiss_library import import_faiss
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.core.arrays import Float32Array, IntArray, Mask

__all__ = ["Approximate"]

TRAINING_ROWS_A_LIST = 64


class Approximate:
    """An index of faiss over some slots.

    Args:
        config: The section `rehearsal.retrieval`, with another index than `flat`.
        vectors: `[n, d]` float32.
        slots: `[n]` int64, where they are.
        capacity: Slots that there are.
    """

    def __init__(self, config: RetrievalConfig, vectors: Float32Array, slots: IntArray, capacity: int) -> None:
        self._config, self._faiss = config, import_faiss()
        self._built = len(slots)
        self._slot = np.empty(0, dtype=np.int64)  # of each entry
        self._entry = np.full(capacity, -1, dtype=np.int64)  # of each slot
        self._alive = np.empty(0, dtype=bool)
        self._index = self._make_index(vectors)
        self.add(vectors, slots)

    @property
    def outdated(self) -> bool:
        """Whether so many entries were appended that the index should be built anew."""
        return len(self._slot) - self._built > self._config.rebuild * max(1, self._built)

    def add(self, vectors: Float32Array, slots: IntArray) -> None:
        """Let `vectors` `[n, d]` take the places of whatever was at `slots` `[n]`."""
        self.remove(slots)
        self._entry[slots] = len(self._slot) + np.arange(len(slots))
        self._slot = np.concatenate((self._slot, slots))
        self._alive = np.concatenate((self._alive, np.ones(len(slots), dtype=bool)))
        if len(slots):
            self._index.add(vectors)

    def remove(self, slots: IntArray) -> None:
        """Take `slots` `[n]` out of all later searches."""
        entries = self._entry[slots]
        self._alive[entries[entries >= 0]] = False
        self._entry[slots] = -1

    def search(self, queries: Float32Array, k: int, allowed: Mask | None) -> IntArray:
        """Roughly the nearest `k` slots of each query, in no order; -1 where fewer were found.

        Args:
            queries: `[q, d]` float32.
            k: How many.
            allowed: `[capacity]` bool, the slots that count; None for all.

        Returns:
            `[q, k]` int64.
        """
        wanted = self._alive if allowed is None else self._alive & allowed[self._slot]
        selector = None if wanted.all() else self._faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
        _, entries = self._index.search(queries, k, params=self._search_parameters(k, selector))
        return np.where(entries >= 0, self._slot[entries], -1)

    def _make_index(self, vectors: Float32Array) -> Any:
        faiss, config, width = self._faiss, self._config, vectors.shape[1]
        metric = faiss.METRIC_L2 if config.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        if config.index == "hnsw":
            index = faiss.IndexHNSWFlat(width, config.neighbours, metric)
            index.hnsw.efConstruction = config.build_width
            return index
        lists = min(config.lists or round(4 * len(vectors) ** 0.5), len(vectors))
        quantizer = faiss.IndexFlat(width, metric)
        index = faiss.IndexIVFFlat(quantizer, width, lists, metric)
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = TRAINING_ROWS_A_LIST
        index.train(vectors)
        return index

    def _search_parameters(self, k: int, selector: Any) -> Any:
        chosen = {} if selector is None else {"sel": selector}
        if self._config.index == "hnsw":
            return self._faiss.SearchParametersHNSW(efSearch=max(self._config.search_width, k), **chosen)
        return self._faiss.SearchParametersIVF(nprobe=min(self._config.probes, self._index.nlist), **chosen)
