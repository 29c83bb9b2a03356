"""The index of one rank: exact where it says so, near enough elsewhere, and in step with the buffer."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import RehearsalBuffer, RowLayout
from rehearsal_plugin.buffer.vector_index import index as row_index
from rehearsal_plugin.buffer.vector_index.index import FEW
from rehearsal_plugin.buffer.vector_index.similarity import normalized
from rehearsal_plugin.config import BufferConfig, RetrievalConfig
from rehearsal_plugin.retrieval import RowIndex, Where
from tests.helpers.retrieval_rows import batch_of, brute_force, buffer_of, clustered, of_few_values, random

pytest.importorskip("faiss")

METRICS = ("inner_product", "cosine", "l2")


def index_of(buffer: RehearsalBuffer, **keys: Any) -> RowIndex:
    index = RowIndex(buffer, RetrievalConfig(**{"embedding": "embedding", "metric": "l2", **keys}))
    index.sync(now=1)
    return index


def embeddings(buffer: RehearsalBuffer) -> Any:
    """Of all rows by slot."""
    return buffer.layout.field("embedding").view(buffer.state_dict()["rows"]).numpy()


def ids(buffer: RehearsalBuffer, slots: Any) -> Any:
    every = buffer.layout.field("id").view(buffer.state_dict()["rows"]).numpy()
    return np.where(slots >= 0, every[slots], -1)


def prepared(queries: Any, metric: str) -> Any:
    return normalized(queries) if metric == "cosine" else queries


# --- exact search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 10), (20, 4), (3000, 10), (3000, 200)])
def test_flat_search_is_brute_force(metric: str, rows: int, k: int) -> None:
    buffer, queries = buffer_of(random(rows)), random(40, seed=1)
    found = index_of(buffer, metric=metric).search(prepared(queries, metric), k, Where(), now=1)
    scores, slots = brute_force(queries, embeddings(buffer), k, metric)
    known = scores.shape[1]
    assert np.array_equal(found.slots[:, :known], slots)
    np.testing.assert_allclose(found.scores[:, :known], scores, rtol=1e-6, atol=1e-6)
    assert (found.slots[:, known:] == -1).all()
    assert np.isneginf(found.scores[:, known:]).all()


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_equally_near_rows_come_in_the_order_of_their_slots_however_many_there_are(metric: str) -> None:
    buffer, queries = buffer_of(of_few_values(2000)), of_few_values(30, seed=1)
    found = index_of(buffer, metric=metric).search(queries, 25, Where(), now=1)
    scores, slots = brute_force(queries, embeddings(buffer), 25, metric)
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(found.slots, slots)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_differ_in_the_last_bit_are_told_apart_as_in_double_precision(metric: str) -> None:
    base = np.abs(random(1)) + 1
    vectors = np.repeat(base, 400, axis=0)
    vectors[np.arange(400), np.arange(400) % 24] *= 1 + np.arange(400, dtype=np.float32) * 2**-23
    buffer = buffer_of(vectors)
    near = prepared(embeddings(buffer), metric)  # what is compared are vectors in single precision
    found = index_of(buffer, metric=metric).search(prepared(base, metric), 10, Where(), now=1)
    scores, slots = brute_force(prepared(base, metric), near, 10, "l2" if metric == "l2" else "inner_product")
    assert np.array_equal(found.slots, slots)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-14)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [10, 500])
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e18, 1e19, 1e25, 1e37])
def test_flat_search_is_brute_force_where_single_precision_ends(metric: str, rows: int, scale: float) -> None:
    large, moderate = random(3, seed=1) * np.float32(scale), random(3, seed=2)
    buffer, queries = buffer_of(random(rows) * np.float32(scale)), np.concatenate((large, moderate, 0 * moderate[:1]))
    found = index_of(buffer, metric=metric).search(prepared(queries, metric), 6, Where(), now=1)
    near = prepared(embeddings(buffer), metric)
    scores, slots = brute_force(prepared(queries, metric), near, 6, "l2" if metric == "l2" else "inner_product")
    assert np.array_equal(found.slots, slots)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-12)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_memory_does_not_grow_with_all_that_is_compared(kind: str) -> None:
    queries, width, k = 400, 256, 200
    index = index_of(buffer_of(random(3000, width=width)), index=kind, exact_below=100, probes=10_000)
    asked = random(queries, seed=1, width=width)
    tracemalloc.start()
    found = index.search(asked, k, Where(), now=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.slots.shape == (queries, k)
    assert peak < queries * k * width * 4 / 2, "less than half of the vectors of all rows found"


def test_a_score_does_not_depend_on_what_else_is_searched() -> None:
    vectors, queries = random(3000, width=384), random(40, seed=1, width=384)
    together = index_of(buffer_of(vectors)).search(queries, 10, Where(), now=1)
    alone = [index_of(buffer_of(vectors[:1777])).search(query[None], 10, Where(), now=1) for query in queries[:5]]
    for query, found in enumerate(alone):
        both = np.intersect1d(found.slots[0], together.slots[query])
        one, other = found.scores[0][np.isin(found.slots[0], both)], together.scores[query]
        assert len(both), "there is something to compare"
        assert set(one.tolist()) <= set(other.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_any_floating_point_type_can_be_searched(dtype: torch.dtype) -> None:
    batch = batch_of(random(50))
    batch["embedding"] = batch["embedding"].to(dtype)
    buffer = RehearsalBuffer(BufferConfig(capacity=50), RowLayout.infer(batch))
    buffer.offer(batch)
    queries = batch["embedding"][:7].float().numpy()
    found = index_of(buffer).search(queries, 1, Where(), now=1)
    assert ids(buffer, found.slots).flatten().tolist() == list(range(7))


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_filters_leave_only_rows_that_meet_all_conditions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch_of(random(60, seed=step), first_id=100 * step) for step in range(5)]
    buffer = RehearsalBuffer(BufferConfig(capacity=300, partition_by="label"), RowLayout.infer(batches[0]), rank=3)
    for batch in batches:
        buffer.offer(batch)
    index = index_of(buffer, index=kind, exact_below=20)
    queries, every = random(10, seed=9), ids(buffer, np.arange(300))
    conditions = [
        (Where(partitions={1, 3}), np.isin(every % 5, [1, 3])),
        (Where(partitions=[7]), np.zeros(300, dtype=bool)),
        (Where(max_age=1), every >= 300),  # the buffer counts its offers from 1, and now is 5
        (Where(min_age=3), every < 200),
        (Where(min_age=1, max_age=2, partitions=[0]), (every >= 200) & (every < 400) & (every % 5 == 0)),
        (Where(origins=[3]), np.ones(300, dtype=bool)),
        (Where(origins=[0, 1]), np.zeros(300, dtype=bool)),
    ]
    for (where, counted), few in itertools.product(conditions, (0, FEW)):
        monkeypatch.setattr(row_index, "FEW", few)
        found = index.search(queries, 100, where, now=5)
        _, slots = brute_force(queries, embeddings(buffer), 100, "l2", counted)
        assert np.array_equal(np.sort(found.slots), np.sort(slots)) or kind != "flat", where
        assert counted[found.slots[found.slots >= 0]].all(), where
        assert ((found.slots >= 0).sum(axis=1) == min(100, counted.sum())).all(), where


# --- in step with the buffer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_the_index_follows_admissions_and_evictions(kind: str) -> None:
    batch = batch_of(random(40))
    buffer = RehearsalBuffer(BufferConfig(capacity=150, policy="random_replace"), RowLayout.infer(batch))
    index = index_of(buffer, index=kind, exact_below=20, probes=1000)
    for step in range(25):
        vectors = random(40, seed=step)
        buffer.offer(batch_of(vectors, first_id=100 * step))
        assert index.sync(now=step) > 0
        own = embeddings(buffer)
        found = index.search(own, 1, Where(), now=step)
        assert found.slots.flatten().tolist() == list(range(len(buffer))), "every row that is stored is found"
        if kind != "hnsw":  # with all its lists an inverted file is exact, too
            assert np.array_equal(
                index.search(vectors, 7, Where(), now=step).slots, brute_force(vectors, own, 7, "l2")[1]
            )
    assert index.rows == 150
    assert index.sync(now=25) == 0, "nothing is done twice"


def test_the_index_and_incremental_checkpoints_do_not_disturb_each_other() -> None:
    buffer = buffer_of(random(10), capacity=20)
    assert len(buffer.take_changed()) == 10
    index = index_of(buffer)
    assert index.rows == 10
    assert len(buffer.take_changed()) == 0
    buffer.offer(batch_of(random(5, seed=1)))
    assert buffer.take_changed().tolist() == [10, 11, 12, 13, 14]
    assert index.sync(now=2) == 5
    buffer.offer(batch_of(random(2, seed=2)))
    assert index.sync(now=3) == 2
    assert buffer.take_changed().tolist() == [15, 16]


def test_a_buffer_that_was_rolled_back_is_followed_too() -> None:
    vectors = random(30)
    buffer = buffer_of(vectors[:10], capacity=12)
    index = index_of(buffer)
    buffer.commit()
    buffer.offer(batch_of(vectors[10:], first_id=10))
    index.sync(now=2)
    buffer.rollback()
    index.sync(now=3)
    assert index.rows == 10
    found = index.search(vectors, 1, Where(), now=3)
    assert np.array_equal(found.slots, brute_force(vectors, vectors[:10], 1, "l2")[1])


def test_an_embedding_that_is_updated_is_found_in_its_new_place() -> None:
    buffer = buffer_of(random(100))
    index = index_of(buffer)
    new = random(3, seed=5) + 50
    buffer.update_fields(np.array([4, 8, 15]), {"embedding": torch.from_numpy(new)})
    assert index.sync(now=7) == 3
    assert index.search(new, 1, Where(), now=7).slots.flatten().tolist() == [4, 8, 15]
    assert sorted(index.staleness(now=7).tolist())[:3] == [0, 0, 0]
    assert index.drift > 0


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_rows_whose_embedding_is_no_number_are_not_found_until_they_have_one(kind: str) -> None:
    vectors = random(60)
    vectors[7, 3], vectors[9, 0] = np.nan, np.inf
    buffer = buffer_of(vectors)
    index = index_of(buffer, index=kind, exact_below=10)
    assert (index.rows, index.skipped) == (58, 2)
    found = index.search(random(5, seed=2), 60, Where(), now=1)
    assert not np.isin([7, 9], found.slots).any()
    assert ((found.slots >= 0).sum(axis=1) == 58).all()
    buffer.update_fields(np.array([7]), {"embedding": torch.ones(1, 24)})
    index.sync(now=2)
    assert index.search(np.ones((1, 24), dtype=np.float32), 1, Where(), now=2).slots.tolist() == [[7]]


def test_a_row_that_was_replaced_since_is_told_when_it_is_read() -> None:
    buffer = buffer_of(random(10), policy="random_replace")
    index = index_of(buffer)
    buffer.offer(batch_of(random(4, seed=1), first_id=100))
    rows, gone = index.read(np.arange(10))
    new = ids(buffer, np.arange(10)) >= 100
    assert gone.tolist() == np.flatnonzero(new).tolist()
    assert len(rows) == 10
    index.forget(gone)
    assert not np.isin(index.search(random(3), 10, Where(), now=1).slots, gone).any()


# --- IVF and HNSW ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_at_ten_is_095_with_the_default_settings(kind: str, metric: str) -> None:
    vectors, queries = clustered(12_000), clustered(100, seed=1)
    buffer = buffer_of(vectors)
    found = index_of(buffer, metric=metric, index=kind).search(prepared(queries, metric), 10, Where(), now=1)
    _, slots = brute_force(queries, embeddings(buffer), 10, metric)
    recall = np.mean([np.isin(one, other).mean() for one, other in zip(found.slots, slots, strict=True)])
    assert recall >= 0.95
    assert np.all(np.diff(found.scores, axis=1) <= 0), "the nearest come first, by exact scores"
