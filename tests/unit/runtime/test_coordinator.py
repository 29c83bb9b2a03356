"""Candidates in, replayed rows out: how the parts of the coordinator go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, RehearsalConfig, RowLayout
from rehearsal_plugin.errors import ExchangeError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.replay_account import Turn
from tests.helpers.samples import new_batch

LAYOUT = RowLayout.infer(new_batch(0, 0, 4))


def coordinator(**keys: Any) -> ReplayCoordinator:
    config = RehearsalConfig.load({"buffer": {"capacity": 50}, "representatives": 2, **keys})
    return ReplayCoordinator(config, LocalTransport(), draws=1, refreshes=False)


def step(rows: ReplayCoordinator, number: int) -> int:
    """An optimizer step of one micro-batch; replayed rows that it got."""
    turn = Turn(4)
    rows.stage_candidates(LAYOUT.columns(new_batch(0, number, 4)), LAYOUT, {}, turn)
    share = rows.take(turn, None)
    rows.queue.count_micro_batch(turn, 4, 4, 0 if share is None else share.count)
    rows.collect()
    rows.launch()
    return 0 if share is None else len(share.rows)


def test_rows_are_replayed_three_steps_after_they_were_asked_for() -> None:
    rows = coordinator()
    assert [step(rows, number) for number in range(6)] == [0, 0, 0, 2, 2, 2]
    rows.lifecycle.close(1.0)


def test_a_restart_forgets_requests_and_keeps_rows() -> None:
    rows = coordinator()
    for number in range(5):
        step(rows, number)
    rows.drain()
    assert rows.prefetcher is not None
    stored = len(rows.prefetcher.buffer)
    rows.restart(rows.step)
    assert rows.due() == 0
    assert len(rows.prefetcher.buffer) == stored == 20
    rows.lifecycle.close(1.0)


def test_a_rollback_returns_to_the_rows_of_the_commit() -> None:
    rows = coordinator()
    for number in range(3):
        step(rows, number)
    rows.commit()
    for number in range(3, 6):
        step(rows, number)
    rows.rollback()
    assert rows.prefetcher is not None
    assert len(rows.prefetcher.buffer) == 12
    rows.lifecycle.close(1.0)


@pytest.mark.parametrize("on_failure", ["raise", "local"])
def test_a_failed_exchange_is_raised_or_leaves_this_rank_alone(
    on_failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = coordinator(exchange={"on_failure": on_failure})
    step(rows, 0)

    def fail() -> None:
        raise ExchangeError("a peer is gone")

    monkeypatch.setattr(rows.prefetcher, "collect", fail)
    if on_failure == "raise":
        with pytest.raises(ExchangeError, match="a peer is gone"):
            rows.collect()
    else:
        rows.collect()
        assert rows.lifecycle.alone
        assert rows.metrics.failures == 1
        assert [step(rows, number) for number in range(1, 6)] == [0, 0, 0, 2, 2]
    rows.lifecycle.close(1.0)


def test_it_goes_on_from_its_state() -> None:
    rows, loaded = coordinator(), coordinator()
    for number in range(5):
        step(rows, number)
    state = rows.state_dict()
    assert rows.prefetcher is not None
    loaded.load_state_dict(state, LAYOUT, torch.device("cpu"), rows.prefetcher.buffer.state_dict())
    assert (loaded.step, loaded.digest, loaded.due()) == (rows.step, rows.digest, rows.due())
    for number in range(5, 9):
        assert step(loaded, number) == step(rows, number) == 2
    rows.lifecycle.close(1.0)
    loaded.lifecycle.close(1.0)


def test_nothing_is_launched_before_the_first_rows() -> None:
    rows = coordinator()
    rows.launch()
    rows.collect()
    assert rows.prefetcher is None
