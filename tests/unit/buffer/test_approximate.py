"""IVF and HNSW: rows come and go, and an index that has become too long says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin.buffer.vector_index.approximate import Approximate
from rehearsal_plugin.config import RetrievalConfig
from tests.helpers.retrieval_rows import Vectors, random

pytest.importorskip("faiss")

KINDS = ["ivf", "hnsw"]
ROWS, CAPACITY = 60, 100


def index_of(vectors: Vectors, kind: str, **keys: Any) -> Approximate:
    """The vectors at slots 0, 1, 2, ...; wide searches that find every row of so few."""
    section = {"embedding": "x", "metric": "l2", "index": kind, "probes": 1000, "search_width": 1000, **keys}
    return Approximate(RetrievalConfig.model_validate(section), vectors, np.arange(len(vectors)), CAPACITY)


def found(index: Approximate, queries: Vectors, k: int = 1, allowed: Any = None) -> list[list[int]]:
    slots: list[list[int]] = index.search(queries, k, allowed).tolist()
    return slots


@pytest.mark.parametrize("kind", KINDS)
def test_every_vector_is_nearest_to_itself(kind: str) -> None:
    vectors = random(ROWS)
    assert found(index_of(vectors, kind), vectors) == [[slot] for slot in range(ROWS)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_that_was_added_takes_the_place_of_the_one_before(kind: str) -> None:
    vectors, new = random(ROWS), random(2, seed=1) + 50
    index = index_of(vectors, kind)
    index.add(new, np.array([3, 99]))
    assert found(index, new) == [[3], [99]]
    assert 3 not in found(index, vectors[3:4], k=ROWS - 1)[0][:1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_that_was_removed_is_not_found(kind: str) -> None:
    vectors = random(ROWS)
    index = index_of(vectors, kind)
    index.remove(np.array([5, 7, 99]))
    slots = found(index, vectors[5:6], k=ROWS)[0]
    assert sorted(slots) == [-1, -1, *(slot for slot in range(ROWS) if slot not in (5, 7))]


@pytest.mark.parametrize("kind", KINDS)
def test_only_allowed_slots_are_found(kind: str) -> None:
    vectors, allowed = random(ROWS), np.zeros(CAPACITY, dtype=bool)
    allowed[[2, 30]] = True
    slots = found(index_of(vectors, kind), vectors[:1], k=4, allowed=allowed)[0]
    assert sorted(slots) == [-1, -1, 2, 30]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_outdated_once_enough_rows_were_replaced(kind: str) -> None:
    index = index_of(random(ROWS), kind, rebuild=0.5)
    index.add(random(ROWS // 2, seed=1), np.arange(ROWS // 2))
    assert not index.outdated
    index.add(random(1, seed=2), np.array([0]))
    assert index.outdated


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_added_changes_nothing(kind: str) -> None:
    vectors = random(ROWS)
    index = index_of(vectors, kind)
    index.add(vectors[:0], np.arange(0))
    assert found(index, vectors[:2]) == [[0], [1]]
