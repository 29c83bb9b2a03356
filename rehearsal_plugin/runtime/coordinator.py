"""Where replayed rows come from: what was asked for, what is on its way, what is ready."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.global_counts import NOTES
from rehearsal_plugin.distributed.transport import LocalTransport, Transport, wait
from rehearsal_plugin.errors import ExchangeError, StorageError
from rehearsal_plugin.runtime.forgetting_guard import ForgettingGuard
from rehearsal_plugin.runtime.prefetcher import Prefetcher
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.representatives import Representatives, Share

__all__ = ["ReplayCoordinator"]

LOG = logging.getLogger(__name__)

FIXED_POINT = 1 << 20  # losses travel as integers
LARGEST_LOSS = 1e12

LEAD = 3  # steps from asking for rows to seeing them, at most (a loop of update() needs one less)


class ReplayCoordinator:
    """Takes candidates in and gives representatives out, one exchange a step.

    Args:
        config: The `rehearsal` section.
        transport: The ranks; closed together with the supply.
        turns: Independent draws of a step.
        refreshes: Whether replayed rows get new state.

    Attributes:
        rank: This process among those that share the buffer, or shared it before an exchange failed.
        size: How many those are.
        alone: Whether an exchange failed, and this rank goes on by itself.
        metrics: What is counted and timed.
        schedule: How many rows are asked for.
        guard: Watches the loss on replayed rows; None for nobody.
        prefetcher: This rank's buffer, exchange and worker; None until the first rows.
    """

    def __init__(self, config: RehearsalConfig, transport: Transport, turns: int, refreshes: bool) -> None:
        self.metrics = Metrics()
        self.prefetcher: Prefetcher | None = None
        self._config, self._transport, self._turns = config, transport, turns
        self.rank, self.size, self.alone = transport.rank, transport.size, False
        self._orders = RandomStream(config.seed, Purpose.ORDER)
        self._refreshes = refreshes
        self._first_step = 0
        self._ready: Representatives | None = None
        self._spent: Representatives | None = None
        self._amounts: list[int] = []  # of the micro-batches since the last exchange
        self._words: list[int]  # sum and weight of the losses measured last, and how often it was done
        self.guard: ForgettingGuard | None = None
        self._proposed: Mapping[Any, float] | None = None
        self._asked: deque[list[int]] = deque()  # shares asked for with each exchange, oldest first
        self._begin()

    @property
    def step(self) -> int:
        """Number of the next exchange, the same on all ranks."""
        return self._first_step if self.prefetcher is None else self.prefetcher.step

    @property
    def due(self) -> int:
        """Rows that the next `take` gives if there is room."""
        return self._ready.due if self._ready is not None and self._started else 0

    def stage(self, columns: list[Tensor], layout: RowLayout, state: Mapping[str, Tensor]) -> None:
        """Copy a micro-batch's candidates to the staging area.

        Args:
            columns: The batch's rows by field; see `RowLayout.columns`.
            layout: That of the batch.
            state: What is stored beside each row, by name.

        Raises:
            BatchError: The state does not look like the first one.
        """
        if self.prefetcher is None:
            self.prefetcher = self._make_prefetcher(self._make_buffer(layout.with_state(state)), columns[0].device)
        layout = self.prefetcher.buffer.layout
        self.prefetcher.stage([*columns, *layout.state_columns(state, len(columns[0]))])

    def take(self, most: int | None) -> Share | None:
        """The rows of the next micro-batch, or None.

        Args:
            most: Rows that there is room for; None for no limit.
        """
        return None if self._ready is None or not self._started else self._ready.take(most)

    def update(self, index: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give rows of the step new state, wherever they live; it is stored there after the step.

        Args:
            index: `[n]` int64, which rows; see `Share.index`.
            state: Values `[n, ...]` by name, all names of the state.
        """
        if self._ready is not None:
            self._ready.update(index, state)

    def seen(self, amount: int) -> None:
        """Note a micro-batch that the model sees, by the rows or tokens that the ratio is a share of."""
        self._amounts.append(amount)

    def measured(self, total: float, weight: float) -> None:
        """Tell the others, with the next exchange, the sum of losses on replayed rows, and what it is divided by."""
        sound = math.isfinite(total) and abs(total) < LARGEST_LOSS
        told = (round(total * FIXED_POINT), round(weight * FIXED_POINT)) if sound else (0, 0)
        self._words = [*told, self._words[2] + 1]

    def reweigh(self, weights: Mapping[Any, float]) -> None:
        """See `Rehearsal.reweigh`."""
        self._proposed = weights
        if self.prefetcher is not None:
            self.prefetcher.mixture.propose(weights)

    def collect(self) -> None:
        """Wait for the exchange in flight; what it brought is ready then.

        Raises:
            ExchangeError: The exchange failed, and `exchange.on_failure` is `raise`; every later call says so.
        """
        if self.prefetcher is None or not self.prefetcher.in_flight:
            return  # a batch was refused; what was ready still is
        try:
            arrival = self.prefetcher.collect()
        except ExchangeError as error:
            self._fail(error)
            return
        # Only now: the job that just ended might have been given the same device memory.
        self._spent, self._ready = self._ready, None
        shares = self._asked.popleft()
        if arrival is not None:
            rng = self._orders.at(self.prefetcher.step, self.rank)
            self._ready = Representatives.shuffled(arrival, self.prefetcher.buffer.layout, self._turns, shares, rng)
        self._watch()  # last: whoever is stopped here can save and load

    def launch(self) -> None:
        """Admit what was staged, and ask for the rows of a later step."""
        if self.prefetcher is None:
            return
        wanted = self.prefetcher.step + LEAD >= self._config.start_step
        self.schedule.go_by(self.prefetcher.step)
        shares = [self.schedule.next(amount) for amount in self._amounts] if wanted else []
        self._amounts.clear()
        self._asked.append(shares)
        spent, self._spent = self._spent, None
        refresh = spent.refresh() if self._refreshes and spent is not None else None
        self.prefetcher.launch(sum(shares), refresh, self._words)

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
        old, self._first_step = self.prefetcher, step
        patience = self._config.exchange.timeout_s
        if old is not None and not old.close(drain_s=0.0, grace_s=patience):
            raise StorageError(
                f"the background of rank {self.rank} has been writing to the buffer for {patience:g} s "
                "(rehearsal.exchange.timeout_s), so it cannot be used anew; see whether its disk still answers"
            )
        if connect is not None:
            self._transport.close()
            self._transport = connect()
            self.rank, self.size, self.alone = self._transport.rank, self._transport.size, False
        if old is not None:
            self.prefetcher = self._make_prefetcher(old.buffer, old.device)
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on but the buffer; waits for the exchange in flight.

        Raises:
            ExchangeError: That failed.
        """
        self.drain()
        prefetcher = None if self.prefetcher is None else self.prefetcher.state_dict()
        return {
            "first_step": self._first_step,
            "schedule": self.schedule.state_dict(),
            "amounts": list(self._amounts),
            "asked": [list(shares) for shares in self._asked],
            "ready": None if self._ready is None else self._ready.state_dict(),
            "spent": None if self._spent is None else self._spent.state_dict(),
            "metrics": self.metrics.state_dict(),
            "words": list(self._words),
            "heard": self._heard,
            "guard": None if self.guard is None else self.guard.state_dict(),
            "pipeline": prefetcher,
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
        self.schedule.load_state_dict(state["schedule"])
        self._amounts = [int(amount) for amount in state["amounts"]]
        self._words, self._heard = list(state["words"]), int(state["heard"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self._asked = deque([[int(share) for share in shares] for shares in state["asked"]])
        if layout is None or rows is None:
            return
        buffer = self._make_buffer(layout)
        buffer.load_state_dict(rows)
        self.prefetcher = self._make_prefetcher(buffer, device)
        self.prefetcher.load_state_dict(state["pipeline"])
        self._ready, self._spent = (
            None if state[name] is None else Representatives.load(state[name], layout, device)
            for name in ("ready", "spent")
        )

    def reset(self, step: int) -> None:
        """Begin anew at `step` without a row."""
        if self.prefetcher is not None:
            self.prefetcher.close(drain_s=0.0)
            self.prefetcher = None
        self._first_step = step
        self._begin()

    def adopt(self, step: int, layout: RowLayout, device: torch.device) -> RehearsalBuffer:
        """Begin anew at `step` with an empty buffer, to be filled by the caller; see `RehearsalBuffer.adopt`."""
        self.reset(step)
        self.prefetcher = self._make_prefetcher(self._make_buffer(layout), device)
        return self.prefetcher.buffer

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
        pending = self._transport.all_gather(torch.tensor(values))
        deadline = time.monotonic() + self._config.exchange.timeout_s
        answers: list[list[int]] = wait(pending, deadline, lambda: False, f"an agreement on rank {self.rank}").tolist()
        return answers

    def close(self, drain_s: float) -> None:
        """Stop the worker after up to `drain_s` seconds, and close the transport."""
        try:
            if self.prefetcher is not None:
                self.prefetcher.close(drain_s)
        finally:
            self._transport.close()

    def _watch(self) -> None:
        """Have the guard hear what all ranks measured, as soon as all have told of it.

        Raises:
            ForgettingError: The guard ends the job.
        """
        if self.guard is None or self.prefetcher is None or self.alone:
            return
        total, weight, count = self.prefetcher.announced.astype(np.float64).T
        if int(count.min()) <= self._heard:
            return
        self._heard = int(count.min())
        if weight.sum():
            self.guard.hear(float(total.sum() / weight.sum()), self.prefetcher.step, self.schedule)

    @property
    def _started(self) -> bool:
        return self.step >= self._config.start_step

    def _begin(self) -> None:
        self.schedule = ReplayRatio(self._config, self._turns)
        self._ready = self._spent = None
        self._amounts = []
        self._asked = deque([[]])  # the first exchange brings none
        self._words = [0] * (NOTES - 1)
        self._heard = 0
        good = None if self.guard is None else self.guard.good
        self.guard = None if self._config.guard is None else ForgettingGuard(self._config.guard, self.rank, good)

    def _fail(self, error: ExchangeError) -> None:
        """Raise the error, or go on without the others, as the config says."""
        if self._config.exchange.on_failure == "raise":
            raise error
        self._go_alone(error)

    def _go_alone(self, error: ExchangeError) -> None:
        """Exchange with nobody from now on; what was on its way is lost, the own rows stay."""
        LOG.warning(
            "rank %d goes on with the rows of its own buffer (rehearsal.exchange.on_failure is 'local'): %s",
            self.rank,
            error,
        )
        self.metrics.failures += 1
        place = self.rank, self.size
        self.restart(self.step, LocalTransport)
        self.rank, self.size, self.alone = *place, True

    def _make_buffer(self, layout: RowLayout) -> RehearsalBuffer:
        return RehearsalBuffer(self._config.buffer, layout, rank=self.rank, seed=self._config.seed)

    def _make_prefetcher(self, buffer: RehearsalBuffer, device: torch.device) -> Prefetcher:
        prefetcher = Prefetcher(
            self._config,
            self._transport,
            buffer,
            device,
            self.metrics,
            rank=self.rank,
            turns=self._turns,
            step=self._first_step,
        )
        if self._proposed is not None:
            prefetcher.mixture.propose(self._proposed)
        return prefetcher
