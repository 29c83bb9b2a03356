"""Micro-batches that wait for their loss: outputs and targets come back, the strategy makes its loss of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.loss_monitor import LossMonitor
from rehearsal_plugin.runtime.micro_batch import MicroBatch, no_criterion
from rehearsal_plugin.runtime.recorded_outputs import check_recorded
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.replay_weights import ReplayWeights, add_to_loss
from rehearsal_plugin.runtime.sample_losses import SampleLosses, sample_losses
from rehearsal_plugin.runtime.summed_losses import SumCheck
from rehearsal_plugin.runtime.term_gradient import TermGradients
from rehearsal_plugin.runtime.token_losses import LabelShift
from rehearsal_plugin.strategies import Part, Strategy
from rehearsal_plugin.strategies.base import Criterion, tensors_of

__all__ = ["PendingLosses"]


class PendingLosses:
    """Micro-batches in their order, each waiting for the outputs of the model.

    Args:
        config: The `rehearsal` section.
        strategy: What replayed rows are used for.
        coordinator: Where rows with their state, and new state of replayed rows, go.
        report: Counts what the model sees.

    Attributes:
        expected: Micro-batches so far, those with an answer among them.
        step_checks: Called before the end of this step; each may refuse it.
    """

    def __init__(
        self, config: RehearsalConfig, strategy: Strategy, coordinator: ReplayCoordinator, report: JobReport
    ) -> None:
        self._config, self._strategy, self._coordinator = config, strategy, coordinator
        self._report = report
        self._waiting: deque[tuple[MicroBatch, RowLayout]] = deque()
        self._answered: MicroBatch | None = None  # the last one, as its backward pass may fail
        self.expected = self._settled = 0  # micro-batches; those of earlier steps are settled
        self._asked: set[int] = set()  # numbers of those whose loss was asked for since
        self._dropped: set[int] = set()
        self.step_checks: list[Callable[[], None]] = []
        self._terms = TermGradients()
        self._weights = ReplayWeights(config, strategy, coordinator)
        self._monitor, self._shift = LossMonitor(config, coordinator), LabelShift()
        self._refuse_sum = SumCheck()

    def expect(self, micro_batch: MicroBatch, layout: RowLayout) -> None:
        """Wait for the answer for this micro-batch too, after those for the ones before it."""
        self._waiting.append((micro_batch, layout))
        self._answered = None
        self.expected += 1

    def awaits(self, number: int) -> bool:
        """Whether nobody asked for the loss of micro-batch `number` of this step yet, counted from 1."""
        return number > self._settled and number not in self._asked

    def is_dropped(self, number: int) -> bool:
        """Whether micro-batch `number` was forgotten, or is one of an earlier step."""
        return number <= self._settled or number in self._dropped

    def loss(self, criterion: Criterion, outputs: Any, *targets: Any) -> Tensor:
        """See `Rehearsal.loss`."""
        if not self._current()[0].by_row:  # rows of a sample stand apart: there are no parts, and nobody needs them
            self._refuse_documents()
            self._end_turn()
            return criterion(outputs, *targets)
        new, *replayed = self._parts(outputs, targets, criterion)
        self._monitor.measure_parts(self._current()[0], [new, *replayed])
        replayed = [part for part in replayed if part.size]
        # One call also where the criterion weights rows unequally, as a mean over tokens does.
        in_one = self._strategy.plain and self._weights.importance is None and not self._weights.controlled
        if replayed and self._strategy.relearns and (self._monitor.due or not in_one):
            self._refuse_sum(criterion, outputs, targets, [new, *replayed])
        if in_one:
            loss = criterion(outputs, *targets)
        else:
            loss = self._strategy.loss(new, self._weights.weigh_parts(self._current()[0], replayed))
            self._terms.watch(loss, tensors_of(outputs).values())
        self._refresh(replayed)
        self._record(new)
        return loss

    def complete(self, outputs: Any, scale: float) -> Any:
        """See `Rehearsal.complete`."""
        micro_batch = self._current()[0]
        if not micro_batch.by_row and micro_batch.lengths is None:  # as in `loss`
            self._end_turn()
            return outputs
        factors = self._weights.factors(micro_batch)
        losses = self._sample_losses(micro_batch, outputs, weighted=factors is not None)
        new, *replayed = _with_losses(self._parts(outputs, (), no_criterion), losses)
        replayed = [part for part in replayed if part.size]
        if self._config.buffer.by_loss:
            self._refresh(replayed)
        self._record(new)
        completed = outputs
        if losses is not None and factors is not None:
            completed = self._weights.weigh_outputs(micro_batch, outputs, losses, factors, self._terms)
        if not self._strategy.plain or self._strategy.records:
            term = self._strategy.regularizer(replayed)
            if term is not None:
                added = scale * term
                self._terms.watch(added, tensors_of(outputs).values())
                completed = add_to_loss(completed, added)
        return completed

    def record(self, outputs: Any) -> None:
        """See `Rehearsal.record`."""
        self._record(self._parts(outputs, (), no_criterion)[0])

    def drop(self) -> None:
        """See `Rehearsal.drop`."""
        if self._waiting:
            self._end_turn()
        self._dropped.add(self._turn - 1)
        dropped, self._answered = self._answered, None
        if dropped is None or dropped.turn is None or not self._coordinator.undo(dropped.turn):
            return
        self._report.count_micro_batch(dropped, self._coordinator.metrics, times=-1)

    def clear(self) -> None:
        """Forget all micro-batches, and what was measured of them."""
        self._waiting.clear()
        self._answered = None
        self._settle()
        self._monitor.clear()

    def check(self) -> None:
        """Refuse to go on without an answer: a strategy would do nothing, and nobody would know.

        Raises:
            BatchError: One is missing.
        """
        if not self._waiting:
            return
        if not self.must_be_asked:
            self._waiting.clear()  # whoever wanted their loss has asked for it
            return
        without = "" if self._config.buffer.by_loss else "rehearsal.record(outputs) to do without a loss, "
        raise BatchError(
            f"{self.need}, and was not asked for that of the last micro-batch; call rehearsal.loss(criterion, outputs, "
            f"*targets), {without}or rehearsal.drop() after a forward that failed (`rehearsal` is your Rehearsal, or "
            "the handle that attach() returned)"
        )

    def check_step(self) -> None:
        """Refuse to end a step without all answers, or one that did not train on them.

        Raises:
            BatchError: An answer is missing, or a strategy's term or the model's loss reached no gradient.
        """
        self.check()
        self._terms.check(self._weights.subject)
        for check in self.step_checks:
            check()

    @property
    def must_be_asked(self) -> bool:
        """Whether a step of this number is refused without an answer to each micro-batch; see `check`."""
        return self._strategy.records or not self._strategy.plain or self.measures

    @property
    def uses_sample_losses(self) -> bool:
        """Whether a model that computes its own loss is asked for that of each sample in this step."""
        weighted = self._weights.controlled or self._strategy.replayed_weight not in (None, 1)
        return weighted or self.measures or self._config.buffer.by_loss

    @property
    def measures(self) -> bool:
        """Whether losses are told apart in this step, or in every one."""
        return self._weights.importance is not None or self._weights.controlled or self._monitor.due

    def end_step(self) -> None:
        """Check the step, see `check_step`; note what was measured in it, and expect nothing of it any more."""
        self.check_step()
        self._settle()
        self._monitor.end_step()
        self._report.note_step(self._coordinator)

    @property
    def need(self) -> str:
        """Why an answer is needed, for a person."""
        if self._config.buffer.by_loss:
            return "rehearsal.buffer.score_by 'loss' stores the loss of each row"
        if self._config.retrieval is not None and self._config.retrieval.module is not None:
            return "rehearsal.retrieval.module stores hidden states beside each row"
        if self._strategy.plain and not self._strategy.records:
            key = "losses_every" if self._weights.importance is None else "strategy.partition_weights"
            return f"rehearsal.{key} needs the losses of new and replayed rows apart"
        what = "stores the model's outputs" if self._strategy.records else "has a loss of its own"
        return f"strategy '{self._config.strategy.name}' {what}"

    def _parts(self, outputs: Any, targets: tuple[Any, ...], criterion: Criterion) -> list[Part]:
        return self._current()[0].parts(self._strategy, outputs, targets, criterion)

    def _refuse_documents(self) -> None:
        """Refuse a criterion over a flat row of documents where the losses of samples are asked for."""
        if self.must_be_asked:
            raise BatchError(
                f"{self.need}, and a criterion has one loss for a flat row of documents; let the model compute its "
                "loss from the 'labels' of the batch, or set rehearsal.packing to 'rows'"
            )

    def _sample_losses(self, micro_batch: MicroBatch, outputs: Any, *, weighted: bool) -> SampleLosses | None:
        """The losses of samples by their tokens, measured where this step is; None where nobody uses them."""
        if not self.uses_sample_losses:
            return None
        losses = sample_losses(micro_batch, outputs, self._shift, weighted=weighted)
        self._monitor.measure_samples(micro_batch, losses)
        return losses

    def _record(self, new: Part) -> None:
        """Store new rows together with their state, unless they are stored already."""
        if self._strategy.records:
            micro_batch, layout = self._current()
            state = self._strategy.state(replace(new, outputs=map_leaves(new.outputs, _detached)))
            if self._coordinator.prefetcher is None:
                check_recorded(self.need, state, micro_batch.columns, layout)
            turn = micro_batch.turn or Turn(micro_batch.new)
            self._coordinator.stage_candidates(micro_batch.columns, layout, state, turn)
        self._end_turn()

    def _end_turn(self) -> None:
        """The micro-batch whose turn it was has its answer."""
        self._asked.add(self._turn)
        self._answered = self._waiting.popleft()[0]

    @property
    def _turn(self) -> int:
        """Number of the micro-batch whose turn it is."""
        return self.expected - len(self._waiting) + 1

    def _settle(self) -> None:
        """Expect nothing any more of the micro-batches so far."""
        self._settled = self.expected
        self._asked.clear()
        self._dropped.clear()
        self._terms.clear()
        self.step_checks.clear()

    def _refresh(self, replayed: list[Part]) -> None:
        share = self._current()[0].share
        if not self._strategy.refreshes or share is None:
            return
        for part, index in zip(replayed, torch.split(share.index, [part.size for part in replayed]), strict=True):
            self._coordinator.queue.update_state(index, self._strategy.refresh(part))

    def _current(self) -> tuple[MicroBatch, RowLayout]:
        if not self._waiting:
            raise BatchError("there is no micro-batch to compute a loss for; call augment(batch) once before each")
        return self._waiting[0]


def _detached(_: str, leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _with_losses(parts: list[Part], losses: SampleLosses | None) -> list[Part]:
    """Parts with the losses of their rows."""
    if losses is None:
        return parts
    by_part = torch.split(losses.means, [part.size for part in parts])
    return [replace(part, losses=of_part) for part, of_part in zip(parts, by_part, strict=True)]
