"""Scores of vectors: exact, and the same whatever else is searched at the same time.

Fast searches multiply matrices in single precision, and the last bits of a product depend on how the library cuts the
matrices into blocks, and so on how many rows a rank has. Scores are therefore computed anew, pair by pair, in double
precision and always in the same order, before anything is compared with anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray

__all__ = ["error_bound", "lengths_of", "normalized", "rank_by", "scores_of"]


AT_ONCE = 1 << 20  # numbers in double precision

SINGLE = np.finfo(np.float32)


def lengths_of(vectors: Float32Array) -> Float64Array:
    """The lengths of vectors `[n, d]` float32, `[n]` float64."""
    return np.asarray(np.sqrt(np.square(vectors.astype(np.float64)).sum(axis=1)))


def normalized(vectors: Float32Array) -> Float32Array:
    """Vectors `[n, d]` float32 of length 1; zeros stay zeros."""
    lengths = lengths_of(vectors)[:, None]
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def scores_of(
    queries: Float32Array, vectors: Float32Array, chosen: IntArray, *, squared_distance: bool
) -> Float64Array:
    """The score of every query with the vectors that are chosen for it; the higher, the nearer.

    Args:
        queries: `[q, d]` float32.
        vectors: `[n, d]` float32.
        chosen: `[q, c]` int64, which of them.
        squared_distance: Whether the score is the negative squared distance; otherwise the inner product.

    Returns:
        `[q, c]` float64.
    """
    scores = np.empty(chosen.shape)
    step = max(1, AT_ONCE // max(1, chosen.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        query, others = queries[part, None].astype(np.float64), vectors[chosen[part]].astype(np.float64)
        scores[part] = -np.square(others - query).sum(axis=2) if squared_distance else (others * query).sum(axis=2)
    return scores


def error_bound(queries: Float32Array, longest: float, *, squared_distance: bool) -> Float64Array:
    """How far scores in single precision may be from `scores_of`, `[q]` float64, whatever the order of summation.

    Infinitely far where numbers may become too large for it.

    Args:
        queries: `[q, d]` float32.
        longest: Length of the longest vector.
        squared_distance: As for `scores_of`.
    """
    lengths = lengths_of(queries)
    size = (lengths + longest) ** 2 if squared_distance else lengths * longest
    bound = (queries.shape[1] + 8) * float(SINGLE.eps) * size + float(SINGLE.tiny)
    return np.where(size < float(SINGLE.max) / 2, bound, np.inf)


def rank_by(scores: Float64Array, *ties: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order `[..., c]` of scores `[..., c]` from the highest; equal ones by the first of `ties`, then the next."""
    return np.lexsort((*reversed(ties), -scores), axis=-1)
