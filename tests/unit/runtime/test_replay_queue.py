"""Replayed rows by their stage: how many are asked for, and when they are handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import RehearsalConfig, RowLayout
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing
from rehearsal_plugin.distributed.request import requests_after
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.replay_queue import LEAD, ReplayQueue

ROWS = 8
LAYOUT = RowLayout.infer({"id": torch.zeros(2, dtype=torch.int64)})


def queue(**keys: Any) -> ReplayQueue:
    return ReplayQueue(RehearsalConfig.load({"representatives": 2, **keys}), draws=1, rank=0)


def arrival(count: int) -> Arrival:
    rows = torch.zeros((count, LAYOUT.row_bytes), dtype=torch.uint8)
    LAYOUT.pack([torch.arange(count)], rows)
    none = np.empty(0, dtype=np.int64)
    plan = Plan(none, none, np.array([0]), np.array([count]), np.zeros(count, dtype=np.int64), count)
    return Arrival(rows, Outgoing(rows[:0], LAYOUT, plan, none, none))


def taken(rows: ReplayQueue, step: int = LEAD) -> int:
    share = rows.take(step, Turn(ROWS), None)
    return 0 if share is None else len(share.rows)


def see(rows: ReplayQueue, size: int = ROWS) -> None:
    """A micro-batch of which nothing is replayed."""
    turn = Turn(size)
    rows.take(0, turn, None)
    rows.count_micro_batch(turn, size, size, 0)


def test_rows_are_asked_for_by_the_micro_batches_since_the_last_request() -> None:
    rows = queue()
    for _ in range(3):
        see(rows)
    assert rows.request(0).rows == 6
    assert rows.request(1).rows == 0


def test_a_ratio_is_met_over_micro_batches() -> None:
    rows = ReplayQueue(RehearsalConfig.load({"ratio": 0.25}), draws=1, rank=0)
    for _ in range(9):
        see(rows, 4)
    assert rows.request(0).rows == 12


def test_the_first_exchange_brings_none_and_the_next_its_shares() -> None:
    rows = queue()
    see(rows)
    rows.request(0)
    rows.receive(None, 1)
    assert rows.due(LEAD) == taken(rows) == 0
    rows.receive(arrival(2), 2)
    assert rows.due(LEAD) == 2
    assert taken(rows) == 2
    assert taken(rows) == 0


def test_nothing_is_asked_for_that_would_come_before_the_start() -> None:
    rows = queue(start_step=10)
    see(rows)
    assert rows.request(10 - LEAD - 1).rows == 0
    see(rows)
    assert rows.request(10 - LEAD).rows == 2


def test_nothing_is_handed_out_before_the_start() -> None:
    rows = queue(start_step=10)
    see(rows)
    rows.request(10 - LEAD)
    rows.receive(None, 8)
    rows.receive(arrival(2), 9)
    assert rows.due(9) == taken(rows, 9) == 0
    assert rows.due(10) == taken(rows, 10) == 2


def test_rows_are_spent_once_others_are_ready() -> None:
    rows = queue()
    rows.receive(arrival(2), 1)
    assert rows.take_refresh() is None
    see(rows)
    rows.request(1)
    rows.receive(None, 2)
    assert rows.take_refresh() is not None
    assert rows.take_refresh() is None


def test_it_goes_on_from_its_state() -> None:
    rows = queue()
    see(rows)
    rows.request(0)
    rows.receive(None, 1)
    see(rows)
    rows.receive(arrival(2), 2)
    loaded = queue()
    loaded.load_state_dict(rows.state_dict(), LAYOUT, torch.device("cpu"))
    assert loaded.due(LEAD) == rows.due(LEAD) == 2
    assert loaded.request(2).rows == rows.request(2).rows == 2


def test_steps_that_are_alike_tell_what_they_will_ask_for() -> None:
    rows = ReplayQueue(RehearsalConfig.load({"ratio": 0.25}), draws=1, rank=0)
    told, later = None, []
    for step in range(12):
        see(rows, 8)
        request = rows.request(step)
        told = told or request
        later.append(request.rows)
    assert told is not None
    rates = np.array([[told.numerator], [told.denominator], [told.carry]])
    assert later[1:] == [int(requests_after(rates, n)[0]) for n in range(1, 12)]


@pytest.mark.parametrize("keys", [{"start_step": 40}, {"ratio_in": "tokens", "padding": {"values": {"x": 0}}}])
def test_what_is_not_known_is_not_told(keys: dict[str, Any]) -> None:
    rows = ReplayQueue(RehearsalConfig.load({"ratio": 0.25, **keys}), draws=1, rank=0)
    see(rows, 8)
    assert not rows.request(0).is_steady


@pytest.mark.parametrize("promised", [0, 1, 2, 5])
def test_a_rank_that_cannot_tell_the_others_asks_for_what_it_promised(promised: int) -> None:
    rows = queue()
    see(rows)
    assert rows.request(0, promised).rows == promised
