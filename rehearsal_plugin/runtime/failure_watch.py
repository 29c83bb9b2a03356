"""Says that the exchange has failed while nobody asks for its result.

Under ZeRO, DDP or Horovod the training thread may wait in a collective of the framework for the same lost rank, as long
as the framework's timeout is. The exchange has failed by then, and without a word the job would seem to compute.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from rehearsal_plugin.errors import ExchangeError

__all__ = ["FailureWatch"]

LOG = logging.getLogger(__name__)

FIRST_S = 5.0
"""Seconds until the first word: a training thread that computes comes back by itself."""

EVERY_S = 60.0
"""Seconds between later ones."""

LONGEST_LOOK_S = 10.0
"""Seconds in which the ranks that do not answer are looked for."""


class FailureWatch:
    """Logs a failed background job until the training thread takes note of it.

    | call | thread |
    |---|---|
    | `reporting` | background, around the job |
    | `wait_for`, `end` | training |
    | log lines | a thread of their own, which begins with a failure and ends with the process |

    Args:
        rank: This rank, for messages.
        find_silent: Finds the ranks that do not answer, by the number of the step; None where nobody can tell.
    """

    def __init__(self, rank: int, find_silent: Callable[[int], Sequence[int] | None]) -> None:
        self._rank, self._find_silent = rank, find_silent
        self._attending = False
        self._noticed = threading.Event()  # the last failure

    @contextmanager
    def reporting(self, step: int) -> Iterator[None]:
        """Context of a job: an error is logged from then on, unless the training thread waits for it."""
        try:
            yield
        except ExchangeError as error:
            # First the event, then the look: `wait_for` does it the other way round, so none misses the other.
            self._noticed = noticed = threading.Event()
            if not self._attending:
                speak = partial(self._speak, noticed, step, str(error))
                threading.Thread(target=speak, name=f"rehearsal-watch-rank{self._rank}", daemon=True).start()
            raise

    def wait_for(self, job: Future[Any], patience_s: float) -> bool:
        """Whether a job ends within so many seconds; the training thread gets its error, and no line is logged."""
        self.end()
        try:
            return job.done() or bool(concurrent.futures.wait([job], patience_s).done)
        finally:
            self._attending = False

    def end(self) -> None:
        """Say nothing any more."""
        self._attending = True
        self._noticed.set()

    def _speak(self, noticed: threading.Event, step: int, error: str) -> None:
        failed_at, pause_s, silent = time.monotonic(), FIRST_S, ""
        while not noticed.wait(pause_s):
            silent = silent or self._describe_silent(step)
            LOG.warning(
                "rank %d: the exchange of step %d failed %.0f s ago, and the training thread has not come back since; "
                "it may wait in a collective of the framework, whose own timeout ends that. %s. The error: %s",
                self._rank,
                step,
                time.monotonic() - failed_at,
                silent,
                error,
            )
            pause_s = EVERY_S

    def _describe_silent(self, step: int) -> str:
        answers: list[Sequence[int] | None] = []
        thread = threading.Thread(target=lambda: answers.append(self._find_silent(step)), daemon=True)
        thread.start()
        thread.join(LONGEST_LOOK_S)
        silent = answers[0] if answers else None
        if silent is None:
            return "Which rank does not answer cannot be told here"
        if not silent:
            return "All ranks answer by now"
        return f"No answer from rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
