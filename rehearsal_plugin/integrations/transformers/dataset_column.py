"""A column of the dataset that goes past a collator which would drop it, such as the domain of an example.

examples with "domain"  --without it-->  the trainer's collator  -->  batch
---------------- domain of each example --->  batch["domain"], hidden from the model
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.names import PARTITION
from rehearsal_plugin.errors import BatchError

__all__ = ["ColumnCollator", "carry_partition", "collator_of", "without_column"]


class ColumnCollator:
    """Collator that adds a column of integers to the batches of another.

    Args:
        collator: Makes a batch of a list of examples, and does not get the column.
        name: Of the column; examples without it are left as they are.

    Attributes:
        collator: As given.
        name: As given.
    """

    def __init__(self, collator: Callable[[Any], Any], name: str) -> None:
        self.collator, self.name = collator, name

    def __call__(self, examples: Any) -> Any:
        """The batch of a list of examples.

        Raises:
            BatchError: The column holds no integers.
        """
        if not all(isinstance(example, dict) and self.name in example for example in examples):
            return self.collator(examples)
        batch = self.collator([{key: example[key] for key in example if key != self.name} for example in examples])
        batch[self.name] = self._as_integers([example[self.name] for example in examples])
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in self.__dict__:  # copying and pickling look before __init__
            raise AttributeError(name)
        return getattr(self.collator, name)

    def _as_integers(self, values: list[Any]) -> torch.Tensor:
        try:
            column = torch.tensor(values)
        except (TypeError, ValueError):
            column = torch.empty(0)
        if column.is_floating_point() or column.ndim != 1:
            raise BatchError(
                f"rehearsal.buffer.partition_by names the dataset's column '{self.name}', which holds {values[0]!r}; "
                "a partition key is one integer an example: encode it, as with dataset.class_encode_column(...)"
            )
        return column


def carry_partition(trainer: Any, config: RehearsalConfig) -> None:
    """Have the partition key of `config` go past the collator of a trainer, where its dataset has such a column.

    Nothing is done where the model takes the column itself.

    Args:
        trainer: A `transformers.Trainer` that has made no loader yet.
        config: The section.
    """
    name = config.buffer.partition_by
    columns = getattr(trainer.train_dataset, "column_names", None)
    if name in (None, PARTITION) or (columns is not None and name not in columns):
        return
    trainer._set_signature_columns_if_needed()
    if isinstance(trainer.data_collator, ColumnCollator) or name in trainer._signature_columns:
        return
    if trainer.args.remove_unused_columns:
        trainer._signature_columns.append(name)
    elif columns is None:
        return  # the collator gets whole examples, and hands on what it likes
    trainer.data_collator = ColumnCollator(trainer.data_collator, name)


def without_column(config: RehearsalConfig, trainer: Any) -> RehearsalConfig:
    """The section, with a column that goes past the collator hidden from the model."""
    hidden, collator = config.hidden or [], trainer.data_collator
    if not isinstance(collator, ColumnCollator) or collator.name in hidden:
        return config
    return config.model_copy(update={"hidden": [*hidden, collator.name]})


def collator_of(trainer: Any) -> Any:
    """The collator that the user gave to a trainer; where that is a method of an object, as in ms-swift, the object."""
    collator = trainer.data_collator
    collator = collator.collator if isinstance(collator, ColumnCollator) else collator
    while isinstance(collator, functools.partial):
        collator = collator.func
    return collator.__self__ if inspect.ismethod(collator) else collator
