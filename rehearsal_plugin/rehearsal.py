"""The asynchronous pipeline: rows for the next step are prepared while this one computes.

One step, one direction::

    batch --pack--> staged rows --admit--> slots --write--> storage      the candidates of this step
    headers --draw--> plan --read--> storage --all_to_all--> rows        the representatives of a later one
    batch + representatives --> model

The training thread stages candidates, decides on the index alone which of them stay, and wakes the background, which
writes these, draws anew, and waits for the rows that were drawn last. A row is never replayed in its own batch.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.checkpoint.checkpointed import Checkpointed
from rehearsal_plugin.checkpoint.saver import Saver
from rehearsal_plugin.config import ConfigSource, RehearsalConfig, SamplingConfig
from rehearsal_plugin.config.unread import warn_of_unread_keys
from rehearsal_plugin.distributed.transport import Transport, announcing_failure, open_transport
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.batch_augmenter import BatchAugmenter, Transform
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.strategies import RowLoss, make_strategy
from rehearsal_plugin.strategies.base import Criterion
from rehearsal_plugin.strategies.row_embedding import with_embedding

__all__ = ["Rehearsal"]


class Rehearsal(Checkpointed):
    """Rehearsal for any training loop.

    In a plain loop, call `update` once a step. A framework's hooks call `augment` for every micro-batch and
    `step` once an optimizer step, which moves the rows of all micro-batches of a step in one exchange.

    Args:
        config: The `rehearsal` section in any form that `RehearsalConfig.load` takes.
        transport: The ranks that share the buffer. None takes all ranks of torch.distributed if that is
            initialised, else this process alone. It is closed together with the rehearsal.
        transform: Random augmentation of samples, from a batch to a batch of the same nesting. Rows are stored
            without it; `strategy.transform` says whether replayed rows or all rows go through it when they are read.

    Attributes:
        config: The section as a `RehearsalConfig`.
        strategy: What replayed rows are used for.
        pending: Micro-batches that wait for their loss.
        hidden_states: Gives rows their embedding, once its `watch` has the model; None without `retrieval.module`.
        report: Logs what a row is at the first batch, and what was replayed at the end.

    Raises:
        ConfigError: The section cannot be used.
        ClosedError: After `close`, by what trains, saves or loads; in a forked child of its process, by every method.
    """

    def __init__(
        self, config: ConfigSource, transport: Transport | None = None, *, transform: Transform | None = None
    ) -> None:
        self._process = os.getpid()
        with nullcontext() if transport else announcing_failure():
            self.config = RehearsalConfig.load(config).of_a_job()
            strategy = make_strategy(self.config.strategy)
        inner = RowLoss(strategy) if self.config.buffer.by_loss else strategy
        self.strategy, self.hidden_states = with_embedding(inner, self.config.retrieval)
        transport = transport or open_transport(self.config.exchange.backend, self.config.exchange.timeout_s)
        if transport.rank == 0:
            warn_of_unread_keys(self.config, vars(type(strategy)).get("reads"))
        self._coordinator = ReplayCoordinator(self.config, transport, self.strategy.draws, self.strategy.refreshes)
        self.report = JobReport(self.config)
        self.pending = PendingLosses(self.config, self.strategy, self._coordinator, self.report)
        parts = self.config, self.strategy, self._coordinator, self.pending, self.report
        self._augmenter = BatchAugmenter(*parts, transform=transform, fill=self._preload)
        self._saver = Saver(self.config.checkpoint.write_timeout_s)
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def fed(self) -> bool:
        """Whether a batch has come yet."""
        return self._augmenter.fed

    @property
    def measures(self) -> bool:
        """Whether the losses of new and of replayed rows are told apart, now or in other steps."""
        return self.config.losses_every > 0 or self.config.strategy.partition_weights is not None

    @property
    def padding(self) -> Padding | None:
        """How rows of different length are stored; None where all have the same."""
        return self._augmenter.padding

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
        """
        self._check_open()
        if self.strategy.records or self.measures:
            raise ConfigError(
                f"{self.pending.need}, which update() never sees; "
                "call augment(batch), loss(criterion, outputs, *targets) and step() instead"
            )
        self.pending.end_step()
        self._coordinator.collect()
        augmented = self.augment(batch)
        self._coordinator.launch()
        return augmented

    def augment(self, batch: Any, *, displace: bool = True, ahead: bool = False) -> Any:
        """Stage a micro-batch's candidates, and return it with its share of the prepared rows.

        Args:
            batch: As for `update`.
            displace: Whether replayed rows take the place of the batch's last ones under `mode: replace`;
                False where the batch was made smaller beforehand.
            ahead: Whether the loss of earlier micro-batches may still be asked for, in their order, as in a loop that
                reads all micro-batches of a step first.

        Returns:
            As for `update`.

        Raises:
            BatchError: The batch does not look like the first one.
        """
        self._check_open()
        if not ahead:
            self.pending.check()
        self._coordinator.check_steps()
        with self._coordinator.metrics.timed("augmented_ms"):
            return self._augmenter.augment(batch, displace=displace)

    def visible(self, batch: Any) -> Any:
        """A batch without the fields that `hidden` names: what the model gets."""
        self._check_process()
        return self._augmenter.visible(batch)

    def loss(self, criterion: Criterion, outputs: Any, *targets: Any) -> Tensor:
        """The strategy's loss for the micro-batch that `augment` returned last; also records its outputs.

        Args:
            criterion: The task's mean loss over rows, `criterion(outputs, *targets)`.
            outputs: What the model gave for all rows of the micro-batch.
            targets: What the criterion compares them with, for all rows.

        Returns:
            A scalar.

        Raises:
            BatchError: The outputs do not fit the strategy, or are not those of all rows.
        """
        self._check_process()
        return self.pending.loss(criterion, outputs, *targets)

    def complete(self, outputs: Any, scale: float = 1.0) -> Any:
        """Add the strategy's term to the loss that a model computed itself; also records its outputs.

        The model's own loss covers new and replayed rows alike.

        Args:
            outputs: What the model gave for all rows: a mapping, as models of Hugging Face return it, with a scalar
                `loss` beside a tensor with the batch dimension, such as `logits`.
            scale: What the strategy's term is multiplied by, where the loss is not the mean over the micro-batch.

        Returns:
            The same mapping with another `loss`.

        Raises:
            BatchError: The outputs do not fit the strategy.
        """
        self._check_process()
        return self.pending.complete(outputs, scale)

    def record(self, outputs: Any) -> None:
        """Store the outputs for the new rows beside them, where the strategy wants that; `loss` does it too.

        Args:
            outputs: What the model gave for all rows of the micro-batch that `augment` returned last.

        Raises:
            BatchError: The outputs' dtype or shape are not those of the first time.
        """
        self._check_process()
        self.pending.record(outputs)

    def drop(self) -> None:
        """Forget the micro-batch whose turn it is, as after a forward or a backward that failed.

        The same batch can then be given again: its rows were not offered, and its replayed rows come with the next
        one. Without a micro-batch that waits, it is the one whose loss was asked for last.
        """
        self._check_process()
        self.pending.drop()

    def give_up_step(self) -> None:
        """Forget all micro-batches that wait for their loss, as after a step that was broken off."""
        self._check_process()
        self.pending.clear()

    def step(self) -> None:
        """The end of an optimizer step: take what was prepared for the next one, start preparing anew.

        Raises:
            ExchangeError: As for `update`.
        """
        self._check_open()
        self.pending.end_step()
        self._coordinator.collect()
        self._coordinator.launch()

    def due(self, rows: int | None = None) -> int:
        """Number of replayed rows that the next `augment` adds, for callers that make room themselves.

        Args:
            rows: Of that micro-batch, new and replayed; None for as many as in the step that asked for them.
        """
        self._check_process()
        return self._coordinator.due(rows)

    def reweigh(self, weights: Mapping[Any, float]) -> None:
        """Change the mixture while the job runs, as soon as all ranks have been told the same.

        Args:
            weights: What `sampling.weights` takes: the share of each partition in what is replayed, by its key.

        Raises:
            ConfigError: They are no weights, or rows are not drawn by partition.
        """
        self._check_process()
        if not self.config.sampling.weights_given:
            raise ConfigError(
                f"rehearsal.sampling.weights is '{self.config.sampling.weights}', so nobody can give weights by "
                "partition; start the job with 'balanced' or with weights by partition"
            )
        SamplingConfig(weights=dict(weights))
        self._coordinator.lifecycle.propose_mixture(weights)

    def metrics(self) -> dict[str, float]:
        """Totals since the start on this rank, by name; see `metrics.Metrics` for names and units.

        With `buffer.partition_by` also `rows_offered/<key>`, `rows_stored/<key>` and `rows_replayed/<key>`; of the
        `MOST_PARTITIONS_TOLD` (1,024) partitions that offered most rows, where there are more.
        """
        self._check_process()
        return self._coordinator.totals()

    def close(self, drain_s: float | None = None) -> None:
        """Stop the worker and give up the transport; a second call, or one in a forked child, does nothing.

        Args:
            drain_s: Seconds for the exchange in flight, so that no peer misses it; None takes `exchange.timeout_s`.
        """
        if self._closed or os.getpid() != self._process:  # a forked child has no thread to wait for
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        if self.hidden_states is not None:
            self.hidden_states.close()
        try:
            self._coordinator.lifecycle.close(self.config.exchange.timeout_s if drain_s is None else drain_s)
        finally:
            self._saver.close()
            self.report.log_end(self._coordinator.totals(), self._coordinator.lifecycle.rank)

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self.report.note_error(error)
        self.close(drain_s=None if error is None else 0.0)


def _close_at_exit(rehearsal: weakref.ref[Rehearsal]) -> None:
    """Let the exchange in flight end shortly; one that nobody has any more is gone already."""
    alive = rehearsal()
    if alive is not None:
        alive.report.note_error(getattr(sys, "last_value", None))
        alive.close(drain_s=1.0)
