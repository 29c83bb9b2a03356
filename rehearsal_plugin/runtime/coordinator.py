"""Requests, receives and hands out replayed rows; takes candidates in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.attached import note_attached
from rehearsal_plugin.core.metrics import MOST_PARTITIONS_TOLD, Metrics
from rehearsal_plugin.distributed.transport import Transport
from rehearsal_plugin.errors import BatchError, ExchangeError
from rehearsal_plugin.runtime.lifecycle import Lifecycle
from rehearsal_plugin.runtime.loss_consensus import LossConsensus
from rehearsal_plugin.runtime.prefetcher import Prefetcher
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.replay_queue import ReplayQueue
from rehearsal_plugin.runtime.representatives import Share

__all__ = ["MANY_WITHOUT_STEP", "MOST_WITHOUT_STEP", "ReplayCoordinator"]

LOG = logging.getLogger(__name__)

MANY_WITHOUT_STEP = 256
"""Micro-batches without a step after which a warning is logged."""

MOST_WITHOUT_STEP = 4096
"""Micro-batches without a first step that are an error: no accumulation is as long."""


class ReplayCoordinator:
    """Takes candidates in and gives replayed rows out, one exchange a step.

    It joins three parts: the ranks with buffer and background, the queue of replayed rows, and the losses that ranks
    tell each other. All calls are made on the training thread; `Prefetcher` says what runs in the background.

    Args:
        config: The `rehearsal` section.
        transport: The ranks; closed by `close`.
        draws: Independent draws of a step.
        refreshes: Whether replayed rows get new state.

    Attributes:
        metrics: What is counted and timed.
        lifecycle: Ranks, buffer and background.
        queue: Rows due, asked for, ready and spent; another one after a restart.
        losses: Losses on replayed rows of all ranks, and the guard; another one after a restart.
    """

    def __init__(self, config: RehearsalConfig, transport: Transport, draws: int, refreshes: bool) -> None:
        weighted = config.strategy.partition_weights or {}  # by the rows replayed of each
        self.metrics = Metrics(pinned=frozenset(map(int, weighted)))
        self._config, self._draws, self._refreshes = config, draws, refreshes
        self.lifecycle = Lifecycle(config, transport, self.metrics, draws)
        self.losses = LossConsensus(config, transport.rank)
        self.queue = ReplayQueue(config, draws, transport.rank)
        self.losses.steer(self.queue.ratio)
        note_attached()

    @property
    def prefetcher(self) -> Prefetcher | None:
        """This rank's buffer, exchange and background; None until the first rows."""
        return self.lifecycle.prefetcher

    @property
    def step(self) -> int:
        """Number of the next exchange, the same on all ranks."""
        return self.lifecycle.step

    def due(self, rows: int | None = None) -> int:
        """Rows that the next `take` gives if there is room, for as many `rows` as then; None for as many as planned."""
        return self.queue.due(self.step, rows)

    def stage_candidates(
        self, columns: list[Tensor], layout: RowLayout, state: Mapping[str, Tensor], turn: Turn
    ) -> None:
        """Copy a micro-batch's candidates to the staging area.

        Args:
            columns: The batch's rows by field; see `RowLayout.columns`.
            layout: That of the batch.
            state: What is stored beside each row, by name.
            turn: That of the micro-batch; it notes where they are.

        Raises:
            BatchError: The state does not look like the first one.
        """
        prefetcher = self.prefetcher or self.lifecycle.begin(layout.with_state(state), columns[0].device)
        layout = prefetcher.buffer.layout
        turn.staged = prefetcher.stage_candidates([*columns, *layout.state_columns(state, columns[0].shape[0])])

    def take(self, turn: Turn, most: int | None) -> Share | None:
        """The replayed rows of the next micro-batch, or None.

        Args:
            turn: That of the micro-batch.
            most: Rows that there is room for; None for no limit.
        """
        return self.queue.take(self.step, turn, most)

    def undo(self, turn: Turn) -> bool:
        """Take back the candidates and the share of a micro-batch that is not seen after all.

        Returns:
            False where its step has ended, so that nothing is taken back.
        """
        if not self.queue.undo(turn):
            return False
        if turn.staged is not None and self.prefetcher is not None:
            self.prefetcher.withdraw_candidates(turn.staged)
        return True

    def check_steps(self) -> None:
        """Say so when micro-batches come and no step ever ends: nothing would be replayed.

        Raises:
            BatchError: `MOST_WITHOUT_STEP` micro-batches have come and no step has ended.
        """
        waiting = self.queue.waiting
        if waiting == MANY_WITHOUT_STEP:
            LOG.warning(
                "%d micro-batches since the last rehearsal.step(); nothing is replayed until it is called, once an "
                "optimizer step",
                waiting,
            )
        if waiting >= MOST_WITHOUT_STEP and not self.metrics.steps:
            raise BatchError(
                f"{waiting} calls of augment() and none of step(), so nothing can be replayed; call rehearsal.step() "
                "once an optimizer step"
            )

    def collect(self) -> None:
        """Wait for the exchange in flight; its rows are ready then.

        Raises:
            ExchangeError: The exchange failed, and `exchange.on_failure` is `raise`; every later call says so.
            ForgettingError: The guard ends the job.
        """
        prefetcher = self.prefetcher
        if prefetcher is None or not prefetcher.in_flight:
            return  # a batch was refused; the rows that were ready still are
        try:
            self.lifecycle.check_sections()
            arrival = prefetcher.collect()
        except ExchangeError as error:
            self._fail(error)
            return
        # Only now: the job that just ended might have been given the same device memory.
        self.queue.receive(arrival, prefetcher.step)
        census = prefetcher.census
        self.queue.ratio.share_among_groups(census.group_share)
        if not self.lifecycle.alone:  # last: a job that is stopped here can save and load
            self.losses.hear(census.notes, prefetcher.step, self.queue.ratio, census.take_losses())
            census.mixture.follow(self.losses.mixture)

    def launch(self) -> None:
        """Admit the staged candidates, and ask for the rows of a later step."""
        prefetcher = self.prefetcher
        if prefetcher is None:
            return
        request = self.queue.request(prefetcher.step, prefetcher.census.promised(prefetcher.step))
        refresh = self.queue.take_refresh() if self._refreshes else None
        prefetcher.launch(request, refresh, self.losses.notes)

    def totals(self) -> dict[str, float]:
        """See `Rehearsal.metrics`."""
        partitions = None if self.prefetcher is None else self.prefetcher.buffer.slot_index.partitions
        if partitions is None:
            return self.metrics.flat()
        told = partitions.most_offered(MOST_PARTITIONS_TOLD)
        keys = partitions.keys[told].tolist()
        totals = self.metrics.flat(None if len(keys) == len(partitions) else set(keys))
        columns = (keys, partitions.offered[told].tolist(), partitions.sizes[told].tolist())
        for key, offered, stored in zip(*columns, strict=True):
            totals[f"rows_offered/{key}"], totals[f"rows_stored/{key}"] = offered, stored
        return totals | self.losses.metrics

    def drain(self) -> None:
        """Wait until the exchange in flight, if any, has ended.

        Raises:
            ExchangeError: It failed, and `exchange.on_failure` is `raise`.
        """
        try:
            if self.prefetcher is not None:
                self.prefetcher.drain()
        except ExchangeError as error:
            self._fail(error)

    def commit(self) -> None:
        """See `Rehearsal.commit`."""
        self.drain()
        if self.prefetcher is not None:
            self.prefetcher.buffer.commit()

    def rollback(self) -> None:
        """See `Rehearsal.rollback`."""
        self.restart(self.step)
        if self.prefetcher is not None:
            self.prefetcher.buffer.rollback()

    def restart(self, step: int, connect: Callable[[], Transport] | None = None) -> None:
        """See `Rehearsal.restart`."""
        self.lifecycle.restart(step, connect)
        self._forget_requests()
        if connect is not None and self._config.follows_losses:  # a rank that has just come knows of no loss
            self.losses.adopt(self.gather_texts(self.losses.known), self.queue.ratio)

    def reset(self, step: int) -> None:
        """Begin anew at `step` without a row."""
        self.lifecycle.reset(step)
        self._forget_requests()

    def adopt(self, step: int, layout: RowLayout, device: torch.device) -> RehearsalBuffer:
        """Begin anew at `step` with an empty buffer, to be filled by the caller; see `RehearsalBuffer.adopt`."""
        self.reset(step)
        return self.lifecycle.begin(layout, device).buffer

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on but the buffer; waits for the exchange in flight.

        Raises:
            ExchangeError: That failed.
        """
        self.drain()
        return {
            "first_step": self.lifecycle.first_step,
            **self.queue.state_dict(),
            "metrics": self.metrics.state_dict(),
            **self.losses.state_dict(),
            "pipeline": None if self.prefetcher is None else self.prefetcher.state_dict(),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], layout: RowLayout | None, device: torch.device, rows: Mapping[str, Any] | None
    ) -> None:
        """Take over what `state_dict` gave on this rank of as many.

        Args:
            state: That.
            layout: Of the rows; None where there were none yet.
            device: Where batches live.
            rows: What the buffer's `state_dict` gave.

        Raises:
            ValueError: It contradicts itself, or is that of other ranks.
        """
        self.reset(int(state["first_step"]))
        self.metrics.load_state_dict(state["metrics"])
        self.losses.load_state_dict(state)
        self.queue.load_state_dict(state, None if rows is None else layout, device)
        self.losses.steer(self.queue.ratio)  # its bounds may be others now
        if layout is not None and rows is not None:
            prefetcher = self.lifecycle.begin(layout, device)
            prefetcher.buffer.load_state_dict(rows)
            prefetcher.load_state_dict(state["pipeline"])

    @property
    def digest(self) -> int:
        """A number that follows from what all ranks hold: alike on the ranks of a job at a step."""
        return 0 if self.prefetcher is None else self.prefetcher.digest

    def agree(self, *values: int) -> list[list[int]]:
        """What every rank gives, by rank; between two steps, when all ranks ask.

        Raises:
            ExchangeError: A rank does not answer.
        """
        self.drain()  # its collectives come first on all ranks
        return self.lifecycle.gather(*values)

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, by rank; under the rules of `agree`.

        Raises:
            ExchangeError: A rank does not answer.
        """
        self.drain()
        return self.lifecycle.gather_texts(text)

    def _forget_requests(self) -> None:
        """Nothing is asked for, on its way or ready any more, and no loss was measured."""
        self.queue = ReplayQueue(self._config, self._draws, self.lifecycle.rank)
        self.losses = LossConsensus(self._config, self.lifecycle.rank, self.losses)
        self.losses.steer(self.queue.ratio)

    def _fail(self, error: ExchangeError) -> None:
        """Raise the error, or go on without the others, as the config says."""
        if self._config.exchange.on_failure == "raise":
            raise error
        self.lifecycle.go_alone(error)
        self._forget_requests()
