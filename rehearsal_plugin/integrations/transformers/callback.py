"""Hugging Face Trainer: rows join the micro-batches of a step before the Trainer counts their tokens.

    Trainer(..., callbacks=[RehearsalCallback()])

The Trainer reads all micro-batches of an optimizer step, counts the tokens in them over all ranks, and divides every
loss by that number. Whoever adds rows later, at the model, spoils the scale; here they are there when it counts. Each
micro-batch that is read stays one micro-batch, so resuming finds its place in the data; with `mode: replace` the rows
that are displaced are offered to the buffer like all others.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config import ConfigSource, RehearsalConfig
from rehearsal_plugin.core.metrics import few_partitions
from rehearsal_plugin.core.optional_import import missing_dependency
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.integrations.deepspeed.engine import left_alone
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.inject.forward import needs_outputs
from rehearsal_plugin.integrations.transformers.trainer import (
    Visible,
    hook,
    ranks_factor,
    scale_of,
    scores_of,
    section_of,
    start,
)
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import Criterion

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise missing_dependency("transformers", extra="transformers") from error

__all__ = ["RehearsalCallback", "patch"]

LOG = logging.getLogger(__name__)

SHOWN = ("rows_stored", "rows_replayed", "rows_displaced", "waited_ms")
SHOWN_BY_PREFIX = ("loss_", "tokens_")


class RehearsalCallback(TrainerCallback):
    """Gives a `Trainer` a rehearsal buffer.

    One callback may serve several trainers, one after the other, as where the domains of a stream are trained on in
    turn: the buffer stays.

    Args:
        config: The `rehearsal` section; None takes it from the DeepSpeed config of the trainer.
    """

    def __init__(self, config: ConfigSource | None = None) -> None:
        self._config = None if config is None else RehearsalConfig.load(config)
        self._handle = Handle(None)
        self._trainer: Callable[[], Any] = lambda: None
        self._resumes_from: str | None = None
        self._folder: str | None = None  # of checkpoints, which is another one for every trial of a search
        self._hooks: list[Any] = []
        self._scale = 1.0
        _wrap_trainer()

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

        def computed(outputs: Any, labels: Any, num_items_in_batch: Any = None, **_: Any) -> Tensor:
            scores = scores_of(outputs)
            if torch.is_grad_enabled():
                return self._scale * self._handle.loss(criterion, scores, labels)
            return criterion(scores, labels) / ranks_factor(self._trainer(), num_items_in_batch)

        return computed

    def begin(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        """Called when `Trainer.train` begins, with what it was given."""
        self._trainer = weakref.ref(trainer)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self._resumes_from = resume_from_checkpoint or None
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(one, RehearsalCallback) for one in callbacks) > 1:
            raise ConfigError("the trainer has more than one RehearsalCallback; give it one")
        callbacks.remove(self)
        callbacks.insert(0, self)  # what it adds to the log is there when others report it

    def read(self, trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches of a step with replayed rows, as the trainer reads them."""
        rehearsal = self.rehearsal
        if rehearsal is None:
            return batches
        rehearsal.give_up_step()  # whoever still waits for its loss is of a step that was broken off
        return (_augmented(trainer, rehearsal, batch) for batch in batches)

    def counted(self, trainer: Any, batches: list[Any], items: Any) -> None:
        """Note by how much the trainer will scale the loss of each of `batches`, `items` tokens together."""
        self._scale = scale_of(trainer, len(batches), items)

    def saving(self, trainer: Any, trial: Any) -> None:
        """Called before a checkpoint is written, which may remove an older one."""
        self._folder = trainer._get_output_dir(trial=trial)
        rehearsal = self.rehearsal
        if rehearsal is not None and rehearsal.config.checkpoint.asynchronous:
            rehearsal.flush()
            trainer.accelerator.wait_for_everyone()  # rank 0 removes the files of all

    def visible(self, trainer: Any, loader: Any) -> Any:
        """The loader of an evaluation, without the fields that the section hides."""
        self._trainer = weakref.ref(trainer)
        section = self._section(trainer)
        return loader if section is None or not section.hidden else Visible(loader, section.hidden)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`; comes again where the trainer starts anew, as with another batch size."""
        self._unhook()  # from a job that was broken off
        trainer = self._trainer()
        section = self._section(trainer)
        if self.rehearsal is None and section is not None:
            self._handle = start(trainer, section)
        rehearsal = self.rehearsal
        if rehearsal is None or rehearsal.closed:
            return
        if needs_outputs(rehearsal) and trainer.label_smoother is not None and trainer.compute_loss_func is None:
            raise ConfigError(
                "with label_smoothing_factor the Trainer computes the loss, and the rehearsal needs that of the rows "
                "apart; give Trainer compute_loss_func=callback.loss(criterion) with a criterion that smooths labels"
            )
        self._hooks = hook(rehearsal, trainer.model, lambda: self._scale)
        if rehearsal.hidden_states is not None:
            rehearsal.hidden_states.watch(trainer.model)
        resumed = self._resumes_from if rehearsal.config.checkpoint.enabled else None
        if resumed is not None and not self._handle.load(resumed, missing_ok=True):
            LOG.warning("%s has no rehearsal checkpoint; the buffer stays as it is", resumed)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        rehearsal = self.rehearsal
        if rehearsal is None or rehearsal.closed:
            return
        if not rehearsal.fed:
            raise ConfigError(
                "the trainer made a step without reading a batch through Trainer.get_batch_samples; a subclass that "
                "overrides it must call super().get_batch_samples(...)"
            )
        try:
            rehearsal.step()
        except BatchError as error:
            raise BatchError(
                f"{error} (for a Trainer whose compute_loss calls the model without labels: give it "
                "compute_loss_func=callback.loss(criterion) instead)"
            ) from error
        self._handle.check_peers()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.rehearsal is None or logs is None or "loss" not in logs:
            return
        shown = {
            f"rehearsal/{name}": value
            for name, value in few_partitions(self.rehearsal.metrics()).items()
            if name in SHOWN or name.startswith(SHOWN_BY_PREFIX)
        }
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        rehearsal = self.rehearsal
        if rehearsal is not None and rehearsal.config.checkpoint.enabled and not args.save_only_model:
            self._handle.save(Path(self._folder or args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._unhook()
        if self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.drain()
            self.rehearsal.flush()

    def close(self) -> None:
        """Stop the background and give up the process group; training goes on without replay."""
        self._handle.close()

    def _section(self, trainer: Any) -> RehearsalConfig | None:
        section = self._config or section_of(trainer)
        return section if section is not None and section.enabled else None

    def _unhook(self) -> None:
        for one in self._hooks:
            one.remove()
        self._hooks.clear()


def patch(fallback: RehearsalConfig | None = None) -> None:
    """Make every `Trainer` have a `RehearsalCallback`, for scripts that are to be left untouched.

    Args:
        fallback: The section of trainers whose DeepSpeed config has none.
    """
    trainers: Any = Trainer
    original = trainers.__init__

    @functools.wraps(original)
    def made(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        section = section_of(trainer) or fallback
        if section is not None and _callback_of(trainer) is None:
            trainer.add_callback(RehearsalCallback(section))

    trainers.__init__ = made


def _wrap_trainer() -> None:
    """Have trainers with a callback tell it what they read; all others are as they were."""
    trainers: Any = Trainer
    if hasattr(trainers.get_batch_samples, "rehearsal_original"):
        return
    get_batch_samples, train, evaluation_loop = trainers.get_batch_samples, trainers.train, trainers.evaluation_loop
    save_checkpoint = trainers._save_checkpoint

    @functools.wraps(get_batch_samples)
    def reading(trainer: Any, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        callback = _callback_of(trainer)
        if callback is None:
            return get_batch_samples(trainer, epoch_iterator, *args, **kwargs)
        batches, items = get_batch_samples(trainer, callback.read(trainer, epoch_iterator), *args, **kwargs)
        callback.counted(trainer, batches, items)
        return batches, items

    @functools.wraps(train)
    def training(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback = _callback_of(trainer)
        if callback is not None:
            callback.begin(trainer, resume_from_checkpoint)
        with nullcontext() if callback is None else left_alone():
            return train(trainer, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(evaluation_loop)
    def evaluating(trainer: Any, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        callback = _callback_of(trainer)
        if callback is None:
            return evaluation_loop(trainer, dataloader, *args, **kwargs)
        with left_alone():
            return evaluation_loop(trainer, callback.visible(trainer, dataloader), *args, **kwargs)

    @functools.wraps(save_checkpoint)
    def saving(trainer: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        callback = _callback_of(trainer)
        if callback is not None:
            callback.saving(trainer, trial)
        return save_checkpoint(trainer, model, trial, *args, **kwargs)

    reading.rehearsal_original = get_batch_samples  # type: ignore[attr-defined]
    trainers.get_batch_samples, trainers.train, trainers.evaluation_loop = reading, training, evaluating
    trainers._save_checkpoint = saving


def _callback_of(trainer: Any) -> RehearsalCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((one for one in callbacks if isinstance(one, RehearsalCallback)), None)


def _augmented(trainer: Any, rehearsal: Rehearsal, batch: Any) -> Any:
    if rehearsal.closed:
        return rehearsal.visible(batch)
    key = rehearsal.config.buffer.partition_by
    if key is not None and trainer.args.remove_unused_columns and key not in batch:
        raise BatchError(
            f"rehearsal.buffer.partition_by names '{key}', which the batch has not: the Trainer drops columns that "
            "the model does not take; set remove_unused_columns=False, and name it in rehearsal.hidden"
        )
    spans = sorted(name for name in batch if str(name).startswith(("cu_seq_lens", "max_length")))
    if spans:
        raise BatchError(
            f"the batch tells by {spans} where its documents begin, which replayed rows would make wrong; leave them "
            "out (DataCollatorWithFlattening without return_flash_attn_kwargs), or pack rows of one length"
        )
    return rehearsal.augment(batch, ahead=True)
