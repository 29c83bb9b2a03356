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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rehearsal_plugin.config import ConfigSource, RehearsalConfig, find_block
from rehearsal_plugin.errors import BatchError, ConfigError, MissingDependencyError
from rehearsal_plugin.integrations.deepspeed import left_alone
from rehearsal_plugin.integrations.forward import finish, needs_outputs
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.transport import LocalTransport, TorchDistributedTransport, Transport

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise MissingDependencyError(
        "transformers is not installed; pip install 'rehearsal_plugin[transformers]'"
    ) from error

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

    Attributes:
        rehearsal: The running `Rehearsal`; None until training begins, or if there is none.
    """

    def __init__(self, config: ConfigSource | None = None) -> None:
        self._config = None if config is None else RehearsalConfig.load(config)
        self.rehearsal: Rehearsal | None = None
        self._section: RehearsalConfig | None = None
        self._resumed_from: str | None = None
        self._hooks: list[Any] = []
        self._scale = 1.0
        _wrap_trainer()

    def begin(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        """Called when `Trainer.train` begins, with what it was given."""
        section = self._config or _section_of(trainer)
        self._section = section if section is not None and section.enabled else None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self._resumed_from = resume_from_checkpoint or None
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)  # what it adds to the log is there when others report it

    def read(self, trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches of a step with replayed rows, as the trainer reads them."""
        rehearsal = self._started(trainer)
        if rehearsal is None or rehearsal.closed:
            return batches
        return (self._augmented(trainer, rehearsal, batch) for batch in batches)

    def counted(self, trainer: Any, batches: list[Any], items: Any) -> None:
        """Note by how much the trainer will scale the loss of each of `batches`, `items` tokens together."""
        # A loss that is divided by the tokens of the step is not divided by its micro-batches any more, and one that
        # is divided by the tokens of all ranks is multiplied by the number of ranks.
        self._scale = 1.0
        if items is not None:
            ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
            self._scale = 1.0 / (max(1, len(batches)) * ranks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self._section is None or (self.rehearsal is not None and self.rehearsal.closed):
            return
        if self.rehearsal is None:
            raise ConfigError(
                "the trainer made a step without reading a batch through Trainer.get_batch_samples; a subclass that "
                "overrides it must call super().get_batch_samples(...)"
            )
        self.rehearsal.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.rehearsal is None or logs is None or "loss" not in logs:
            return
        metrics = self.rehearsal.metrics()
        shown = {
            f"rehearsal/{name}": value
            for name, value in metrics.items()
            if name in SHOWN or name.startswith(SHOWN_BY_PREFIX)
        }
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self._saves and self.rehearsal is not None and not args.save_only_model:
            self.rehearsal.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.drain()

    def close(self) -> None:
        """Stop the background and give up the process group; training goes on without replay."""
        if self.rehearsal is not None:
            self.rehearsal.close()

    @property
    def _saves(self) -> bool:
        rehearsal = self.rehearsal
        return rehearsal is not None and not rehearsal.closed and rehearsal.config.checkpoint.enabled

    def _started(self, trainer: Any) -> Rehearsal | None:
        """The rehearsal, made for the first step of a job, and followed up with the checkpoint that it resumes from."""
        if self._section is None:
            return None
        if self.rehearsal is None:
            self.rehearsal = Rehearsal(self._section, _transport(trainer, self._section))
        if not self._hooks:
            self._hooks = _hooks(self.rehearsal, trainer.model, lambda: self._scale)
        resumed, self._resumed_from = self._resumed_from, None
        if resumed is not None and self._saves and not self.rehearsal.load(resumed, missing_ok=True):
            LOG.warning("%s has no rehearsal checkpoint; the buffer stays as it is", resumed)
        return self.rehearsal

    def _augmented(self, trainer: Any, rehearsal: Rehearsal, batch: Any) -> Any:
        key = rehearsal.config.buffer.partition_by
        if key is not None and trainer.args.remove_unused_columns and key not in batch:
            raise BatchError(
                f"rehearsal.buffer.partition_by names '{key}', which the batch has not: the Trainer drops columns that "
                "the model does not take; set remove_unused_columns=False, and name it in rehearsal.hidden"
            )
        return rehearsal.augment(batch, ahead=True)


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
        section = _section_of(trainer) or fallback
        if section is not None and _callback_of(trainer) is None:
            trainer.add_callback(RehearsalCallback(section))

    trainers.__init__ = made


def _wrap_trainer() -> None:
    """Have trainers with a callback tell it what they read; all others are as they were."""
    trainers: Any = Trainer
    if hasattr(trainers.get_batch_samples, "rehearsal_original"):
        return
    get_batch_samples, train = trainers.get_batch_samples, trainers.train

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

    reading.rehearsal_original = get_batch_samples  # type: ignore[attr-defined]
    trainers.get_batch_samples, trainers.train = reading, training


def _callback_of(trainer: Any) -> RehearsalCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((one for one in callbacks if isinstance(one, RehearsalCallback)), None)


def _section_of(trainer: Any) -> RehearsalConfig | None:
    """The section in the DeepSpeed config of a trainer."""
    given = getattr(trainer.args, "hf_deepspeed_config", None)
    block = None if given is None else find_block(given.config)
    return None if block is None else RehearsalConfig.load(block)


def _transport(trainer: Any, config: RehearsalConfig) -> Transport:
    """The ranks that train on different data."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return LocalTransport()
    group = getattr(trainer.model_wrapped, "data_parallel_group", None) if trainer.is_deepspeed_enabled else None
    peers = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if group is None and peers > 1:
        raise ConfigError(
            f"{peers} ranks of this trainer see the same data, and which is known only under DeepSpeed; use DeepSpeed, "
            "or data parallelism alone"
        )
    return TorchDistributedTransport(group, backend=config.exchange.backend, timeout_s=config.exchange.timeout_s)


def _hooks(rehearsal: Rehearsal, model: nn.Module, scale: Callable[[], float]) -> list[Any]:
    """What has to be done at the model itself: strategies that see its outputs, fields that it must not see."""
    hooks = []
    if needs_outputs(rehearsal):

        def answered(module: nn.Module, _: Any, outputs: Any) -> Any:
            live = module.training and torch.is_grad_enabled() and not rehearsal.closed
            return finish(rehearsal, outputs, scale()) if live else outputs

        hooks.append(model.register_forward_hook(answered))
    if rehearsal.config.hidden:

        def hidden(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, rehearsal.visible(kwargs)

        hooks.append(model.register_forward_pre_hook(hidden, with_kwargs=True, prepend=True))
    return hooks
