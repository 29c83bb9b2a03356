"""What a rehearsal keeps over the end of a process, a failed step or a change of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of
from rehearsal_plugin.checkpoint.loading import JobParts
from rehearsal_plugin.checkpoint.resume import content_of, preload, resume
from rehearsal_plugin.checkpoint.saver import Saver
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.transport import Transport
from rehearsal_plugin.errors import CheckpointError, ClosedError
from rehearsal_plugin.runtime.batch_augmenter import BatchAugmenter
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.strategies import Strategy

__all__ = ["Checkpointed"]


class Checkpointed:
    """Saves, loads, commits and rolls back a rehearsal; the base of `Rehearsal`, which makes the attributes.

    Attributes:
        config: The section as a `RehearsalConfig`.
        strategy: What replayed rows are used for.
        report: Logs what a row is, and what was replayed at the end.
    """

    config: RehearsalConfig
    strategy: Strategy
    report: JobReport
    _coordinator: ReplayCoordinator
    pending: PendingLosses
    _augmenter: BatchAugmenter
    _saver: Saver
    _preloaded = False
    _commits = False
    _closed = False
    _process: int

    @property
    def buffer(self) -> RehearsalBuffer | None:
        """This rank's buffer, with all rows of the last step written; None until the first batch."""
        prefetcher = self._coordinator.prefetcher
        if prefetcher is None:
            return None
        prefetcher.await_write()
        return prefetcher.buffer

    @property
    def steps(self) -> int:
        """Exchanges so far, the same number on all ranks."""
        return self._coordinator.step

    @property
    def run(self) -> str | None:
        """Identifier of this run, the same on all ranks and after every restart; None before the first exchange.

        With `sampling.scope: local` every rank has its own.
        """
        return self._coordinator.lifecycle.run

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def commit(self) -> None:
        """Make the buffer's present state the one that `rollback` returns to.

        Raises:
            ExchangeError: The exchange in flight failed.
            ClosedError: `close` was called.
        """
        self._check_open()
        self._commits = True
        self._coordinator.commit()

    def rollback(self) -> None:
        """Return the buffer to the last `commit`, or to empty; what was in flight or staged is dropped.

        Raises:
            StorageError: The background does not end writing within `exchange.timeout_s`.
            ClosedError: `close` was called.
        """
        self._check_open()
        self.pending.clear()
        self._coordinator.rollback()

    def restart(self, step: int, connect: Callable[[], Transport] | None = None) -> None:
        """Begin the exchange anew: the buffer stays, what was in flight or staged is dropped.

        Args:
            step: Number of the next exchange, the same on all ranks.
            connect: Makes the transport to go on with, after the present one was closed; None keeps that.

        Raises:
            StorageError: As for `rollback`.
            ClosedError: `close` was called.
        """
        self._check_open()
        self.pending.clear()
        self._coordinator.restart(step, connect)
        if self._preloaded and step == 0:  # together with the ranks that had no part in it
            self._coordinator.reset(0)
            self._augmenter.forget_layout()
            self._preloaded = False

    def save(self, folder: str | os.PathLike[str], *, write: bool = True) -> None:
        """Save this rank's rows and everything that the next steps depend on; all ranks must save at the same step.

        Call it between two steps. Each rank writes one file, of which the last three of this run stay in the folder; it
        is complete as soon as the files of all ranks are there. With `checkpoint.asynchronous` they are written in the
        background, and errors are raised by the next call or by `close`.

        Args:
            folder: Made where it is missing; one for all ranks, or one on each host.
            write: False where another rank has the same rows, and writes them.

        Raises:
            CheckpointError: The file cannot be written; the checkpoint before it stays.
            BatchError: A micro-batch waits for its loss.
            ExchangeError: The exchange in flight failed.
        """
        self._check_open()
        self.pending.check()
        if write:
            settings = self.config.checkpoint
            place, content = content_of(self.config, self._coordinator, self.strategy)
            changed = self.buffer.take_changed() if settings.incremental and self.buffer is not None else None
            self._saver.save(Path(folder), place, content, changed, asynchronous=settings.asynchronous)
        if self._coordinator.losses.guard is not None:
            self._coordinator.losses.guard.saved(str(folder), self.steps)

    def load(
        self,
        folder: str | os.PathLike[str],
        step: int | None = None,
        *,
        run: str | None = None,
        missing_ok: bool = False,
    ) -> bool:
        """Go on from a checkpoint; all ranks must call it, and agree on which.

        With as many ranks and the same buffer, weights and strategy as when it was saved, the job goes on bit for
        bit. Otherwise the rows are shared out between the ranks, none lost while there is room, partitions in
        the shares that they had (`policy: balanced`: in equal ones), and replay begins as in a new job.

        Args:
            folder: Where `save` was told to write.
            step: The value of `steps` when it was saved, for a script that keeps it beside its model; None takes the
                complete checkpoint in the folder that was written last.
            run: The value of `run` when it was saved, kept in the same place; None takes that of any run.
            missing_ok: Whether the job starts as it is where there is none.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: There is none, or none of that run, it cannot be read on every rank, or its rows do not
                suit the strategy.
        """
        self._check_open()
        self._saver.wait()
        self.pending.clear()
        self._augmenter.forget_layout()
        self._preloaded = False
        with self.report.loading(self._coordinator.metrics):
            parts = JobParts(self.config, self._coordinator, self.strategy)
            number = resume(Path(folder), parts, step=step, run=run, missing_ok=missing_ok)
        if number is not None:
            self._saver.go_on_from(number)
            if self._coordinator.losses.guard is not None:
                self._coordinator.losses.guard.saved(str(folder), self.steps)
        return number is not None

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, by rank; between two steps, when all ranks ask.

        Raises:
            ExchangeError: A rank does not answer.
            ClosedError: `close` was called.
        """
        self._check_open()
        return self._coordinator.gather_texts(text)

    def join_run(self, run: str | None) -> None:
        """Take over the `run` of ranks that hold the same samples; None changes nothing."""
        if run is not None:
            self._coordinator.lifecycle.join_run(int(run, 16))

    def drain(self) -> None:
        """Wait until the exchange in flight, if any, has ended, as before a script takes its process groups down.

        Raises:
            ExchangeError: It failed.
        """
        self._check_process()
        self._coordinator.drain()

    def flush(self) -> None:
        """Wait until a checkpoint that is written in the background is on the disk.

        Raises:
            CheckpointError: It cannot be written.
            ClosedError: This is a forked child of the process that made the rehearsal.
        """
        self._check_process()
        self._saver.wait()

    def fingerprint(self) -> Fingerprint:
        """What this rank holds, in brief: alike on ranks that were given the same batches; between two steps.

        Raises:
            BatchError: A micro-batch waits for its loss.
            ExchangeError: The exchange in flight failed.
        """
        self._check_open()
        self.pending.check()
        return fingerprint_of(self._coordinator)

    def _preload(self, device: torch.device) -> None:
        """Begin a new job with the rows that `buffer.preload` names; `device` is where batches live."""
        folder = self.config.buffer.preload
        if folder is None or self.buffer is not None or self.steps:
            return
        try:
            preload(Path(folder), JobParts(self.config, self._coordinator, self.strategy, device))
            if self._commits:  # a rollback returns to these rows, not to none
                self._coordinator.commit()
        except BaseException as error:
            self._coordinator.reset(0)
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"rehearsal.buffer.preload: {error}") from error
            raise
        self._preloaded = True

    def _check_process(self) -> None:
        """Refuse calls in a forked child: it has a copy of the buffer, and none of the threads and connections."""
        if os.getpid() != self._process:
            raise ClosedError(
                f"this rehearsal belongs to process {self._process}, and process {os.getpid()} is a forked copy of it, "
                "such as a worker of a DataLoader: rows given here would be lost; call it in the process that made it, "
                "on the batches that the workers have returned"
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise ClosedError("the rehearsal was closed; make a new one to go on")
