"""Rows with embeddings for the tests of retrieval, and the nearest of them by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rehearsal_plugin import RehearsalBuffer, RowLayout
from rehearsal_plugin.config import BufferConfig
from tests.helpers.samples import Batch

__all__ = ["Vectors", "batch_of", "brute_force", "buffer_of", "clustered", "of_few_values", "random"]

Vectors = NDArray[np.float32]

WIDTH = 24


def random(count: int, seed: int = 0, width: int = WIDTH) -> Vectors:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def of_few_values(count: int, seed: int = 0, width: int = 3) -> Vectors:
    """Vectors of small whole numbers, so that many are equal and all scores are exact."""
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


def clustered(count: int, seed: int = 0, width: int = 64, centres: int = 200) -> Vectors:
    """Vectors around centres, as embeddings of texts are."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(1234).standard_normal((centres, width))
    return (middle[rng.integers(0, centres, count)] + 0.6 * rng.standard_normal((count, width))).astype(np.float32)


def batch_of(vectors: Vectors, first_id: int = 0, label: int | None = None) -> Batch:
    ids = torch.arange(len(vectors)) + first_id
    labels = ids % 5 if label is None else torch.full((len(vectors),), label)
    return {"id": ids, "label": labels, "embedding": torch.from_numpy(vectors.copy())}


def buffer_of(vectors: Vectors, capacity: int | None = None, rank: int = 0, **keys: Any) -> RehearsalBuffer:
    """A buffer to which the rows were offered in one batch; their ids are their places."""
    batch = batch_of(vectors)
    config = BufferConfig(capacity=capacity or len(vectors), partition_by="label", **keys)
    buffer = RehearsalBuffer(config, RowLayout.infer(batch), rank=rank)
    buffer.offer(batch)
    return buffer


def brute_force(
    queries: Vectors, vectors: Vectors, k: int, metric: str, counted: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and places `[q, k]` of the nearest vectors by definition; equally near ones in their order."""
    one, many = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "cosine":
        one, many = (
            matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30) for matrix in (one, many)
        )
    scores = one @ many.T
    if metric == "l2":
        scores = -np.square(one[:, None] - many).sum(axis=2)
    if counted is not None:
        scores[:, ~counted] = -np.inf
    places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, places, axis=1)
    return best, np.where(np.isfinite(best), places, -1)
