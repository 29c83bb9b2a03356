"""Exact search: the k nearest of all rows, ties and near ties included.

faiss finds a few more than k in single precision. If even the last of those, given the largest error that it can have,
is further away than the k-th by its exact score, nothing that was left out can be nearer. Where that does not hold, as
among many equal vectors, all that come near enough are scored exactly; where single precision may not be able to tell,
as its numbers end at 3e38, all are.
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.vector_index.faiss_library import import_faiss
from rehearsal_plugin.buffer.vector_index.similarity import error_bound, rank_by, scores_of
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray

__all__ = ["nearest"]

MARGIN = 16
"""Rows that are looked at beyond the k-th."""

AT_ONCE = 4096


def nearest(
    queries: Float32Array, vectors: Float32Array, lengths: Float64Array, k: int, *, squared_distance: bool
) -> tuple[Float64Array, IntArray]:
    """The nearest vectors of each query, from the nearest on; of equally near ones, the first.

    Args:
        queries: `[q, d]` float32.
        vectors: `[n, d]` float32, C-contiguous.
        lengths: `[n]` float64, those of the vectors.
        k: How many.
        squared_distance: See `scores_of`.

    Returns:
        Scores `[q, min(k, n)]` float64, and which vectors they are, `[q, min(k, n)]` int64.
    """
    k = min(k, len(vectors))
    if not len(queries) or not k:
        return np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    faiss = import_faiss()
    metric = faiss.METRIC_L2 if squared_distance else faiss.METRIC_INNER_PRODUCT
    rough, found = faiss.knn(queries, vectors, min(k + MARGIN, len(vectors)), metric=metric)
    exact = scores_of(queries, vectors, found, squared_distance=squared_distance)
    order = rank_by(exact, found)[:, :k]
    scores, index = np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)
    bound = error_bound(queries, float(lengths.max()), squared_distance=squared_distance)
    unsure = np.isinf(bound)
    if found.shape[1] < len(vectors):
        last = -rough[:, -1].astype(np.float64) if squared_distance else rough[:, -1].astype(np.float64)
        unsure |= ~(scores[:, -1] > last + bound)
    for query in np.flatnonzero(unsure).tolist():
        least = scores[query, -1] - 2 * bound[query]
        scores[query], index[query] = _settled(queries[query], vectors, k, least, squared_distance)
    return scores, index


def _settled(
    query: Float32Array, vectors: Float32Array, k: int, least: float, squared_distance: bool
) -> tuple[Float64Array, IntArray]:
    """The nearest `k` of a query `[d]`, all of which score `least` or more up to rounding."""
    near = np.arange(len(vectors))
    if least > -np.inf:
        rough = vectors @ query
        if squared_distance:
            rough = 2 * rough - np.einsum("nd,nd->n", vectors, vectors) - query @ query
        near = np.flatnonzero(rough.astype(np.float64) >= least)
    parts = [near[start : start + AT_ONCE] for start in range(0, len(near), AT_ONCE)]
    scored = [scores_of(query[None], vectors, part[None], squared_distance=squared_distance)[0] for part in parts]
    exact = np.concatenate(scored)
    order = rank_by(exact, near)[:k]
    return exact[order], near[order]
