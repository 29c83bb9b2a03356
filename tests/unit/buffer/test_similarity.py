"""Scores of vectors: in double precision, the same whatever else is compared, and how far single precision is off."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from rehearsal_plugin.buffer.vector_index import similarity
from rehearsal_plugin.buffer.vector_index.similarity import error_bound, lengths_of, normalized, rank_by, scores_of
from tests.helpers.retrieval_rows import Vectors, random

EVERY = np.arange(30)[None].repeat(8, axis=0)


def exact(query: Vectors, vector: Vectors, squared_distance: bool) -> float:
    """By fractions, without rounding."""
    pairs = [(Fraction(float(a)), Fraction(float(b))) for a, b in zip(query, vector, strict=True)]
    return float(-sum((a - b) ** 2 for a, b in pairs) if squared_distance else sum(a * b for a, b in pairs))


@pytest.mark.parametrize("squared_distance", [False, True])
def test_scores_are_exact_to_double_precision(squared_distance: bool) -> None:
    queries, vectors = random(2), random(3, seed=1)
    scores = scores_of(queries, vectors, np.array([[2, 0], [1, 1]]), squared_distance=squared_distance)
    chosen = [(0, 2), (0, 0), (1, 1), (1, 1)]
    expected = [exact(queries[query], vectors[vector], squared_distance) for query, vector in chosen]
    np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("squared_distance", [False, True])
def test_scores_are_the_same_however_many_are_computed_at_once(
    squared_distance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, vectors = random(8), random(30, seed=1)
    together = scores_of(queries, vectors, EVERY, squared_distance=squared_distance)
    monkeypatch.setattr(similarity, "AT_ONCE", 1)
    assert np.array_equal(scores_of(queries, vectors, EVERY, squared_distance=squared_distance), together)
    alone = scores_of(queries[3:4], vectors, np.array([[7]]), squared_distance=squared_distance)
    assert alone[0, 0] == together[3, 7]


@pytest.mark.parametrize("squared_distance", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e6])
def test_single_precision_is_within_the_error_bound(squared_distance: bool, scale: float) -> None:
    queries, vectors = random(8) * np.float32(scale), random(30, seed=1) * np.float32(scale)
    rough = queries @ vectors.T
    if squared_distance:
        squares = (np.square(queries).sum(axis=1), np.square(vectors).sum(axis=1))
        rough = 2 * rough - squares[0][:, None] - squares[1]
    bound = error_bound(queries, float(lengths_of(vectors).max()), squared_distance=squared_distance)
    scores = scores_of(queries, vectors, EVERY, squared_distance=squared_distance)
    assert (np.abs(rough.astype(np.float64) - scores) <= bound[:, None]).all()


def test_nothing_is_known_of_single_precision_where_its_numbers_end() -> None:
    bound = error_bound(np.array([[1e30], [1.0]], dtype=np.float32), 1e20, squared_distance=False)
    assert np.isinf(bound).tolist() == [True, False]


def test_normalized_vectors_have_length_one_and_zeros_stay_zeros() -> None:
    vectors = normalized(np.array([[3, 4], [0, 0], [-1e20, 0]], dtype=np.float32))
    np.testing.assert_allclose(lengths_of(vectors), [1, 0, 1], rtol=1e-7)
    assert vectors.dtype == np.float32


def test_the_highest_score_comes_first_and_ties_decide_in_their_order() -> None:
    scores = np.array([[1.0, 3.0, 1.0, 1.0]])
    first, second = np.array([[5, 9, 4, 5]]), np.array([[2, 0, 3, 1]])
    assert rank_by(scores, first, second).tolist() == [[1, 2, 3, 0]]
