"""Exact search over vectors: brute force by definition, ties and numbers beyond single precision included."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.buffer.vector_index import exact
from rehearsal_plugin.buffer.vector_index.exact import MARGIN, nearest_vectors
from rehearsal_plugin.buffer.vector_index.similarity import lengths_of
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from tests.helpers.retrieval_rows import Vectors, brute_force, of_few_values, random

pytest.importorskip("faiss")

METRICS = {False: "inner_product", True: "l2"}


def search(queries: Vectors, vectors: Vectors, k: int, squared_distance: bool) -> tuple[Float64Array, IntArray]:
    return nearest_vectors(queries, vectors, lengths_of(vectors), k, squared_distance=squared_distance)


@pytest.mark.parametrize("squared_distance", METRICS)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 10), (MARGIN + 3, 3), (MARGIN + 4, 3), (1000, 50)])
def test_the_nearest_are_those_of_brute_force(rows: int, k: int, squared_distance: bool) -> None:
    queries, vectors = random(20), random(rows, seed=1)
    scores, index = search(queries, vectors, k, squared_distance)
    expected, places = brute_force(queries, vectors, k, METRICS[squared_distance])
    assert np.array_equal(index, places)
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("squared_distance", METRICS)
def test_of_equally_near_ones_the_first_are_found_though_there_are_more_than_the_margin(squared_distance: bool) -> None:
    vectors = np.repeat(of_few_values(1), 5 * MARGIN, axis=0)
    _, index = search(of_few_values(4, seed=1), vectors, 3, squared_distance)
    assert index.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("squared_distance", METRICS)
def test_candidates_that_come_near_enough_are_scored_in_parts(
    squared_distance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, vectors = of_few_values(10), of_few_values(500, seed=1)
    together = search(queries, vectors, 20, squared_distance)
    monkeypatch.setattr(exact, "AT_ONCE", 7)
    np.testing.assert_equal(search(queries, vectors, 20, squared_distance), together)


@pytest.mark.parametrize("squared_distance", METRICS)
def test_numbers_too_large_for_single_precision_are_compared_in_double(squared_distance: bool) -> None:
    queries, vectors = random(4) * np.float32(1e25), random(100, seed=1) * np.float32(1e25)
    _, index = search(queries, vectors, 5, squared_distance)
    assert np.array_equal(index, brute_force(queries, vectors, 5, METRICS[squared_distance])[1])


@pytest.mark.parametrize(("queries", "rows", "k", "shape"), [(0, 5, 3, (0, 3)), (4, 0, 3, (4, 0)), (4, 5, 0, (4, 0))])
def test_nothing_asked_for_is_nothing_found(queries: int, rows: int, k: int, shape: tuple[int, int]) -> None:
    scores, index = search(random(queries), random(rows), k, squared_distance=True)
    assert scores.shape == index.shape == shape
