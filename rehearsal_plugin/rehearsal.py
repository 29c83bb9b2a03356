"""The asynchronous pipeline: rows for the next step are prepared while this one computes.

One step, one direction::

    batch --pack--> staged rows --admit--> slots --write--> storage      the candidates of this step
    headers --draw--> plan --read--> storage --all_to_all--> rows        the representatives of a later one
    batch + representatives --> model

The training thread copies candidates to a staging area, decides on the index alone which of them stay, and
wakes the worker. The worker writes the admitted ones, draws anew, and waits for the rows that were drawn last.
A row offered in one `update` can be replayed two updates later at the earliest, never in its own batch.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.config import ConfigSource, RehearsalConfig
from rehearsal_plugin.errors import ClosedError
from rehearsal_plugin.metrics import Metrics
from rehearsal_plugin.pipeline import Pipeline
from rehearsal_plugin.rng import Purpose, generator
from rehearsal_plugin.rows import RowLayout
from rehearsal_plugin.schedule import Schedule
from rehearsal_plugin.transport import LocalTransport, TorchDistributedTransport, Transport

__all__ = ["Rehearsal"]

LEAD = 3  # steps from asking for rows to seeing them, at most (a loop of update() needs one less)


@dataclass
class Representatives:
    """The rows of one optimizer step in random order, and how many of them each micro-batch takes."""

    rows: Tensor
    order: Tensor
    shares: deque[int]

    @property
    def due(self) -> int:
        """Rows of the next micro-batch."""
        return min(self.shares[0], len(self.order)) if self.shares else 0

    def take(self, most: int) -> Tensor:
        """The rows of the next micro-batch, `[r, row_bytes]` uint8 with r <= most."""
        share = min(self.due, most)
        chosen, self.order = self.order[:share], self.order[share:]
        if self.shares:
            self.shares.popleft()
        return self.rows.index_select(0, chosen.to(self.rows.device))


class Rehearsal:
    """Rehearsal for any training loop.

    In a plain loop, call `update` once a step. A framework's hooks call `augment` for every micro-batch and
    `step` once an optimizer step, which moves the rows of all micro-batches of a step in one exchange.

    Args:
        config: The `rehearsal` section in any form that `RehearsalConfig.load` takes.
        transport: The ranks that share the buffer. None takes all ranks of torch.distributed if that is
            initialised, else this process alone. It is closed together with the rehearsal.

    Attributes:
        config: The section as a `RehearsalConfig`.

    Raises:
        ConfigError: The section cannot be used.
    """

    def __init__(self, config: ConfigSource, transport: Transport | None = None) -> None:
        self.config = RehearsalConfig.load(config)
        self._transport = transport or _default_transport(self.config)
        self._schedule = Schedule(self.config)
        self._metrics = Metrics()
        self._pipeline: Pipeline | None = None
        self._ready: Representatives | None = None
        self._sizes: list[int] = []  # of the micro-batches since the last exchange
        self._asked = _nothing_asked()
        self._first_step = 0
        self._closed = False
        atexit.register(self.close, drain_s=1.0)

    @property
    def buffer(self) -> RehearsalBuffer | None:
        """This rank's buffer; None until the first batch."""
        return None if self._pipeline is None else self._pipeline.buffer

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def update(self, batch: Any) -> Any:
        """One step of a plain loop: take what was prepared, hand over the batch, start preparing anew.

        Args:
            batch: Any nesting of mappings, lists and tuples of tensors; b samples.

        Returns:
            The same nesting. `mode: append`: b + r samples, the batch's own first, bit-identical.
            `mode: replace`: b samples, of which the last r are replayed.

        Raises:
            BatchError: The batch does not look like the first one.
            ExchangeError: The exchange failed; it stays failed, and every later call says so.
            ClosedError: `close` was called.
        """
        self._check_open()
        self._collect()
        augmented = self.augment(batch)
        self._launch()
        return augmented

    def augment(self, batch: Any, *, displace: bool = True) -> Any:
        """Stage a micro-batch's candidates, and return it with its share of the prepared rows.

        Args:
            batch: As for `update`.
            displace: Whether replayed rows take the place of the batch's last ones under `mode: replace`;
                False where the batch was made smaller beforehand.

        Returns:
            As for `update`.

        Raises:
            BatchError: The batch does not look like the first one.
            ClosedError: `close` was called.
        """
        self._check_open()
        pipeline = self._pipeline or self._build(batch)
        layout = pipeline.buffer.layout
        columns = layout.columns(batch)
        pipeline.stage(columns)
        size = len(columns[0])
        replace = self.config.mode == "replace"
        rows = self._take(size if replace and displace else None)
        replayed = 0 if rows is None else len(rows)
        displaced = replayed if replace and displace else 0
        self._sizes.append(size + replayed - displaced if replace else size)
        if rows is None or not replayed:
            return batch
        self._metrics.rows_replayed += replayed
        self._metrics.rows_displaced += displaced
        if self.config.buffer.partition_by is not None:
            self._metrics.count_replayed(pipeline.buffer.keys(rows))
        return layout.extend(batch, rows, displaced)

    def step(self) -> None:
        """The end of an optimizer step: take what was prepared for the next one, start preparing anew.

        Raises:
            ExchangeError: As for `update`.
            ClosedError: `close` was called.
        """
        self._check_open()
        if self._pipeline is not None:
            self._collect()
            self._launch()

    def due(self) -> int:
        """Rows that the next `augment` will add, for callers that make room themselves."""
        return self._ready.due if self._ready is not None and self._started else 0

    def metrics(self) -> dict[str, float]:
        """Totals since the start on this rank, by name; see `metrics.Metrics` for names and units."""
        return self._metrics.flat()

    @property
    def steps(self) -> int:
        """Exchanges so far, the same number on all ranks."""
        return self._first_step if self._pipeline is None else self._pipeline.step

    def commit(self) -> None:
        """Make the buffer's present state the one that `rollback` returns to.

        Raises:
            ExchangeError: The exchange in flight failed.
        """
        if self._pipeline is not None:
            self._pipeline.drain()
            self._pipeline.buffer.commit()

    def rollback(self) -> None:
        """Return the buffer to the last `commit`, or to empty; what was in flight or staged is dropped."""
        self.restart(self.steps)
        if self._pipeline is not None:
            self._pipeline.buffer.rollback()

    def restart(self, step: int, connect: Callable[[], Transport] | None = None) -> None:
        """Begin the exchange anew: the buffer stays, what was in flight or staged is dropped.

        Args:
            step: Number of the next exchange, the same on all ranks.
            connect: Makes the transport to go on with, after the present one was closed; None keeps that.
        """
        old, self._first_step = self._pipeline, step
        if old is not None:
            old.close(drain_s=0.0)
        if connect is not None:
            self._transport.close()
            self._transport = connect()
        if old is not None:
            self._pipeline = Pipeline(self.config, self._transport, old.buffer, old.device, self._metrics, step)
        self._ready, self._asked, self._schedule = None, _nothing_asked(), Schedule(self.config)
        self._sizes.clear()

    def close(self, drain_s: float | None = None) -> None:
        """Stop the worker and give up the transport; a second call does nothing.

        Args:
            drain_s: Seconds to let the exchange in flight end, so that no peer misses it; None takes
                `exchange.timeout_s`.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            if self._pipeline is not None:
                self._pipeline.close(self.config.exchange.timeout_s if drain_s is None else drain_s)
        finally:
            self._transport.close()

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain_s=None if kind is None else 0.0)

    @property
    def _started(self) -> bool:
        return self._pipeline is not None and self._pipeline.step >= self.config.start_step

    def _build(self, batch: Any) -> Pipeline:
        layout = RowLayout.infer(batch, self.config.fields)
        device = layout.columns(batch)[0].device
        rank = self._transport.rank
        buffer = RehearsalBuffer(self.config.buffer, layout, rank=rank, seed=self.config.seed)
        self._pipeline = Pipeline(self.config, self._transport, buffer, device, self._metrics, self._first_step)
        return self._pipeline

    def _take(self, most: int | None) -> Tensor | None:
        """The prepared rows of the next micro-batch, at most `most` of them."""
        if self._ready is None or not self._started:
            return None
        return self._ready.take(len(self._ready.order) if most is None else most)

    def _collect(self) -> None:
        if self._pipeline is None or not self._pipeline.in_flight:
            return  # a batch was refused; what was ready still is
        rows = self._pipeline.collect()
        # Only now: the job that just ended might have been given the same device memory.
        self._ready = None
        shares = self._asked.popleft()
        if rows is not None:
            rng = generator(self.config.seed, Purpose.ORDER, self._pipeline.step, self._transport.rank)
            order = torch.from_numpy(rng.permutation(len(rows)))
            self._ready = Representatives(rows, order, deque(shares))

    def _launch(self) -> None:
        assert self._pipeline is not None  # the caller has seen a batch
        wanted = self._pipeline.step + LEAD >= self.config.start_step
        shares = [self._schedule.next(size) for size in self._sizes] if wanted else []
        self._sizes.clear()
        self._asked.append(shares)
        self._pipeline.launch(sum(shares))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the rehearsal was closed; make a new one to go on")


def _nothing_asked() -> deque[list[int]]:
    """Shares asked for, oldest first: the first exchange brings none, every other one what was asked before it."""
    return deque([[]])


def _default_transport(config: RehearsalConfig) -> Transport:
    if dist.is_available() and dist.is_initialized():
        return TorchDistributedTransport(backend=config.exchange.backend, timeout_s=config.exchange.timeout_s)
    return LocalTransport()
