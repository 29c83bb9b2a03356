"""One background thread that runs one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")


class Worker(Generic[T]):
    """A daemon thread, so that a job that waits for a lost peer cannot keep the process from ending.

    (`concurrent.futures` joins its threads before any exit handler could stop them.)
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], T], Future[T]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the thread; its result or exception arrives in the future, which cannot be cancelled."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # other ranks count on the job
        self._jobs.put((job, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """End the thread after the job it runs; tells whether it ended in time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:  # reaches the training thread through the future
                future.set_exception(error)
            del item, job, future  # an idle thread must not keep a batch alive
