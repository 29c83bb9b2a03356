"""Totals of a rank: counted, timed, saved and loaded."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from rehearsal_plugin.core import metrics as metrics_module
from rehearsal_plugin.core.metrics import MOST_PARTITIONS_SHOWN, MOST_PENDING, Metrics, few_partitions


def test_all_totals_begin_at_zero() -> None:
    assert set(Metrics().flat().values()) == {0}


def test_time_is_added_in_milliseconds() -> None:
    metrics = Metrics()
    for _ in range(2):
        with metrics.timed("waited_ms"):
            time.sleep(0.01)
    assert 20 <= metrics.waited_ms < 2000


def test_time_counts_though_an_error_ends_it() -> None:
    metrics = Metrics()
    with pytest.raises(ZeroDivisionError), metrics.timed("drawn_ms"):
        _ = 1 // metrics.steps
    assert metrics.drawn_ms > 0


def test_replayed_rows_are_counted_by_partition() -> None:
    metrics = Metrics()
    metrics.count_replayed(np.array([3, -1, 3]))
    metrics.count_replayed(np.array([3]))
    flat = metrics.flat()
    assert (flat["rows_replayed/3"], flat["rows_replayed/-1"]) == (3, 1)


def test_tokens_of_new_and_replayed_rows_are_counted_apart() -> None:
    metrics = Metrics()
    metrics.count_tokens(torch.tensor([5, 7, 11]), new=2, keys=None)
    flat = metrics.flat()
    assert (flat["tokens_new"], flat["tokens_replayed"]) == (12, 11)


def test_tokens_are_counted_by_partition() -> None:
    metrics = Metrics()
    metrics.count_tokens(torch.tensor([5, 7, 11]), new=2, keys=np.array([0, 4, 4]))
    flat = metrics.flat()
    assert (flat["tokens_new/0"], flat["tokens_new/4"], flat["tokens_replayed/4"]) == (5, 7, 11)


def test_tokens_wait_on_the_device_for_a_bounded_number_of_micro_batches() -> None:
    metrics = Metrics()
    for _ in range(MOST_PENDING - 1):
        metrics.count_tokens(torch.tensor([1]), new=1, keys=None)
    assert metrics.tokens_new == 0
    metrics.count_tokens(torch.tensor([1]), new=1, keys=None)
    assert metrics.tokens_new == MOST_PENDING


@pytest.fixture
def few_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MOST_PARTITIONS_COUNTED", 10)


@pytest.mark.usefixtures("few_counted")
def test_ever_new_partitions_are_counted_in_a_bounded_room() -> None:
    metrics, twice = Metrics(pinned=frozenset({99})), np.array([3, 3, 5, 5])
    metrics.count_replayed(np.array([99]))
    for key in range(100, 400):
        metrics.count_replayed(np.append(twice, key))
        metrics.count_tokens(torch.tensor([2, 2]), new=1, keys=np.array([key, key]))
        assert len(metrics.replayed_by_partition) <= 20
    flat = metrics.flat()
    assert (flat["rows_replayed/3"], flat["rows_replayed/5"], flat["rows_replayed/99"]) == (600, 600, 1)
    assert flat["tokens_new"] == flat["tokens_replayed"] == 600
    assert len(metrics.tokens_by_partition) <= 20


@pytest.mark.usefixtures("few_counted")
def test_rows_of_a_forgotten_partition_are_not_taken_back() -> None:
    metrics = Metrics()
    for key in range(30):
        metrics.count_replayed(np.array([key]))
    forgotten = next(key for key in range(30) if key not in metrics.replayed_by_partition)
    metrics.count_replayed(np.array([forgotten]), times=-1)
    assert forgotten not in metrics.replayed_by_partition


def test_losses_are_among_the_numbers() -> None:
    metrics = Metrics(losses={"loss_new": 0.25})
    assert metrics.flat()["loss_new"] == 0.25


def counted() -> Metrics:
    metrics = Metrics(steps=4, waited_ms=2.5, losses={"loss_replayed/3": 0.5})
    metrics.count_replayed(np.array([2, 2, -(2**63)]))
    metrics.count_tokens(torch.tensor([5, 7]), new=1, keys=np.array([0, 1]))
    return metrics


def test_counting_goes_on_from_a_saved_state() -> None:
    metrics, expected = Metrics(steps=99), counted()
    metrics.load_state_dict(json.loads(json.dumps(counted().state_dict())))
    assert metrics.flat() == expected.flat()
    metrics.count_replayed(np.array([2]))
    assert metrics.flat()["rows_replayed/2"] == 3


def test_a_total_that_a_saved_state_does_not_have_begins_at_zero() -> None:
    state = counted().state_dict()
    del state["rows_retrieved"]
    metrics = Metrics(rows_retrieved=5)
    metrics.load_state_dict(state)
    assert metrics.rows_retrieved == 0


def test_loading_forgets_tokens_that_were_still_to_be_counted() -> None:
    metrics = Metrics()
    metrics.count_tokens(torch.tensor([100]), new=1, keys=None)
    metrics.load_state_dict(Metrics().state_dict())
    assert metrics.flat()["tokens_new"] == 0


@pytest.mark.parametrize(("partitions", "shown"), [(MOST_PARTITIONS_SHOWN, True), (MOST_PARTITIONS_SHOWN + 1, False)])
def test_a_log_has_partitions_only_while_they_are_few(partitions: int, shown: bool) -> None:
    metrics = {"steps": 1.0} | {f"rows_replayed/{key}": 1.0 for key in range(partitions)}
    kept = few_partitions(metrics)
    assert kept["steps"] == 1
    assert len(kept) == (1 + partitions if shown else 1)
