"""Two lines about a job: what a row is, at the first batch; and what came of it, at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.metrics_file import MetricsFile
from rehearsal_plugin.runtime.micro_batch import MicroBatch

__all__ = ["JobReport"]

LOG = logging.getLogger(__name__)

UNFED = 3
"""Optimizer steps in a row without a batch that are told."""

MOST_SHOWN = 40
"""Fields or passing leaves that are named; of more, the number is told."""


class JobReport:
    """Counts what the model sees, and logs the two lines.

    Args:
        config: The `rehearsal` section.

    Attributes:
        joined_at: Where rows join the batch, for a person.
        rows_new: New rows that the model saw.
        rows_replayed: Replayed rows that it saw.
    """

    def __init__(self, config: RehearsalConfig) -> None:
        self._config, self._file = config, MetricsFile(config)
        self._offered_before = self._steps_before = 0  # in jobs that wrote the checkpoints loaded here
        self.joined_at = "in update() or augment(), as the training loop calls them"
        self.rows_new = self.rows_replayed = 0
        self._micro_batches = self._steps_unfed = 0  # of this step; steps in a row without any
        self._error: BaseException | None = None

    def note_error(self, error: BaseException | None) -> None:
        """Remember what ended the job, if anything did: the reason why nothing was replayed."""
        self._error = error

    def count_micro_batch(self, micro_batch: MicroBatch, metrics: Metrics, times: int = 1) -> None:
        """Count what the model sees of a micro-batch, here and in the totals; -1 times takes it back."""
        new, share, keys = micro_batch.new, micro_batch.share, micro_batch.keys
        self.rows_new += times * new
        self._micro_batches += times
        if micro_batch.tokens is not None:
            metrics.count_tokens(micro_batch.tokens, new, keys, times)
        if share is None:
            return
        metrics.rows_replayed += times * share.count
        self.rows_replayed += times * share.count
        metrics.rows_displaced += times * micro_batch.displaced
        if keys is not None:
            metrics.count_replayed(keys[new:], times)

    @contextmanager
    def loading(self, metrics: Metrics) -> Iterator[None]:
        """Leave out what a checkpoint that is loaded meanwhile adds to the totals: other jobs made it."""
        offered, steps = metrics.rows_offered - self._offered_before, metrics.steps - self._steps_before
        try:
            yield
        finally:
            self._offered_before, self._steps_before = metrics.rows_offered - offered, metrics.steps - steps

    def note_step(self, coordinator: ReplayCoordinator) -> None:
        """Write a record of the step that ends, if one is due, and tell once if no batch comes any more."""
        self._steps_unfed = 0 if self._micro_batches else self._steps_unfed + 1
        self._micro_batches = 0
        if self.rows_new and self._steps_unfed == UNFED:
            LOG.warning(
                "rehearsal: no batch came in the last %d optimizer steps, so nothing is stored or replayed in them; "
                "rows join %s, and not in evaluation mode: call train() on the model or engine after an evaluation, "
                "or give the batches to the rehearsal as before",
                UNFED,
                self.joined_at,
            )
        self._file.note_step(coordinator, self.rows_new, self.rows_replayed)

    def log_first_batch(self, layout: RowLayout, rank: int) -> None:
        """Say what a row is, what passes through, and where replayed rows join; on rank 0, at level INFO."""
        if rank:
            return
        passing = [f"{name} ({why})" for name, why in layout.passing.items()]
        LOG.info(
            "rehearsal: a row is %s; %d bytes a row%s, %s%d rows fit into the buffer of a rank; passing through "
            "unreplayed: %s; replayed rows join %s",
            _listed([_described(field) for field in layout.fields]),
            layout.row_bytes,
            "" if self._config.padding is None else " at most",
            "" if self._config.padding is None or self._config.buffer.capacity_bytes is None else "at least ",
            self._config.buffer.rows(layout.row_bytes),
            _listed(passing) if passing else "nothing",
            self.joined_at,
        )

    def log_end(self, totals: Mapping[str, float], rank: int) -> None:
        """Say how many rows were offered, stored and replayed, and the share met: a warning where none was replayed.

        Args:
            totals: See `Rehearsal.metrics`.
            rank: This rank.
        """
        self._file.close(self.rows_new, self.rows_replayed)
        if not self.rows_new and not self.rows_replayed:
            reason = "no batch came" if self._error is None else f"the job ended with {type(self._error).__name__}"
            LOG.warning("rehearsal on rank %d: %s, so nothing was stored and nothing replayed", rank, reason)
            return
        config = self._config
        wants_replay = bool(config.ratio or config.representatives or config.ratio_schedule)
        missing = wants_replay and not self.rows_replayed
        LOG.log(
            logging.WARNING if missing else logging.INFO,
            "rehearsal on rank %d: %d rows offered, %d stored, %d replayed; the share of replayed rows was %.4g%s%s",
            rank,
            totals["rows_offered"] - self._offered_before,
            totals["rows_stored"],
            self.rows_replayed,
            self.rows_replayed / (self.rows_new + self.rows_replayed),
            f", {self._reason(totals)}" if missing else "",
            self._controlled(totals),
        )

    def _controlled(self, totals: Mapping[str, float]) -> str:
        """How the forgetting budget was met; empty without one."""
        budget, rises = self._config.ratio_budget, [totals[name] for name in totals if name.startswith("forgetting/")]
        if budget is None or not rises:
            return ""
        return (
            f"; the ratio is {totals['ratio']:.4g} in the end, and the loss on replayed rows has risen by "
            f"{100 * max(rises):.3g} % of what it was (rehearsal.ratio.budget: {100 * budget.budget:.3g} %)"
        )

    def _reason(self, totals: Mapping[str, float]) -> str:
        """Why nothing was replayed."""
        exchanges = int(totals["steps"])
        steps = exchanges - self._steps_before
        if self._error is not None:
            return f"as the job ended with {type(self._error).__name__}"
        if not steps:
            return "as no optimizer step was counted: call step() after each, or attach the rehearsal to your framework"
        if exchanges < self._config.start_step:
            return f"as the job ended before rehearsal.start_step {self._config.start_step}"
        wanted = [key for key, weight in (self._config.sampling.mixture or {}).items() if weight]
        held = sorted(
            int(name.partition("/")[2]) for name in totals if name.startswith("rows_stored/") and totals[name]
        )
        if wanted and not set(wanted).intersection(held):
            return f"as rehearsal.sampling.weights names the partitions {wanted}, and this rank holds rows of {held}"
        return f"though {steps} steps were made: rows come three steps after they were asked for"


def _described(field: Field) -> str:
    return f"{field.name or 'the batch'} {str(field.dtype).removeprefix('torch.')} {list(field.shape)}"


def _listed(entries: list[str]) -> str:
    shown = ", ".join(entries[:MOST_SHOWN])
    return shown if len(entries) <= MOST_SHOWN else f"{shown} and {len(entries) - MOST_SHOWN} more"
