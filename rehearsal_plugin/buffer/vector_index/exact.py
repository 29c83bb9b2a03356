"""Exact search: the k nearest of all rows, ties and near ties included.

Filter and refine. faiss finds k + 16 candidates in single precision, and these are rescored in double. Every vector
that was left out has a rough score of at most `last`, that of the last candidate, and a rough score is off by `bound`
at most. So if the k-th exact score is above `last + bound`, nothing that was left out can be nearer. For k = 1 and a
bound of 0.1:

    best exact   last rough   left out, exact at most
    0.90         0.72         0.82   settled
    0.80         0.72         0.82   unsure: all vectors whose rough score is 0.60 or more are rescored

Unsure queries are those among many equal vectors, and those whose scores do not fit in single precision (above 3e38):
the latter are compared with all vectors.
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.buffer.vector_index.faiss_library import import_faiss
from rehearsal_plugin.buffer.vector_index.similarity import error_bound, rank_by, scores_of
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray

__all__ = ["nearest_vectors"]

MARGIN = 16
"""Candidates beyond the k-th."""

AT_ONCE = 4096
"""Vectors that are rescored at a time."""


def nearest_vectors(
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
    rough, candidates = faiss.knn(queries, vectors, min(k + MARGIN, len(vectors)), metric=metric)
    exact = scores_of(queries, vectors, candidates, squared_distance=squared_distance)
    order = rank_by(exact, candidates)[:, :k]
    scores, index = np.take_along_axis(exact, order, 1), np.take_along_axis(candidates, order, 1)
    bound = error_bound(queries, float(lengths.max()), squared_distance=squared_distance)
    unsure = np.isinf(bound)
    if candidates.shape[1] < len(vectors):
        last = -rough[:, -1].astype(np.float64) if squared_distance else rough[:, -1].astype(np.float64)
        unsure |= ~(scores[:, -1] > last + bound)
    for query in np.flatnonzero(unsure).tolist():
        least = scores[query, -1] - 2 * bound[query]  # once for the rounding of `_search_all_near`, and once to spare
        scores[query], index[query] = _search_all_near(queries[query], vectors, k, least, squared_distance)
    return scores, index


def _search_all_near(
    query: Float32Array, vectors: Float32Array, k: int, least: float, squared_distance: bool
) -> tuple[Float64Array, IntArray]:
    """The nearest `k` of a query `[d]`, out of all vectors with a rough score of `least` or more."""
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
