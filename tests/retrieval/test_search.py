"""A search over all ranks gives what one exact search over all rows would give, and the rows themselves."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import (
    BatchError,
    ClosedError,
    ConfigError,
    ExchangeError,
    ExchangeTimeout,
    Rehearsal,
    TorchDistributedTransport,
)
from rehearsal_plugin.distributed.transport import LocalTransport, Transport
from rehearsal_plugin.retrieval import Retrieved, Retriever, RowIndex, Where
from tests.helpers.exits import run_exits
from tests.helpers.horovod_ranks import perform, run_horovod
from tests.helpers.ranks import run_ranks
from tests.helpers.retrieval_rows import batch_of, brute_force, buffer_of, of_few_values, random

pytest.importorskip("faiss")

ROWS, K = (300, 90, 0, 5), 12
METRICS = ("inner_product", "cosine", "l2")
MAKERS = {"random": random, "of_few_values": of_few_values}


def section(**keys: Any) -> dict[str, Any]:
    return {"embedding": "embedding", "metric": "l2", **keys}


def rows_of(rank: int, kind: str) -> Any:
    """What a rank holds; the third of four has one row, so that it has a layout."""
    return MAKERS[kind](max(1, ROWS[rank]), seed=rank)


def union(size: int, kind: str) -> tuple[Any, Any, Any]:
    """All embeddings in the order of ranks and slots, and rank and slot of each."""
    parts = [rows_of(rank, kind) for rank in range(size)]
    ranks = np.repeat(np.arange(size), [len(part) for part in parts])
    return np.concatenate(parts), ranks, np.concatenate([np.arange(len(part)) for part in parts])


def queries_of(rank: int, turn: int, kind: str) -> Any:
    """Every rank has another number of queries in every turn, often none."""
    return MAKERS[kind]((3 * rank + 5 * turn) % 4 * 2, seed=1000 + 10 * turn + rank)


def agrees(found: Retrieved, size: int, queries: Any, metric: str, kind: str, k: int) -> None:
    """Every rank and slot, and every row, is that of brute force over the rows of all ranks."""
    every, ranks, slots = union(size, kind)
    scores, places = brute_force(queries, every, k, metric)
    width = places.shape[1]
    np.testing.assert_array_equal(found.rank[:, :width], ranks[places])
    np.testing.assert_array_equal(found.slot[:, :width], slots[places])
    np.testing.assert_allclose(found.scores[:, :width], scores, rtol=1e-5, atol=1e-6)
    assert (found.slot[:, width:] == -1).all()
    fields = found.fields()
    assert np.array_equal(fields["embedding"].numpy()[:, :width], every[places])
    assert np.array_equal(fields["id"].numpy()[:, :width], slots[places])
    assert np.array_equal(found.partition[:, :width], slots[places] % 5)
    assert np.array_equal(found.origin[:, :width], ranks[places])
    assert not fields["embedding"].numpy()[:, width:].any()


def searches(make: Callable[[], Transport] | None = None) -> int:
    transport = None if make is None else make()
    rank, size = (dist.get_rank(), dist.get_world_size()) if transport is None else (transport.rank, transport.size)
    for kind, metrics in (("random", METRICS), ("of_few_values", ("inner_product", "l2"))):
        for metric in metrics:
            own = transport if transport is not None else None
            with Retriever(
                buffer_of(rows_of(rank, kind), rank=rank), section(metric=metric), transport=own
            ) as retriever:
                for turn in range(4):
                    queries = queries_of(rank, turn, kind)
                    k = K + rank  # ranks may want different numbers of rows
                    agrees(retriever.search(queries, k), size, queries, metric, kind, k)
                collectives = int(retriever.metrics()["collectives"])
            transport = None if make is None else make()
    return collectives


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_together_find_what_brute_force_over_all_rows_finds(size: int) -> None:
    (collectives, *_) = run_ranks(searches, size, timeout_s=180)
    # Three a search; the queries twice where a request is the largest so far; none for the rows where nobody asks.
    assert collectives <= (4 * 4 if size > 1 else 0)


def alone() -> None:
    queries = random(10, seed=1)
    with Retriever(buffer_of(rows_of(0, "random")), section(), transport=LocalTransport()) as retriever:
        agrees(retriever.search(queries, K), 1, queries, "l2", "random", K)


def test_one_process_alone_needs_no_group() -> None:
    alone()


def under_horovod() -> None:
    from rehearsal_plugin import HorovodTransport

    searches(HorovodTransport)
    retriever = Retriever(buffer_of(random(5)), section(), transport=HorovodTransport())
    with retriever, pytest.raises(ConfigError, match=r"use search\(\)"):
        retriever.submit(random(1))


@pytest.mark.horovod
def test_it_works_under_horovod() -> None:
    pytest.importorskip("horovod.torch")
    run_horovod(perform, 2, {"under_horovod": under_horovod}, timeout_s=180)


# --- filters ---------------------------------------------------------------------------------------------------------


def filtered() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    conditions = [Where(origins=[1]), Where(partitions=[2, 4], origins=[0, 1]), Where(min_age=1)]
    with Retriever(buffer_of(rows_of(rank, "random"), rank=rank), section(), now=1) as retriever:
        for turn in range(3):
            where = conditions[(turn + rank) % 3]  # each rank filters for its own queries
            queries = random(6, seed=turn)
            found = retriever.search(queries, K, where)
            every, ranks, slots = union(size, "random")
            mask = where.mask(slots % 5, ranks, np.ones(len(every), dtype=np.int64), now=1)
            _, places = brute_force(queries, every, K, "l2", mask)
            expected = np.where(places >= 0, slots[places], -1)
            assert np.array_equal(found.slot, expected)


def test_each_rank_may_filter_for_its_own_queries() -> None:
    run_ranks(filtered, 2)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def refused_on_one() -> tuple[str, str, bool]:
    rank = dist.get_rank()
    queries = random(3)
    if rank == 0:
        queries[1, 1] = np.nan
    with Retriever(buffer_of(random(50), rank=rank), section(), timeout_s=20.0) as retriever:
        with pytest.raises((BatchError, ExchangeError)) as caught:
            retriever.search(queries)
        after = retriever.search(random(3))
        return type(caught.value).__name__, str(caught.value), bool((after.found == 10).all())


def test_queries_that_one_rank_cannot_search_are_an_error_on_all_and_the_next_search_works() -> None:
    (own, message, first), (other, told, second) = run_ranks(refused_on_one, 2)
    assert (own, other) == ("BatchError", "ExchangeError")
    assert "NaN" in message
    assert "rank 0" in told
    assert "NaN" in told
    assert first
    assert second


def without_embeddings_on_one() -> tuple[str, str]:
    rank = dist.get_rank()
    width = 3 if rank == 0 else 24

    def embed(columns: Any) -> torch.Tensor:
        return torch.flatten(columns["embedding"][:, :width], 0 if width < 24 else 1).clone()

    with Retriever(buffer_of(random(50), rank=rank), {"metric": "l2"}, embed=embed, timeout_s=20.0) as retriever:
        with pytest.raises((BatchError, ExchangeError)) as caught:
            retriever.search(random(3))
        width = 24
        assert (retriever.search(random(3)).found == 10).all()
        return type(caught.value).__name__, str(caught.value)


def test_embeddings_that_one_rank_cannot_make_are_an_error_on_all_and_the_next_search_works() -> None:
    (own, message), (other, told) = run_ranks(without_embeddings_on_one, 2, timeout_s=60)
    assert (own, other) == ("BatchError", "ExchangeError")
    assert "one vector a row" in message
    assert "rank 0" in told
    assert "one vector a row" in told


def failing_on_one() -> tuple[str, str]:
    broken = dist.get_rank() == 0

    def embed(columns: Any) -> torch.Tensor:
        if broken:
            raise KeyError("attention_mask")
        return torch.as_tensor(columns["embedding"]).clone()

    with Retriever(buffer_of(random(50)), {"metric": "l2"}, embed=embed, timeout_s=20.0) as retriever:
        with pytest.raises((KeyError, ExchangeError)) as caught:
            retriever.search(random(3))
        broken = False
        assert (retriever.search(random(3)).found == 10).all()
        return type(caught.value).__name__, str(caught.value)


def test_a_model_that_fails_on_one_rank_is_an_error_on_all_and_the_next_search_works() -> None:
    (own, _), (other, told) = run_ranks(failing_on_one, 2, timeout_s=60)
    assert (own, other) == ("KeyError", "ExchangeError")
    assert "rank 0 could not take part: KeyError('attention_mask')" in told


def different(rank_keys: dict[int, Any], width: int) -> str:
    rank = dist.get_rank()
    vectors = random(20, width=width if rank else 24)
    with Retriever(buffer_of(vectors), section(**rank_keys.get(rank, {})), timeout_s=20.0) as retriever:
        with pytest.raises(ExchangeError) as caught:
            retriever.search(None)
        return str(caught.value)


@pytest.mark.parametrize(("keys", "width", "told"), [({1: {"metric": "cosine"}}, 24, "metric"), ({}, 25, "fields")])
def test_ranks_that_do_not_fit_together_are_told_so(keys: dict[int, Any], width: int, told: str) -> None:
    messages = run_ranks(different, 2, keys, width)
    assert all(told in message for message in messages)


def late() -> str:
    with Retriever(buffer_of(random(20)), section(), timeout_s=1.5) as retriever:
        if dist.get_rank() == 1:
            dist.barrier()
            return ""
        start = time.monotonic()
        with pytest.raises(ExchangeTimeout) as caught:
            retriever.search(random(2))
        assert time.monotonic() - start < 20
        with pytest.raises(ExchangeError, match="earlier search failed"):
            retriever.search(random(2))
        dist.barrier()
        return str(caught.value)


def test_a_rank_that_does_not_search_is_a_timeout_that_names_rank_and_search() -> None:
    assert "rank 0 at search 0" in run_ranks(late, 2)[0]


class Renumbered(LocalTransport):
    """One of a job that has lost ranks since it was made."""

    outdated = True


def test_ranks_that_were_numbered_anew_are_told_to_make_another_retriever() -> None:
    retriever = Retriever(buffer_of(random(5)), section(), transport=Renumbered())
    with retriever, pytest.raises(ExchangeError, match="make a new one"):
        retriever.search(random(1))


def test_a_closed_retriever_says_so() -> None:
    retriever = Retriever(buffer_of(random(5)), section(), transport=LocalTransport())
    retriever.close()
    retriever.close()
    with pytest.raises(ClosedError):
        retriever.search(random(1))


@pytest.mark.parametrize(
    "queries", [np.zeros(24), np.zeros((2, 23)), np.full((1, 24), np.inf), [[1.0, 2.0], [3.0]], [["word"] * 24], {}]
)
def test_queries_that_are_no_vectors_are_refused(queries: Any) -> None:
    with Retriever(buffer_of(random(5)), section(), transport=LocalTransport()) as retriever:
        with pytest.raises(BatchError, match="queries"):
            retriever.search(queries)
        with pytest.raises(BatchError, match="at least one"):
            retriever.search(random(1), k=0)


def test_whole_numbers_of_numpy_are_as_good_as_any() -> None:
    numbers: Any = np.arange(8)
    ages = Where(partitions=numbers[2:4], origins={numbers[0]}, min_age=numbers[0], max_age=numbers[7])
    with Retriever(buffer_of(random(30)), section(), transport=LocalTransport()) as retriever:
        found = retriever.search(random(2), numbers[4], ages)
    assert found.slot.shape == (2, 4)
    assert np.isin(found.partition, [2, 3]).all()


@pytest.mark.parametrize("k", ["x", 1.5, None, 0, -1])
def test_a_number_of_rows_is_a_whole_number_above_zero(k: Any) -> None:
    with Retriever(buffer_of(random(5)), section(), transport=LocalTransport()) as retriever:
        with pytest.raises(BatchError, match=r"at least one|whole number"):
            retriever.search(random(1), k)
        assert retriever.search(random(1), 1).found == 1


@pytest.mark.parametrize("conditions", [{"partitions": ["x"]}, {"origins": 3}, {"min_age": 0.5}, {"max_age": "1"}])
def test_a_filter_takes_whole_numbers(conditions: Any) -> None:
    with pytest.raises(BatchError, match=f"{next(iter(conditions))} .* whole number"):
        Where(**conditions)


def test_queries_may_be_views_that_are_negated_when_they_are_read() -> None:
    queries = torch.randn(3, 24, dtype=torch.complex64).conj().imag
    with Retriever(buffer_of(random(30)), section(), transport=LocalTransport()) as retriever:
        assert np.array_equal(retriever.search(queries, 5).slot, retriever.search(queries.clone(), 5).slot)


# --- beside training -------------------------------------------------------------------------------------------------


def held_by_all(rehearsal: Rehearsal) -> tuple[Any, Any, Any]:
    """Embeddings, ranks and slots of all rows of all ranks; between two steps."""
    assert rehearsal.buffer is not None
    rehearsal.drain()
    parts: list[Any] = [None] * dist.get_world_size()
    own = rehearsal.buffer.layout.field("embedding").view(rehearsal.buffer.state_dict()["rows"])
    dist.all_gather_object(parts, own.numpy())
    ranks = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts), ranks, np.concatenate([np.arange(len(part)) for part in parts])


def beside_training() -> int:
    """Searches in the background while rows come and go; every answer is that of the moment when it was asked for."""
    rank = dist.get_rank()
    config = {"buffer": {"capacity": 60, "policy": "fifo"}, "representatives": 4, "retrieval": section()}
    checked = 0
    with Rehearsal(config) as rehearsal, Retriever(rehearsal) as retriever:
        rehearsal.update(batch_of(random(16, seed=rank)))
        for step in range(1, 12):
            every, ranks, slots = held_by_all(rehearsal)
            queries = random(7, seed=7000 + step + rank)
            answer = retriever.submit(queries, 5)
            if step < 3:  # there is room, and no row is replaced
                rehearsal.update(batch_of(random(16, seed=100 * step + rank)))
                found = answer.result(60)
            else:
                found = answer.result(60)
                rehearsal.update(batch_of(random(16, seed=100 * step + rank)))
            _, places = brute_force(queries, every, 5, "l2")
            assert np.array_equal(found.rank, ranks[places])
            assert np.array_equal(found.slot, slots[places])
            assert np.array_equal(found.fields()["embedding"].numpy(), every[places])
            checked += 1
    return checked


def test_searches_in_the_background_leave_training_alone() -> None:
    assert run_ranks(beside_training, 2) == [11, 11]


def racing() -> int:
    """Rows are replaced while they are searched for; whatever comes back is whole, and was stored when it was asked."""
    config = {"buffer": {"capacity": 200, "policy": "random_replace"}, "representatives": 8, "retrieval": section()}
    later = 0
    with Rehearsal(config) as rehearsal, Retriever(rehearsal) as retriever:
        for step in range(0, 120, 2):
            rehearsal.update(numbered(step))
            answer = retriever.submit(signature(np.arange(4) + step), 20)
            rehearsal.update(numbered(step + 1))
            found = answer.result(60)
            ids = found.fields()["id"].numpy()
            assert np.array_equal(found.fields()["embedding"].numpy(), signature(ids))
            assert (ids // 32 <= step).all()
            assert len(np.unique(1000 * ids[0] + found.rank[0])) == 20, (
                "both ranks see the same rows, and none comes twice"
            )
            later += int((ids // 32 % 2 == 1).sum())
    return later


def signature(ids: Any) -> Any:
    return np.sin(ids[..., None] * np.arange(1, 25)).astype(np.float32)


def numbered(step: int) -> dict[str, torch.Tensor]:
    ids = np.arange(32) + 32 * step
    return batch_of(signature(ids), first_id=32 * step)


def test_rows_that_are_replaced_during_a_search_come_back_whole_or_not_at_all() -> None:
    assert run_ranks(racing, 2)[0] > 0


def test_a_search_that_is_asked_for_meanwhile_does_not_change_what_an_earlier_one_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reading, may_go_on = RowIndex.read, threading.Event(), threading.Event()

    def read_late(index: RowIndex, slots: Any) -> Any:
        reading.set()
        may_go_on.wait(0.5)  # long enough for all that the training thread does meanwhile, if it does not wait
        return read(index, slots)

    monkeypatch.setattr(RowIndex, "read", read_late)
    config = {"buffer": {"capacity": 20, "policy": "fifo"}, "retrieval": section()}
    queries = random(1)
    with (
        Rehearsal(config, LocalTransport()) as rehearsal,
        Retriever(rehearsal, transport=LocalTransport()) as retriever,
    ):
        rehearsal.update(batch_of(random(20)))
        first = retriever.submit(queries, 3)
        assert reading.wait(20)
        rehearsal.update(batch_of(random(10, seed=1), first_id=100))
        second = retriever.submit(queries, 3)
        may_go_on.set()
        for answer in (first.result(20), second.result(20)):
            fields = answer.fields()
            scores = -np.square(fields["embedding"][0].numpy().astype(np.float64) - queries).sum(axis=1)
            np.testing.assert_allclose(answer.scores[0], scores, rtol=1e-6, err_msg="scores of other rows")
        assert (first.result().fields()["id"] < 100).all(), "a row that came later was found"


def test_a_search_in_the_background_cannot_be_cancelled_as_other_ranks_count_on_it() -> None:
    with Retriever(buffer_of(random(20)), section(), transport=LocalTransport()) as retriever:
        answers = [retriever.submit(random(1), 3) for _ in range(50)]
        assert not any(answer.cancel() for answer in answers)
        assert all((answer.result(20).found == 3).all() for answer in answers)
        assert (retriever.search(random(1), 3).found == 3).all()


def end_in_a_search(rank: int) -> None:
    retriever = Retriever(buffer_of(random(20)), section(), timeout_s=60.0)
    if rank == 0:
        retriever.submit(random(2), 3)
    else:
        time.sleep(2)  # there, and does not search


def test_a_process_may_end_in_a_search_that_is_not_answered() -> None:
    ends = run_exits([end_in_a_search])[end_in_a_search.__name__]
    assert [(end["code"], end["stderr"]) for end in ends] == [(0, ""), (0, "")]
    assert ends[0]["seconds"] < ends[1]["seconds"]


def test_a_retriever_that_was_closed_is_kept_by_nobody() -> None:
    retriever = Retriever(buffer_of(random(20)), section(), transport=LocalTransport())
    retriever.submit(random(1), 3).result(20)
    kept = weakref.ref(retriever)
    retriever.close()
    del retriever
    gc.collect()
    assert kept() is None


def test_a_gloo_transport_of_ones_own_may_be_given() -> None:
    run_ranks(with_own_transport, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_backend_is_the_one_that_the_rehearsal_was_told() -> None:
    run_ranks(with_backend, 1)


def with_backend() -> None:
    config = {"exchange": {"backend": "nccl"}, "retrieval": section()}
    with Rehearsal(config, LocalTransport()) as rehearsal, pytest.raises(ConfigError, match="'nccl'"):
        Retriever(rehearsal)


def with_own_transport() -> None:
    transport = TorchDistributedTransport(timeout_s=20.0)
    with Retriever(buffer_of(random(30), rank=transport.rank), section(), transport=transport) as retriever:
        assert (retriever.search(random(2), 5).found == 5).all()
