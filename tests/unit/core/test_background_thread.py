"""A thread that runs one job at a time, and never keeps the process from ending."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from rehearsal_plugin.core.background_thread import BackgroundThread, at_once

TIMEOUT_S = 10


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_result_arrives_in_the_future() -> None:
    worker: BackgroundThread[int] = BackgroundThread("sum")
    assert worker.submit(lambda: 2 + 3).result(TIMEOUT_S) == 5
    assert worker.close(TIMEOUT_S)


def test_an_exception_arrives_in_the_future_and_the_next_job_runs() -> None:
    worker: BackgroundThread[int] = BackgroundThread("error")

    def fail() -> int:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        worker.submit(fail).result(TIMEOUT_S)
    assert worker.submit(lambda: 1).result(TIMEOUT_S) == 1
    worker.close(TIMEOUT_S)


def test_jobs_run_one_at_a_time_in_their_order() -> None:
    worker: BackgroundThread[None] = BackgroundThread("order")
    ran: list[int] = []

    def job(number: int) -> None:
        ran.append(number)
        ran.append(number)

    futures = [worker.submit(lambda number=number: job(number)) for number in range(50)]  # type: ignore[misc]
    for future in futures:
        future.result(TIMEOUT_S)
    assert ran == [number for number in range(50) for _ in range(2)]
    worker.close(TIMEOUT_S)


def test_jobs_run_on_a_daemon_thread_of_the_given_name() -> None:
    worker: BackgroundThread[threading.Thread] = BackgroundThread("rehearsal-rank7")
    thread = worker.submit(threading.current_thread).result(TIMEOUT_S)
    assert (thread.name, thread.daemon) == ("rehearsal-rank7", True)
    worker.close(TIMEOUT_S)


def test_a_job_cannot_be_cancelled() -> None:
    """Other ranks count on it."""
    worker: BackgroundThread[bool] = BackgroundThread("cancel")
    goes_on = threading.Event()
    first, second = worker.submit(lambda: goes_on.wait(TIMEOUT_S)), worker.submit(lambda: True)
    assert not second.cancel()
    goes_on.set()
    assert first.result(TIMEOUT_S)
    assert second.result(TIMEOUT_S)
    worker.close(TIMEOUT_S)


def test_closing_tells_whether_the_thread_ended_in_time() -> None:
    worker: BackgroundThread[bool] = BackgroundThread("late")
    goes_on = threading.Event()
    worker.submit(lambda: goes_on.wait(TIMEOUT_S))
    assert not worker.close(0.01)
    goes_on.set()
    assert worker.close(TIMEOUT_S)


def test_the_thread_ends_with_its_owner() -> None:
    worker: BackgroundThread[int] = BackgroundThread("forgotten")
    (thread,) = named("forgotten")
    del worker
    gc.collect()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_an_idle_thread_keeps_no_batch_alive() -> None:
    worker: BackgroundThread[int] = BackgroundThread("idle")
    batch = torch.zeros(3)
    alive = weakref.ref(batch)
    assert worker.submit(lambda batch=batch: len(batch)).result(TIMEOUT_S) == 3  # type: ignore[misc]
    del batch
    worker.submit(lambda: 0).result(TIMEOUT_S)
    gc.collect()
    assert alive() is None
    worker.close(TIMEOUT_S)


def test_a_job_done_at_once_fails_where_its_result_is_asked_for() -> None:
    def fail() -> int:
        raise KeyError("lost")

    done, failed = at_once(lambda: threading.get_ident()), at_once(fail)
    assert done() == threading.get_ident()
    with pytest.raises(KeyError, match="lost"):
        failed()
