"""A failed exchange is spoken of as long as the training thread is elsewhere, and no longer."""

from __future__ import annotations

import threading
import time
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
        ("no answer from ranks 0, 3", "; no answer from ranks 0, 3; the error: "),
        ("", "cannot be told"),
        (None, "cannot be told"),
    ],
)
def test_rank_step_peers_and_cause_are_said_again_and_again(
    silent: str | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = FailureWatch(1, lambda step: silent, 60.0)
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
    watch = FailureWatch(0, lambda step: None, 60.0)
    fail(watch)
    assert not watch.wait_for(Future(), 0.0)
    time.sleep(0.3)
    assert lines(caplog) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "rehearsal-watch-rank0"]


def test_one_that_waits_for_the_job_is_told_by_the_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(0, lambda step: None, 60.0)
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
    watch = FailureWatch(0, lambda step: None, 60.0)
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

    watch = FailureWatch(0, look, 60.0)
    fail(watch)
    assert "cannot be told" in eventually(caplog, 1)[0]
    watch.end()
    never.set()


def test_a_step_that_does_not_end_is_spoken_of_if_a_rank_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(0, lambda step: f"no answer from rank 1 in {step}", 0.2)
    watch.note_step(8)
    for line in eventually(caplog, 2):
        assert "rank 0: the training thread has not come back for" in line
        assert line.endswith(
            "the exchange of step 8; it may wait in a collective of the framework, whose own timeout "
            "ends that; no answer from rank 1 in 8"
        )
    watch.end()


@pytest.mark.parametrize("answer", ["", None])
def test_a_long_evaluation_of_all_ranks_is_none_of_its_business(
    answer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    watch = FailureWatch(0, lambda step: answer, 0.05)
    watch.note_step(8)
    time.sleep(0.4)
    watch.end()
    assert lines(caplog) == []


def test_steps_that_end_in_time_ask_nobody(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    watch = FailureWatch(0, lambda step: asked.append(step), 0.3)
    for step in range(10):
        watch.note_step(step)
        time.sleep(0.05)
    watch.end()
    assert asked == []


def test_its_thread_ends_with_it() -> None:
    watch = FailureWatch(5, lambda step: None, 60.0)
    watch.note_step(0)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "watch-rehearsal-rank5"]
    del watch
    thread.join(5)
    assert not thread.is_alive()
