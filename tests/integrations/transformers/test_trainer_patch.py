"""The patched class: trainers with a listener call it, all others run the original methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")

from rehearsal_plugin.integrations.transformers.trainer_patch import patch_constructor, patch_methods


class Listener:
    """Notes its calls; doubles the batches, and negates those of an evaluation."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin_training(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        self.calls.append(("begin_training", resume_from_checkpoint))

    def augment_batches(self, trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
        return (2 * batch for batch in batches)

    def note_scale(self, trainer: Any, batches: list[Any], items: Any) -> None:
        self.calls.append(("note_scale", batches, items))

    def before_save(self, trainer: Any, trial: Any) -> None:
        self.calls.append(("before_save", trial))

    def visible_batches(self, trainer: Any, loader: Any) -> Any:
        return [-batch for batch in loader]


@pytest.fixture
def trainer_class() -> Any:
    class Trainer:
        """As `transformers.Trainer`, as far as it is patched; gives back its arguments."""

        def __init__(self, listener: Listener | None = None) -> None:
            self.listener = listener

        def train(self, resume_from_checkpoint: Any = None, trial: Any = None) -> Any:
            return resume_from_checkpoint, trial

        def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any = None) -> Any:
            return [next(epoch_iterator) for _ in range(num_batches)], 7

        def evaluation_loop(self, dataloader: Any, description: str) -> Any:
            return list(dataloader), description

        def _save_checkpoint(self, model: Any, trial: Any) -> Any:
            return model, trial

    patch_methods(Trainer, find_listener)
    return Trainer


def find_listener(trainer: Any) -> Listener | None:
    listener: Listener | None = trainer.listener
    return listener


CALLS: list[Callable[[Any], Any]] = [
    lambda trainer: trainer.train(False, trial=3),
    lambda trainer: trainer.get_batch_samples(iter([1, 2, 3]), 2, device="cpu"),
    lambda trainer: trainer.evaluation_loop(dataloader=[1, 2], description="eval"),
    lambda trainer: trainer._save_checkpoint("model", trial=None),
]


@pytest.mark.parametrize(
    ("call", "result"),
    list(zip(CALLS, [(False, 3), ([1, 2], 7), ([1, 2], "eval"), ("model", None)], strict=True)),
    ids=["train", "get_batch_samples", "evaluation_loop", "_save_checkpoint"],
)
def test_a_trainer_without_a_listener_runs_the_original_with_the_same_arguments(
    trainer_class: Any, call: Callable[[Any], Any], result: Any
) -> None:
    assert call(trainer_class()) == result


def test_a_listener_is_called_and_changes_the_batches(trainer_class: Any) -> None:
    trainer = trainer_class(Listener())
    results = [call(trainer) for call in CALLS]
    assert results == [(False, 3), ([2, 4], 7), ([-1, -2], "eval"), ("model", None)]
    assert trainer.listener.calls == [("begin_training", False), ("note_scale", [2, 4], 7), ("before_save", None)]


def test_a_second_patch_changes_nothing(trainer_class: Any) -> None:
    methods = dict(vars(trainer_class))
    patch_methods(trainer_class, lambda trainer: None)
    assert dict(vars(trainer_class)) == methods


def test_a_patched_constructor_hands_over_the_finished_trainer(trainer_class: Any) -> None:
    made = []
    patch_constructor(trainer_class, lambda trainer: made.append(trainer.listener))
    listener = Listener()
    trainer_class(listener)
    assert made == [listener]
