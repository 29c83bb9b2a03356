"""Knobs of a method in a study: its learning rate and the weights in its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from scripts.studies.arms import Row

__all__ = ["CHOOSE", "Choices", "Knobs", "knobs_of_row", "knobs_to_try"]

CHOOSE = "choose"
"""The size of a study that tries knobs instead of reporting results."""

Choices = Mapping[str, Sequence[float]]
"""Values to try, by name of the knob."""


@dataclass(frozen=True)
class Knobs:
    """Learning rate, and the weights in the losses of the strategies; `--size choose` tries them."""

    lr: float
    loss_weight: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0


def knobs_to_try(choices: Choices) -> Iterator[Knobs]:
    """Every combination of the values."""
    for values in itertools.product(*choices.values()):
        yield Knobs(**dict(zip(choices, values, strict=True)))


def knobs_of_row(line: Row) -> Knobs:
    """The knobs that a row of the report was trained with."""
    return Knobs(**{field.name: line[field.name] for field in fields(Knobs)})
