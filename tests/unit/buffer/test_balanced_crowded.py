"""Policy `balanced` with fewer slots than partitions: ranks keep different ones."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from rehearsal_plugin import RehearsalBuffer, RowLayout
from rehearsal_plugin.config.buffer import BufferConfig


def held(order: np.ndarray, ranks: int, slots: int, batch: int = 10) -> list[set[int]]:
    """The classes of which each rank keeps rows, after they came in this order, two rows each."""
    first = {"x": torch.zeros(1), "label": torch.zeros(1, dtype=torch.int64)}
    config = BufferConfig(capacity=slots, policy="balanced", partition_by="label")
    kept = []
    for rank in range(ranks):
        buffer = RehearsalBuffer(config, RowLayout.infer(first), rank=rank, ranks=ranks)
        for start in range(0, len(order), batch):
            labels = torch.from_numpy(order[start : start + batch].repeat(2))
            buffer.offer({"x": labels.float(), "label": labels})
        assert len(buffer) == min(slots, 2 * len(set(order.tolist())))
        keys, sizes = buffer.counts()
        kept.append(set(keys[sizes > 0].tolist()))
        assert sizes.sum() == len(buffer)
    return kept


@pytest.mark.parametrize("order", ["rising", "shuffled", "large keys"])
def test_three_ranks_with_half_the_slots_lose_no_class(order: str) -> None:
    labels = np.arange(300)
    if order == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)
    if order == "large keys":
        labels = labels * 1_000_003 - (1 << 40)
    kept = held(labels, ranks=3, slots=166)
    assert [len(classes) for classes in kept] == [166] * 3
    assert set.union(*kept) == set(labels.tolist())


@pytest.mark.parametrize(("ranks", "slots"), [(2, 180), (4, 100), (8, 60)])
def test_other_numbers_of_ranks_lose_none_either(ranks: int, slots: int) -> None:
    kept = held(np.arange(300), ranks, slots)
    assert set.union(*kept) == set(range(300))


def test_too_few_slots_on_all_ranks_are_used_for_different_classes() -> None:
    kept = held(np.arange(300), ranks=3, slots=50)
    assert len(set.union(*kept)) == 150


def test_the_classes_that_stay_do_not_depend_on_the_order() -> None:
    shuffled = np.random.default_rng(1).permutation(300)
    assert held(np.arange(300), 3, 40) == held(shuffled, 3, 40, batch=7)


def test_it_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        held(np.arange(30), ranks=1, slots=30)
        assert not caplog.records
        held(np.arange(60), ranks=1, slots=30)
    (record,) = caplog.records
    assert "share 30 slots on this rank" in record.getMessage()
