"""One background thread that runs one job at a time."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from rehearsal_plugin.errors import ClosedError

__all__ = ["BackgroundThread"]

T = TypeVar("T")
Jobs: TypeAlias = "SimpleQueue[tuple[Callable[[], T], Future[T]] | None]"


class BackgroundThread(Generic[T]):
    """A daemon thread, so that a job that waits for a lost peer cannot keep the process from ending.

    (`concurrent.futures` joins its threads before any exit handler could stop them.) A forked child has no such thread.
    """

    def __init__(self, name: str) -> None:
        self._process = os.getpid()
        self._jobs: Jobs[T] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None)  # the thread ends with its owner

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the thread; its result or exception arrives in the future, which cannot be cancelled.

        Raises:
            ClosedError: This is a forked child of the process that made the thread.
        """
        if os.getpid() != self._process:
            raise ClosedError(
                f"process {os.getpid()} is a forked copy of process {self._process}, in which the background thread "
                "runs; make the call there"
            )
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # other ranks count on the job
        self._jobs.put((job, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """End the thread after the jobs submitted so far; returns whether it ended within `timeout_s` seconds."""
        if os.getpid() != self._process:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _work(jobs: Jobs[T]) -> None:
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            future.set_result(job())
        except BaseException as error:  # reaches the training thread through the future
            future.set_exception(error)
        del item, job, future  # an idle thread must not keep a batch alive
