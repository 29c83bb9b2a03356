"""Says that the exchange has failed while nobody asks for its result.

Under ZeRO, DDP or Horovod the training thread may wait in a collective of the framework for the same lost rank, as long
as the framework's timeout is. The exchange has failed by then, and without a word the job would seem to compute.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class StepClock:
    """When the training thread ended its last step.

    Attributes:
        step: Number of the exchange that it launched then.
        at: `time.monotonic()`.
        stopped: Set at the end of the job.
    """

    step: int = 0
    at: float = 0.0
    stopped: threading.Event = field(default_factory=threading.Event)


class FailureWatch:
    """Logs a failed background job until the training thread takes note of it, and a step that does not end.

    A step that does not end is spoken of only if a rank does not answer: all of them may be in a long evaluation.

    | call | thread |
    |---|---|
    | `reporting`, `note_step` | background, around the job and at its beginning |
    | `wait_for`, `end` | training |
    | log lines | threads of their own, which end with the job |

    Args:
        rank: This rank, for messages.
        describe_silent: Says who does not answer, see `Transport.describe_silent`; None where there is no other rank.
        patience_s: Seconds that a step may take without a word.
    """

    def __init__(self, rank: int, describe_silent: Callable[[int], str | None] | None, patience_s: float) -> None:
        self._rank, self._describe_silent, self._patience_s = rank, describe_silent, patience_s
        self._attending = False
        self._noticed = threading.Event()  # the last failure
        self._clock: StepClock | None = None

    def note_step(self, step: int) -> None:
        """The training thread ends a step, and launches the exchange of this number."""
        if self._describe_silent is None:
            return
        if self._clock is None:
            self._clock = StepClock()
            weakref.finalize(self, self._clock.stopped.set)  # the thread holds the clock alone
            watch = partial(_watch_steps, self._clock, self._rank, self._describe_silent, self._patience_s)
            threading.Thread(target=watch, name=f"watch-rehearsal-rank{self._rank}", daemon=True).start()
        self._clock.step, self._clock.at = step, time.monotonic()

    @contextmanager
    def reporting(self, step: int) -> Iterator[None]:
        """Context of a job: an error is logged from then on, unless the training thread waits for it."""
        self.note_step(step)
        try:
            yield
        except ExchangeError as error:
            # First the event, then the look: `wait_for` does it the other way round, so none misses the other.
            self._noticed = noticed = threading.Event()
            if not self._attending and self._describe_silent is not None:
                speak = partial(_speak_of_failure, noticed, self._rank, step, str(error), self._describe_silent)
                threading.Thread(target=speak, name=f"rehearsal-watch-rank{self._rank}", daemon=True).start()
            raise

    def wait_for(self, job: Future[Any], patience_s: float) -> bool:
        """Whether a job ends within so many seconds; the training thread gets its error, and no line is logged."""
        self._attend()
        try:
            return job.done() or bool(concurrent.futures.wait([job], patience_s).done)
        finally:
            self._attending = False

    def end(self) -> None:
        """Say nothing any more."""
        self._attend()
        if self._clock is not None:
            self._clock.stopped.set()

    def _attend(self) -> None:
        self._attending = True
        self._noticed.set()


def _speak_of_failure(
    noticed: threading.Event, rank: int, step: int, error: str, describe_silent: Callable[[int], str | None]
) -> None:
    failed_at, pause_s, silent = time.monotonic(), FIRST_S, ""
    while not noticed.wait(pause_s):
        silent = silent or _look(describe_silent, step) or "which rank does not answer cannot be told"
        LOG.warning(
            "rank %d: the exchange of step %d failed %.0f s ago, and the training thread has not come back since; it "
            "may wait in a collective of the framework, whose own timeout ends that; %s; the error: %s",
            rank,
            step,
            time.monotonic() - failed_at,
            silent,
            error,
        )
        pause_s = EVERY_S


def _watch_steps(clock: StepClock, rank: int, describe_silent: Callable[[int], str | None], patience_s: float) -> None:
    pause_s = patience_s
    while not clock.stopped.wait(pause_s):
        step, waited_s = clock.step, time.monotonic() - clock.at
        pause_s = patience_s - waited_s
        if pause_s > 0:
            continue
        pause_s, silent = EVERY_S, _look(describe_silent, step)
        if silent and step == clock.step and not clock.stopped.is_set():
            LOG.warning(
                "rank %d: the training thread has not come back for %.0f s since it launched the exchange of step %d; "
                "it may wait in a collective of the framework, whose own timeout ends that; %s",
                rank,
                waited_s,
                step,
                silent,
            )


def _look(describe_silent: Callable[[int], str | None], step: int) -> str | None:
    """Who does not answer; None where that takes too long."""
    answers: list[str | None] = [None]
    thread = threading.Thread(target=lambda: answers.append(describe_silent(step)), daemon=True)
    thread.start()
    thread.join(LONGEST_LOOK_S)
    return answers[-1]
