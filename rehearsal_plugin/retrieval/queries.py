"""Checks and conversion of the arguments of a retriever and its searches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rehearsal_plugin.buffer.vector_index.filters import whole_number
from rehearsal_plugin.buffer.vector_index.similarity import normalized
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.config.names import Metric
from rehearsal_plugin.core.arrays import Float32Array
from rehearsal_plugin.errors import BatchError, ConfigError

__all__ = ["ConfigLike", "checked_config", "checked_k", "prepare_queries"]

ConfigLike: TypeAlias = RetrievalConfig | Mapping[str, Any] | None


def checked_config(config: ConfigLike, section: RetrievalConfig | None) -> RetrievalConfig:
    """The configuration of a retriever: `config`, or else the section of its rehearsal.

    Raises:
        ConfigError: There is neither.
    """
    if isinstance(config, RetrievalConfig):
        return config
    if config is not None:
        return RetrievalConfig(**config)
    if section is None:
        raise ConfigError(
            "rehearsal.retrieval is missing: it says which field is the embedding; add it, or give config"
        )
    return section


def prepare_queries(queries: ArrayLike | Tensor | None, width: int, metric: Metric) -> Float32Array:
    """Queries as `[n, width]` float32, of length 1 for the cosine; no queries for None.

    Args:
        queries: `[n, width]` numbers.
        width: Length of an embedding; 0 before the first row.
        metric: Metric of the index.

    Raises:
        BatchError: They are no vectors of that length, or hold NaN or infinity.
    """
    if queries is None:
        return np.zeros((0, width), dtype=np.float32)
    vectors = _as_vectors(queries)
    if vectors.ndim != 2 or (width and vectors.shape[1] != width):
        raise BatchError(f"queries have the shape {vectors.shape}; it has to be (queries, {width or 'width'})")
    if not np.isfinite(vectors).all():
        raise BatchError("queries hold NaN or infinity, so nothing is near to them")
    return normalized(vectors) if metric == "cosine" else vectors


def checked_k(k: int) -> int:
    """The number of rows for each query.

    Raises:
        BatchError: It is not a whole number, or below 1.
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
