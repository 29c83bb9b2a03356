"""Embeddings of a buffer's rows, and what filters look at, by slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.vector_index import known_rows
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.known_rows import Embed, KnownRows, columns_of, rows_at
from rehearsal_plugin.config import BufferConfig, RetrievalConfig
from rehearsal_plugin.errors import BatchError
from tests.helpers.retrieval_rows import batch_of, buffer_of, random

ROWS = 10
EVERY = np.arange(ROWS)


def known_of(buffer: RehearsalBuffer, embed: Embed | None = None, now: int = 1, **keys: Any) -> KnownRows:
    section = {"embedding": "embedding", "metric": "l2", **keys}
    known = KnownRows(buffer, RetrievalConfig.model_validate(section), embed)
    known.resize(len(buffer))
    known.take_over(np.arange(len(buffer)), now)
    return known


def doubled(rows: Mapping[str, Tensor]) -> Tensor:
    return 2 * rows["embedding"]


def test_vectors_are_those_of_the_field() -> None:
    vectors = random(ROWS)
    known = known_of(buffer_of(vectors))
    assert np.array_equal(known.vectors, vectors)
    np.testing.assert_allclose(known.lengths, np.linalg.norm(vectors, axis=1), rtol=1e-6)


def test_vectors_are_made_by_embed_where_it_is_given() -> None:
    vectors = random(ROWS)
    known = known_of(buffer_of(vectors), embed=doubled)
    assert known.field is None
    assert np.array_equal(known.vectors, 2 * vectors)


def test_rows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_rows, "READ_BYTES", 1)
    vectors = random(ROWS)
    assert np.array_equal(known_of(buffer_of(vectors)).vectors, vectors)


def test_vectors_have_length_one_where_cosines_are_compared() -> None:
    np.testing.assert_allclose(known_of(buffer_of(random(ROWS)), metric="cosine").lengths, 1, rtol=1e-6)


def test_the_width_is_known_once_a_row_was_embedded() -> None:
    buffer = buffer_of(random(ROWS))
    known = KnownRows(buffer, RetrievalConfig(metric="l2"), doubled)
    assert known.width == 0
    known.take_over(EVERY, now=1)
    assert known.width == 24


def test_a_vector_that_is_no_number_makes_its_row_unusable() -> None:
    vectors = random(ROWS)
    vectors[4, 2] = np.nan
    known = known_of(buffer_of(vectors))
    assert np.flatnonzero(~known.usable).tolist() == [4]
    allowed = known.allowed_slots(Where(), now=1)
    assert allowed is not None
    assert np.flatnonzero(~allowed).tolist() == [4]


def test_partition_origin_and_steps_are_told_of_each_row() -> None:
    known = known_of(buffer_of(random(ROWS), rank=3))
    partitions, origins, written, embedded = known.about(np.array([7, 2])).T.tolist()
    assert (partitions, origins, written, embedded) == ([2, 2], [3, 3], [1, 1], [1, 1])


def test_all_rows_count_without_conditions() -> None:
    assert known_of(buffer_of(random(ROWS))).allowed_slots(Where(), now=1) is None


def test_rows_that_meet_the_conditions_count() -> None:
    mask = known_of(buffer_of(random(ROWS))).allowed_slots(Where(partitions=[3]), now=1)
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [3, 8]


def test_rows_that_were_rolled_back_count_no_more() -> None:
    known = known_of(buffer_of(random(ROWS)))
    known.resize(4)
    assert known.count == 4
    assert not known.usable[4:].any()


def test_drift_is_that_of_the_embeddings_that_changed() -> None:
    buffer = buffer_of(np.eye(ROWS, 24, dtype=np.float32))
    known = known_of(buffer)
    assert known.drift == 0
    buffer.update_fields(np.array([2]), {"embedding": -torch.eye(24)[2:3]})
    known.take_over(EVERY, now=2)
    assert known.drift == pytest.approx(2)


def test_a_row_that_replaces_another_is_no_drift() -> None:
    buffer = buffer_of(random(ROWS), policy="fifo")
    known = known_of(buffer)
    buffer.offer(batch_of(random(ROWS, seed=1)))
    known.take_over(EVERY, now=2)
    assert known.drift == 0


def test_the_stalest_embeddings_are_the_oldest() -> None:
    known = known_of(buffer_of(random(ROWS)), embed=doubled)
    known.note_refreshed(np.array([0, 1, 2, 5, 6, 7, 8]), now=9)
    assert known.stalest(3).tolist() == [3, 4, 9]
    assert sorted(known.staleness(now=10).tolist()) == [1] * 7 + [9] * 3


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS - 1, 24), (ROWS, 3, 8)], ids=str)
def test_an_embedding_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BatchError, match=r"embed\(\) gave a tensor of shape"):
        known_of(buffer_of(random(ROWS)), embed=lambda rows: torch.zeros(shape))


def test_an_embedding_of_another_width_than_before_is_refused() -> None:
    known = known_of(buffer_of(random(ROWS)))
    with pytest.raises(BatchError, match="all of one length"):
        known.check_embeddings(torch.zeros(ROWS, 25), ROWS)


@pytest.mark.parametrize(("name", "reason"), [("missing", "rows have"), ("id", "int64"), ("label", "floating-point")])
def test_a_field_that_is_no_embedding_is_refused(name: str, reason: str) -> None:
    with pytest.raises(BatchError, match=reason):
        known_of(buffer_of(random(ROWS)), embedding=name)


def test_a_name_that_the_batch_and_what_is_recorded_share_is_refused() -> None:
    batch = batch_of(random(3))
    layout = RowLayout.infer(batch).with_state({"embedding": torch.zeros(3, 24)})
    with pytest.raises(BatchError, match=r"'embedding'.* both .* another name"):
        known_of(RehearsalBuffer(BufferConfig(capacity=3), layout))


def test_fields_of_rows_are_views_by_name() -> None:
    buffer = buffer_of(random(ROWS))
    rows = rows_at(buffer, np.array([5, 1]))
    columns = columns_of(buffer.layout, rows)
    assert columns["id"].tolist() == [5, 1]
    columns["id"].zero_()
    assert columns_of(buffer.layout, rows)["id"].tolist() == [0, 0]
