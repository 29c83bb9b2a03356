"""Prepares the rows of a later step in the background, while the training thread computes."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.dedup import DUPLICATE
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.background_thread import BackgroundThread, at_once
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.distributed.census import Census
from rehearsal_plugin.distributed.exchange import Exchange
from rehearsal_plugin.distributed.groups import RankGroup
from rehearsal_plugin.distributed.header import Notes
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing, Posted, Refresh
from rehearsal_plugin.distributed.mixture import Mixture
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ExchangeTimeout, RehearsalError
from rehearsal_plugin.runtime.arrived_rows import ArrivedRows
from rehearsal_plugin.runtime.candidate_staging import CandidateStaging
from rehearsal_plugin.runtime.cuda_stream import SideStream
from rehearsal_plugin.runtime.failure_watch import FailureWatch

__all__ = ["Prefetcher"]

GRACE_S = 5.0  # the worker's own deadline is reported first


@dataclass(frozen=True)
class Outcome:
    """What a background job leaves behind: rows that arrived, and rows to send next."""

    arrival: Arrival | None
    outgoing: Outgoing


class Prefetcher:
    """Stages candidates, launches a background job a step, collects the rows that the job brought.

    At most one job runs at a time, and between `collect` and `launch` none does; so the index and the storage
    have one user at a time and need no lock.

    | call | thread | touches |
    |---|---|---|
    | `stage_candidates` | training | staging area |
    | `launch` | training | staging area, slot index; collectives where the library wants them there |
    | job of a step | background | storage, headers, counts of all ranks, draw; collectives else |
    | `collect`, `drain`, `state_dict` | training, waits for the job | what the job left behind |
    | `close` | training, or at exit | waits for the job, then stops it |

    Args:
        config: The `rehearsal` section.
        group: The ranks that draw from each other; not closed here.
        buffer: This rank's rows.
        device: Where batches live.
        metrics: Where it is counted.
        rank: Of this process, for random numbers and messages; that in the transport unless the others are gone.
        draws: Independent draws of a step.
        step: Number of the first job, the same on all ranks.
        run: This rank's number for the run; see `run`.

    Attributes:
        buffer, device: As given.
        step: Number of the next job.
    """

    def __init__(
        self,
        config: RehearsalConfig,
        group: RankGroup,
        buffer: RehearsalBuffer,
        device: torch.device,
        metrics: Metrics,
        *,
        rank: int,
        draws: int = 1,
        step: int = 0,
        run: int = 0,
    ) -> None:
        self.buffer, self.device, self.step = buffer, device, step
        self._rank, self._config, self._metrics = rank, config, metrics
        self._inline = group.transport.main_thread or config.exchange.launch == "inline"
        self._stop, self._wrote = threading.Event(), threading.Event()
        self._wrote.set()
        self._exchange = Exchange(
            self.buffer,
            group,
            config,
            rank=rank,
            draws=draws,
            metrics=metrics,
            stopped=self._stop.is_set,
            run=run,
        )
        self._staging = CandidateStaging(config, rank, buffer.capacity, buffer.layout, device)
        self._arrived, self._stream = ArrivedRows(device), SideStream(device)
        self._outgoing: Outgoing | None = None
        self._job: Future[Outcome] | None = None
        everyone = group.everyone or group.transport
        describe_silent = everyone.describe_silent if everyone.size > 1 else None
        self._watch = FailureWatch(rank, describe_silent, config.exchange.timeout_s)
        self._worker: BackgroundThread[Outcome] = BackgroundThread(f"rehearsal-rank{rank}")

    def stage_candidates(self, columns: list[Tensor]) -> int:
        """Copy the candidates of a micro-batch to the staging area; see `CandidateStaging.stage`."""
        return self._staging.stage(columns, self.buffer.layout, self.step)

    def withdraw_candidates(self, number: int) -> None:
        """Take back the candidates of a micro-batch; see `CandidateStaging.withdraw`."""
        self._staging.withdraw(number)

    def launch(self, request: Request, refresh: Refresh | None, notes: Notes) -> None:
        """Admit what was staged and start preparing rows.

        Args:
            request: Rows that this rank shall get in each draw from the job after this one.
            refresh: New state for rows that arrived earlier; None on all ranks or on none.
            notes: What this rank tells the others beside it.
        """
        self.mixture.read_file()
        step, offered = self.step, self._staging.offered
        flushed = self._staging.flush()
        staged = self._exchange.admissible(flushed, step)
        if staged is not flushed:
            offered = len(staged.bounds)  # a sample of those that can travel, as if they had been all
        slots = self.buffer.admit(staged.rows, step, offered)
        self._count_admission(slots, offered - len(slots))
        self._wrote.clear()
        self._stream.mark()
        # The weights as they are now, not when the background comes to it: which thread posts changes nothing.
        weights = self.mixture.proposed
        post = partial(self._exchange.post, step, request, self._outgoing, staged, refresh, notes, weights)
        posted = at_once(post) if self._inline else post
        write = partial(self.buffer.write, slots, *staged)
        self._job = self._worker.submit(lambda: self._run(step, write, posted))
        self.step += 1

    @property
    def in_flight(self) -> bool:
        """Whether a job was launched that `collect` has not taken."""
        return self._job is not None

    def await_write(self) -> None:
        """Wait until the rows that the last `launch` admitted are in the buffer, for at most `GRACE_S`."""
        self._wrote.wait(GRACE_S)

    def drain(self) -> None:
        """Wait until the job in flight, if any, has ended; errors are those of `collect`."""
        if self._job is not None:
            self._result(self._job)

    def collect(self) -> Arrival | None:
        """Wait for the job in flight: the rows that it brought, or None.

        Raises:
            ExchangeError: The exchange failed; every later call raises it again.
            ExchangeTimeout: It did not end within `exchange.timeout_s`.
        """
        if self._job is None:
            return None
        with self._metrics.timed("waited_ms"):
            outcome = self._result(self._job)
        self._job, self._outgoing = None, outcome.outgoing
        if outcome.arrival is not None:
            self._stream.hand_over(outcome.arrival.rows)
        return outcome.arrival

    def state_dict(self) -> dict[str, Any]:
        """Everything between two steps but the buffer, the job in flight included; waits for that.

        Raises:
            ExchangeError: The job failed.
        """
        outcome = None if self._job is None else self._result(self._job)
        outgoing, arrival = (self._outgoing, None) if outcome is None else (outcome.outgoing, outcome.arrival)
        return {
            "step": self.step,
            "in_flight": outcome is not None,
            "outgoing": None if outgoing is None else outgoing.state_dict(),
            "arrival": None if arrival is None else arrival.state_dict(),
            **self._staging.state_dict(),
            **self._exchange.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank of as many, before the first step.

        Raises:
            ValueError: It contradicts itself, or is that of other ranks.
        """
        self.step, layout = int(state["step"]), self.buffer.layout
        self._exchange.load_state_dict(state)
        self._staging.load_state_dict(state)
        arrival = None if state["arrival"] is None else Arrival.load(state["arrival"], layout, self.device)
        outgoing = state["outgoing"]
        self._outgoing = None if outgoing is None else Outgoing.load(outgoing, layout, self._exchange.device)
        if state["in_flight"]:
            assert self._outgoing is not None
            self._job = Future()
            self._job.set_result(Outcome(arrival, self._outgoing))

    @property
    def mixture(self) -> Mixture:
        """The share of each partition in what is replayed."""
        return self._exchange.census.mixture

    @property
    def census(self) -> Census:
        """What all ranks hold and want, and told in the last exchange that was collected."""
        return self._exchange.census

    @property
    def digest(self) -> int:
        """A number that is alike on all ranks of a job at a step; 0 where every rank draws from itself alone."""
        if self._config.sampling.scope == "local":
            return 0
        return self._exchange.census.digest ^ Mixture.digest(self.mixture.in_force)

    def close(self, drain_s: float, grace_s: float = GRACE_S) -> bool:
        """Let the job in flight end for up to `drain_s` seconds, then stop the worker.

        Args:
            drain_s: Seconds.
            grace_s: Seconds that the worker has to end then: it waits for no rank any more, but may be writing.

        Returns:
            Whether it ended; if not, it may still write to the buffer.
        """
        try:
            if self._job is not None:
                concurrent.futures.wait([self._job], timeout=drain_s)
        finally:  # whoever is impatient presses Ctrl-C here
            self._stop.set()
            self._watch.end()
            ended = self._worker.close(grace_s)
            self._exchange.close()
        return ended

    def _run(self, step: int, write: Callable[[], None], post: Callable[[], Posted]) -> Outcome:
        """The background job of a step; rows that the index counts are written, whatever becomes of the exchange."""
        with self._stream.background(), self._watch.reporting(step):
            try:
                with self._metrics.timed("written_ms"):
                    write()
            finally:
                self._wrote.set()
            posted = post()
            self._exchange.apply(posted)
            outgoing = self._exchange.prepare(posted)
            arrival = self._exchange.receive(posted)
            return Outcome(None if arrival is None else self._arrived.prepare(arrival), outgoing)

    def _result(self, job: Future[Outcome]) -> Outcome:
        # State, headers and rows have a deadline each.
        patience = 3 * self._config.exchange.timeout_s + GRACE_S
        # Not `result(patience)`: a job may fail with a TimeoutError of its own, as of a disk far away.
        if not self._watch.wait_for(job, patience):
            raise ExchangeTimeout(f"{self._where} did not end within {patience:.0f} s; see the other ranks' logs")
        try:
            return job.result()
        except RehearsalError:
            raise
        except Exception as error:
            raise RehearsalError(f"{self._where} failed: {type(error).__name__}: {error}") from error

    @property
    def _where(self) -> str:
        return f"the background job on rank {self._rank} at step {self.step - 1}"

    def _count_admission(self, slots: IntArray, thinned: int) -> None:
        self._metrics.steps += 1
        duplicates = int(np.count_nonzero(slots == DUPLICATE))
        self._metrics.rows_offered += len(slots) - duplicates + thinned
        self._metrics.rows_duplicate += duplicates
        self._metrics.rows_admitted += int(np.count_nonzero(slots >= 0))
        self._metrics.rows_stored = len(self.buffer)
