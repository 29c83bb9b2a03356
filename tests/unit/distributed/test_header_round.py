"""Headers of one transport: told when due, heard on all ranks alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.global_counts import GlobalCounts
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.distributed.header_round import HeaderRound, Holdings
from rehearsal_plugin.distributed.header_schedule import STEADY_AFTER, HeaderSchedule
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.distributed.transport import LocalTransport, Transport
from rehearsal_plugin.errors import ExchangeError
from tests.helpers.thread_ranks import run_threads


def round_of(transport: Transport, fingerprint: int = 5) -> HeaderRound:
    return HeaderRound(transport, fingerprint, GlobalCounts(transport.rank, transport.size, 1), HeaderSchedule())


def holding(rows: int, *, settled: bool = True) -> Holdings:
    return Holdings(np.zeros(1, dtype=np.int64), np.array([rows]), None, settled)


def tell(headers: HeaderRound, step: int, request: int, rows: int, notes: Notes | None = None) -> bool:
    """One exchange; whether it had headers."""
    pending = headers.post(step, Request(request, request, 1), holding(rows), notes or Notes())
    if pending is None:
        return False
    pending.done(10.0)
    headers.hear(step, pending.result().numpy())
    return True


def told_by(transport: Transport) -> dict[str, Any]:
    headers = round_of(transport)
    tell(headers, 0, 3 + transport.rank, 10 * transport.rank, Notes(loss_sum=transport.rank))
    return {
        "requests": headers.requests(0).tolist(),
        "counts": headers.global_counts.counts[:, 0].tolist(),
        "sums": headers.notes[:, Word.LOSS_SUM - Word.MIXTURE].tolist(),
    }


def test_every_rank_hears_what_each_told() -> None:
    heard = run_threads(told_by, 3)
    assert heard == [{"requests": [3, 4, 5], "counts": [0, 10, 20], "sums": [0, 1, 2]}] * 3


def steady(transport: Transport, odd: str) -> list[bool]:
    """Whether the exchanges had headers; the last rank is `odd` in what it tells."""
    headers, is_last, had = round_of(transport), transport.rank == transport.size - 1, []
    for step in range(4 * STEADY_AFTER):
        request = 8 + (is_last and odd == "request") * step
        notes = Notes(losses_measured=step) if is_last and odd == "notes" else Notes()
        rows = 50 + (is_last and odd == "rows") * step
        had.append(tell(headers, step, request, rows, notes))
    return had


@pytest.mark.parametrize("odd", ["request", "notes", "rows", "nothing"])
def test_one_rank_with_news_keeps_the_headers_of_all(odd: str) -> None:
    had = run_threads(steady, 3, odd)
    assert had[0] == had[1] == had[2]
    assert all(had[0]) == (odd != "nothing")


def test_a_rank_alone_is_told_everything_at_once() -> None:
    headers = round_of(LocalTransport())
    assert all(tell(headers, step, 8, 50) for step in range(100))


def at_odds(transport: Transport) -> str:
    headers = round_of(transport, fingerprint=transport.rank)
    with pytest.raises(ExchangeError) as error:
        tell(headers, 0, 1, 1)
    return str(error.value)


def test_ranks_at_odds_are_refused() -> None:
    assert "rows of other fields" in run_threads(at_odds, 2)[0]


def goes_on(transport: Transport) -> tuple[list[bool], IntArray]:
    headers, again = round_of(transport), round_of(transport)
    for step in range(STEADY_AFTER + 3):
        tell(headers, step, 8, 50)
    again.load_state_dict(headers.state_dict())
    return [tell(again, step, 8, 50) for step in range(STEADY_AFTER + 3, STEADY_AFTER + 10)], again.requests(50)


def test_a_round_goes_on_from_its_state() -> None:
    had, requests = run_threads(goes_on, 2)[1]
    assert had[0], "ranks say who they are"
    assert sum(had[1:]) <= 2
    assert requests.tolist() == [8, 8]


def loaded_with_other_seeds(transport: Transport) -> tuple[bool, str]:
    """After a load between two headers the first exchange has a short one, which tells nothing but who ranks are."""
    headers, step = round_of(transport), STEADY_AFTER + 3
    for earlier in range(step):
        tell(headers, earlier, 8, 50)
    again = round_of(transport, fingerprint=transport.rank)
    again.load_state_dict(headers.state_dict())
    with pytest.raises(ExchangeError) as error:
        tell(again, step, 8, 60)
    return headers.post(step, Request(8, 8, 1), holding(50), Notes()) is None, str(error.value)


def test_ranks_at_odds_after_a_load_are_refused_though_no_headers_are_due() -> None:
    for are_due_no_headers, message in run_threads(loaded_with_other_seeds, 2):
        assert are_due_no_headers
        assert "another rehearsal.seed" in message


def test_the_state_of_an_earlier_release_begins_with_headers() -> None:
    headers, state = round_of(LocalTransport()), round_of(LocalTransport()).state_dict()
    for name in ("schedule", "requests", "rates", "heard_at"):
        del state[name]
    headers.load_state_dict(state)
    assert tell(headers, 12, 8, 50)
