"""What a search is given, as the index takes it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rehearsal_plugin.buffer.vector_index.filters import whole_number
from rehearsal_plugin.buffer.vector_index.similarity import normalized
from rehearsal_plugin.core.arrays import Float32Array
from rehearsal_plugin.errors import BatchError

__all__ = ["prepared", "wanted"]


def prepared(
    queries: ArrayLike | Tensor | None, width: int, metric: Literal["inner_product", "cosine", "l2"]
) -> Float32Array:
    """Queries as `[n, width]` float32, of length 1 where cosines are compared; none for None.

    Args:
        queries: `[n, width]` numbers.
        width: Numbers of an embedding; 0 where that is not known yet.
        metric: What makes rows near.

    Raises:
        BatchError: They are no such vectors.
    """
    if queries is None:
        return np.zeros((0, width), dtype=np.float32)
    vectors = _as_vectors(queries)
    if vectors.ndim != 2 or (width and vectors.shape[1] != width):
        raise BatchError(f"queries have the shape {vectors.shape}; it has to be (queries, {width or 'width'})")
    if not np.isfinite(vectors).all():
        raise BatchError("queries hold NaN or infinity, so nothing is near to them")
    return normalized(vectors) if metric == "cosine" else vectors


def wanted(k: int) -> int:
    """How many rows are asked for.

    Raises:
        BatchError: None, or not a whole number of them.
    """
    count = whole_number(k, "k")
    if count < 1:
        raise BatchError(f"{k} rows were asked for; ask for at least one")
    return count


def _as_vectors(queries: ArrayLike | Tensor) -> Float32Array:
    if isinstance(queries, Tensor):
        queries = queries.to(torch.float32).numpy(force=True)
    try:
        return np.ascontiguousarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BatchError(f"queries are no vectors of numbers, all of one length: {error}") from error
