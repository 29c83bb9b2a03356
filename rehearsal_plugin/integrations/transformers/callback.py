"""Hugging Face Trainer: rows join the micro-batches of a step before the Trainer counts their tokens.

    Trainer(..., callbacks=[RehearsalCallback()])

The Trainer reads all micro-batches of an optimizer step, counts their tokens over all ranks, and divides every loss by
that number. Rows that join later, at the model, would spoil the scale, so they join before the count. A micro-batch
stays one micro-batch, so resuming finds its place in the data. With `mode: replace`, displaced rows are offered to the
buffer like all others.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config import ConfigSource, RehearsalConfig
from rehearsal_plugin.core.metrics import few_partitions
from rehearsal_plugin.core.optional_import import missing_dependency
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.transformers.collation import watch_collator
from rehearsal_plugin.integrations.transformers.dataset_column import carry_partition, collator_of, without_column
from rehearsal_plugin.integrations.transformers.generating import refuse_generating
from rehearsal_plugin.integrations.transformers.own_loss import check_own_loss
from rehearsal_plugin.integrations.transformers.pairs import with_answers, with_pairs
from rehearsal_plugin.integrations.transformers.resuming import newest_on_all_ranks
from rehearsal_plugin.integrations.transformers.row_lengths import with_padding
from rehearsal_plugin.integrations.transformers.trainer import (
    VisibleLoader,
    augment_batch,
    deepspeed_section,
    hook_outputs,
    logits_of,
    loss_scale,
    ranks_factor,
    start_rehearsal,
)
from rehearsal_plugin.integrations.transformers.trainer_patch import patch_constructor, patch_methods
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import Criterion

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise missing_dependency("transformers", extra="transformers") from error

__all__ = ["RehearsalCallback", "patch"]

LOG = logging.getLogger(__name__)

SAVED = "rehearsal"
"""Key of `TrainerState.stateful_callbacks` under which a checkpoint names the step and run of its buffer."""

SHOWN = ("rows_stored", "rows_replayed", "rows_displaced", "waited_ms", "ratio")
SHOWN_BY_PREFIX = ("loss_", "tokens_", "forgetting/")


class RehearsalCallback(TrainerCallback):
    """Gives a `Trainer` a rehearsal buffer.

    One callback may serve several trainers, one after the other, such as one for each domain of a stream: the buffer
    stays.

    The first callback that is made patches four methods of the class `transformers.Trainer`, for the whole process and
    for good: `train`, `get_batch_samples`, `evaluation_loop` and `_save_checkpoint`. A trainer without a
    `RehearsalCallback` runs the original methods with unchanged arguments, and notices nothing. See `trainer_patch`.

    Args:
        config: The `rehearsal` section; None takes it from the DeepSpeed config of the trainer.

    Raises:
        ConfigError: The section cannot be used.
    """

    def __init__(self, config: ConfigSource | None = None) -> None:
        self._config = None if config is None else RehearsalConfig.load(config)
        self._handle = Handle(None)
        self._trainer: Callable[[], Any] = lambda: None
        self._resumes_from: str | None = None
        self._folder: str | None = None  # of checkpoints; each trial of a search has another one
        self._hooks: list[Any] = []
        self._scale = 1.0
        self._counted = False  # examples of a first batch, by its collator
        patch_methods(Trainer, _callback_of)

    @property
    def rehearsal(self) -> Rehearsal | None:
        """The running `Rehearsal`; None until training begins, or if there is none."""
        return self._handle.rehearsal

    def loss(self, criterion: Criterion) -> Callable[..., Tensor]:
        """The strategy's loss for `Trainer(compute_loss_func=...)`, for strategies that need the losses of rows apart.

        Args:
            criterion: The task's mean loss over rows, `criterion(logits, labels)`.

        Returns:
            A function that the trainer calls with outputs and labels. Its mean over the micro-batches and ranks of a
            step is trained on; in evaluation, and without a rehearsal, it is the criterion.
        """

        def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None, **_: Any) -> Tensor:
            scores = logits_of(outputs)
            if torch.is_grad_enabled():
                return self._scale * self._handle.loss(criterion, scores, labels)
            return criterion(scores, labels) / ranks_factor(self._trainer(), num_items_in_batch)

        return compute_loss

    def begin_training(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        """See `TrainerListener`."""
        self._trainer = weakref.ref(trainer)
        unread = self._config is not None and deepspeed_section(trainer) not in (None, self._config)
        if unread and trainer.is_world_process_zero():
            LOG.warning(
                "the section of RehearsalCallback(...) is taken, and the other one in the trainer's DeepSpeed config "
                "is not read; keep one of them"
            )
        section = self._section_for(trainer)
        if section is not None:
            refuse_generating(trainer)
            carry_partition(trainer, section)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_on_all_ranks(trainer.args.output_dir)
        self._resumes_from = resume_from_checkpoint or None
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, RehearsalCallback) for callback in callbacks) > 1:
            raise ConfigError("the trainer has more than one RehearsalCallback; give it one")
        callbacks.remove(self)
        callbacks.insert(0, self)  # so its figures are in the log when other callbacks report it

    def augment_batches(self, trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """See `TrainerListener`."""
        rehearsal = self.rehearsal
        if rehearsal is None:
            return batches
        rehearsal.give_up_step()  # micro-batches without a loss are of a step that was interrupted
        return (augment_batch(trainer, rehearsal, batch, self._counted) for batch in batches)

    def note_scale(self, trainer: Any, batches: list[Any], items: Any) -> None:
        """See `TrainerListener`."""
        self._scale = loss_scale(trainer, len(batches), items)

    def before_save(self, trainer: Any, trial: Any) -> None:
        """See `TrainerListener`."""
        self._folder = trainer._get_output_dir(trial=trial)
        rehearsal = self.rehearsal
        trainer.state.stateful_callbacks[SAVED] = self._handle.progress
        if rehearsal is not None and rehearsal.config.checkpoint.asynchronous:
            rehearsal.flush()
            trainer.accelerator.wait_for_everyone()  # rank 0 removes the files of all

    def visible_batches(self, trainer: Any, loader: Any) -> Any:
        """See `TrainerListener`."""
        self._trainer = weakref.ref(trainer)
        section = self._section_for(trainer)
        return loader if section is None or not section.hidden else VisibleLoader(loader, section.hidden)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`; comes again where the trainer starts anew, as with another batch size."""
        self._remove_hooks()  # from a job that was interrupted
        trainer = self._trainer()
        if trainer is None:
            raise ConfigError("train() of the trainer does not call Trainer.train, so no row can join its batches")
        section = self._section_for(trainer)
        if self.rehearsal is None and section is not None:
            section = with_answers(with_pairs(section, collator_of(trainer)), trainer)
            section = with_padding(section, trainer)
            self._handle = start_rehearsal(trainer, section)
            if self._handle.rehearsal is not None:
                self._handle.rehearsal.report.joined_at = "in the batches that the Trainer reads"
        rehearsal = self.rehearsal
        if rehearsal is None or rehearsal.closed:
            return
        check_own_loss(trainer, rehearsal)
        self._counted = watch_collator(kwargs.get("train_dataloader"), rehearsal.config)
        self._hooks = hook_outputs(rehearsal, trainer.model, lambda: self._scale)
        if rehearsal.hidden_states is not None:
            rehearsal.hidden_states.watch(trainer.model)
        resumed = self._resumes_from if rehearsal.config.checkpoint.enabled else None
        saved = state.stateful_callbacks.get(SAVED, {})
        if resumed is not None and not self._handle.load(
            resumed, saved.get("step"), run=saved.get("run"), missing_ok=True
        ):
            LOG.warning("%s has no rehearsal checkpoint; the buffer stays as it is", resumed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`; what is refused here has not been trained on."""
        rehearsal = self.rehearsal
        if rehearsal is None or rehearsal.closed:
            return
        if not rehearsal.fed:
            raise ConfigError(
                "the trainer made a step without reading a batch through Trainer.get_batch_samples; a subclass that "
                "overrides it must call super().get_batch_samples(...)"
            )
        try:
            rehearsal.pending.check_step()
        except BatchError as error:
            raise BatchError(
                f"{error} (for a Trainer whose compute_loss calls the model without labels, or makes a loss of its "
                "own: give it compute_loss_func=callback.loss(criterion) instead)"
            ) from error

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.rehearsal is None or self.rehearsal.closed:
            return
        self.rehearsal.step()
        self._handle.check_peers()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.rehearsal is None or logs is None or "loss" not in logs:
            return
        figures = {
            f"rehearsal/{name}": value
            for name, value in few_partitions(self.rehearsal.metrics()).items()
            if name in SHOWN or name.startswith(SHOWN_BY_PREFIX)
        }
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        rehearsal = self.rehearsal
        if rehearsal is not None and rehearsal.config.checkpoint.enabled and not args.save_only_model:
            self._handle.save(Path(self._folder or args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._remove_hooks()
        if self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.drain()
            self.rehearsal.flush()

    def close(self) -> None:
        """Stop the background and give up the process group; training goes on without replay."""
        self._handle.close()

    def _section_for(self, trainer: Any) -> RehearsalConfig | None:
        section = self._config or deepspeed_section(trainer)
        return without_column(section, trainer) if section is not None and section.enabled else None

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def patch(fallback: RehearsalConfig | None = None) -> None:
    """Give every `Trainer` that is made from now on a `RehearsalCallback`, so that a script needs no change.

    Args:
        fallback: The section of trainers whose DeepSpeed config has none.
    """

    def add_callback(trainer: Any) -> None:
        section = deepspeed_section(trainer) or fallback
        if section is not None and _callback_of(trainer) is None:
            if section.enabled:
                refuse_generating(trainer)
            trainer.add_callback(RehearsalCallback(section))

    patch_constructor(Trainer, add_callback)


def _callback_of(trainer: Any) -> RehearsalCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, RehearsalCallback)), None)
