"""A failed exchange is spoken of as long as the training thread is elsewhere, and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress

import pytest

from rehearsal_plugin.errors import ClosedError, ExchangeError
from rehearsal_plugin.runtime import failure_watch
from rehearsal_plugin.runtime.failure_watch import FailureWatch


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_watch, "FIRST_S", 0.05)
    monkeypatch.setattr(failure_watch, "EVERY_S", 0.1)


def fail(watch: FailureWatch, error: Exception | None = None) -> None:
    with suppress(Exception), watch.reporting(7):
        raise error or ExchangeError("the exchange of headers on rank 1 at step 7 did not end in time")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == failure_watch.__name__]


def eventually(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    deadline = time.monotonic() + 10
    while len(lines(caplog)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines(caplog)


@pytest.mark.parametrize(
    ("silent", "words"),
    [
        ([0, 3], "No answer from ranks 0, 3"),
        ([0], "No answer from rank 0"),
        ([], "All ranks answer"),
        (None, "cannot be told"),
    ],
)
def test_rank_step_peers_and_cause_are_said_again_and_again(
    silent: Sequence[int] | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = FailureWatch(1, lambda step: silent)
    fail(watch)
    for line in eventually(caplog, 3):
        assert "rank 1: the exchange of step 7 failed" in line
        assert words in line
        assert "did not end in time" in line
    watch.end()
    said = len(lines(caplog))
    time.sleep(0.3)
    assert len(lines(caplog)) <= said + 1, "one may have been on its way"


def test_a_training_thread_that_comes_back_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(0, lambda step: None)
    fail(watch)
    assert not watch.wait_for(Future(), 0.0)
    time.sleep(0.3)
    assert lines(caplog) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "rehearsal-watch-rank0"]


def test_one_that_waits_for_the_job_is_told_by_the_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(0, lambda step: None)
    job: Future[None] = Future()
    waiting = threading.Thread(target=watch.wait_for, args=(job, 5.0))
    waiting.start()
    time.sleep(0.1)
    fail(watch)
    job.set_result(None)
    waiting.join()
    time.sleep(0.2)
    assert lines(caplog) == []


def test_a_rehearsal_that_was_closed_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(0, lambda step: None)
    fail(watch, ClosedError("given up"))
    time.sleep(0.2)
    assert lines(caplog) == []


def test_a_look_for_ranks_that_does_not_end_holds_up_no_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_watch, "LONGEST_LOOK_S", 0.1)
    never = threading.Event()

    def look(step: int) -> None:
        never.wait(5)

    watch = FailureWatch(0, look)
    fail(watch)
    assert "cannot be told" in eventually(caplog, 1)[0]
    watch.end()
    never.set()
