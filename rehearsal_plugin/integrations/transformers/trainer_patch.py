"""Methods of `Trainer` that are replaced, so that a callback learns of more than the events of `TrainerCallback`.

| method of `Trainer` | what the callback does there |
|---|---|
| `train` | learns which trainer it serves, and the checkpoint to resume from |
| `get_batch_samples` | adds replayed rows to the micro-batches of a step, before their tokens are counted |
| `evaluation_loop` | leaves the hidden fields out of the batches |
| `_save_checkpoint` | waits for files that are written in the background |

The class itself is patched, once in a process and for good. A trainer without such a callback runs the original methods
with the arguments that it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rehearsal_plugin.integrations.deepspeed.engine import left_alone

__all__ = ["TrainerListener", "patch_constructor", "patch_methods"]


class TrainerListener(Protocol):
    """Callback of a trainer that the patched methods call."""

    def begin_training(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        """Called when `Trainer.train` begins, with its argument."""

    def augment_batches(self, trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches of a step with replayed rows, as the trainer reads them."""

    def note_scale(self, trainer: Any, batches: list[Any], items: Any) -> None:
        """Called with the micro-batches of a step and the number of their tokens, None where none are counted."""

    def before_save(self, trainer: Any, trial: Any) -> None:
        """Called before a checkpoint is written, which may remove an older one."""

    def visible_batches(self, trainer: Any, loader: Any) -> Any:
        """The loader of an evaluation, without hidden fields."""


FindListener = Callable[[Any], TrainerListener | None]
"""The listener among the callbacks of a trainer; None if it has none."""


def patch_methods(trainer_class: Any, find_listener: FindListener) -> None:
    """Replace the methods of `Trainer` in the table above; a second call does nothing.

    Args:
        trainer_class: `transformers.Trainer`; its subclasses inherit the new methods.
        find_listener: Asked at every call, so callbacks may be added and removed at any time.
    """
    if hasattr(trainer_class.get_batch_samples, "rehearsal_original"):
        return
    for name, replace in REPLACEMENTS.items():
        original = getattr(trainer_class, name)
        replacement = functools.wraps(original)(replace(original, find_listener))
        replacement.rehearsal_original = original  # type: ignore[attr-defined]
        setattr(trainer_class, name, replacement)


def patch_constructor(trainer_class: Any, after: Callable[[Any], None]) -> None:
    """Have every new trainer given to `after`, with its own callbacks in place."""
    original = trainer_class.__init__

    @functools.wraps(original)
    def constructor(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        after(trainer)

    trainer_class.__init__ = constructor


def _train(original: Callable[..., Any], find_listener: FindListener) -> Callable[..., Any]:
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        listener = find_listener(trainer)
        if listener is None:
            return original(trainer, resume_from_checkpoint, *args, **kwargs)
        listener.begin_training(trainer, resume_from_checkpoint)
        with left_alone():
            return original(trainer, resume_from_checkpoint, *args, **kwargs)

    return train


def _get_batch_samples(original: Callable[..., Any], find_listener: FindListener) -> Callable[..., Any]:
    def get_batch_samples(trainer: Any, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        listener = find_listener(trainer)
        if listener is None:
            return original(trainer, epoch_iterator, *args, **kwargs)
        batches, items = original(trainer, listener.augment_batches(trainer, epoch_iterator), *args, **kwargs)
        listener.note_scale(trainer, batches, items)
        return batches, items

    return get_batch_samples


def _evaluation_loop(original: Callable[..., Any], find_listener: FindListener) -> Callable[..., Any]:
    def evaluation_loop(trainer: Any, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        listener = find_listener(trainer)
        if listener is None:
            return original(trainer, dataloader, *args, **kwargs)
        with left_alone():
            return original(trainer, listener.visible_batches(trainer, dataloader), *args, **kwargs)

    return evaluation_loop


def _save_checkpoint(original: Callable[..., Any], find_listener: FindListener) -> Callable[..., Any]:
    def save_checkpoint(trainer: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        listener = find_listener(trainer)
        if listener is not None:
            listener.before_save(trainer, trial)
        return original(trainer, model, trial, *args, **kwargs)

    return save_checkpoint


REPLACEMENTS: dict[str, Callable[[Callable[..., Any], FindListener], Callable[..., Any]]] = {
    "train": _train,
    "get_batch_samples": _get_batch_samples,
    "evaluation_loop": _evaluation_loop,
    "_save_checkpoint": _save_checkpoint,
}
