"""Which rows of a micro-batch are offered to the buffer: all, some drawn at random, or those with finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.errors import BatchError

__all__ = ["CandidateSelection", "finite_rows"]

MICRO_BATCH_BITS = 20
"""Of the address of random numbers: a step has fewer micro-batches than 2^20."""


class CandidateSelection:
    """Chooses candidates by `rehearsal.candidates` and `rehearsal.non_finite`.

    Args:
        config: The `rehearsal` section.
        rank: This rank; keys the random numbers.
    """

    def __init__(self, config: RehearsalConfig, rank: int) -> None:
        self._most, self._non_finite, self._rank = config.candidates, config.non_finite, rank
        self._numbers = RandomStream(config.seed, Purpose.CANDIDATES)

    def choose(self, columns: list[Tensor], fields: Sequence[Field], step: int, micro_batch: int) -> Tensor | None:
        """The places of the candidates, `[n]` int64 in host memory; None for all rows.

        Args:
            columns: The rows by field, `[rows, *shape]` each.
            fields: Their fields.
            step: Number of the next exchange.
            micro_batch: Which of the step.

        Raises:
            BatchError: A candidate holds NaN or infinity, and `non_finite` is `refuse`.
        """
        size, places = columns[0].shape[0], None
        if self._most is not None and self._most < size:
            rng = self._numbers.at((step << MICRO_BATCH_BITS) + micro_batch, self._rank)
            places = torch.from_numpy(np.sort(rng.choice(size, self._most, replace=False)))
        if self._non_finite == "keep":
            return places
        return self._with_finite_numbers(columns, fields, places, step)

    def _with_finite_numbers(
        self, columns: list[Tensor], fields: Sequence[Field], places: Tensor | None, step: int
    ) -> Tensor:
        chosen = torch.arange(len(columns[0]), device="cpu") if places is None else places
        finite = torch.stack([finite_rows(column) for column in columns]).cpu()[:, chosen]  # by field
        if self._non_finite == "refuse" and not finite.all():
            bad = [field.name for field, sound in zip(fields, finite, strict=True) if not sound.all()]
            raise BatchError(
                f"{int((~finite.all(0)).sum())} of {len(chosen)} candidates on rank {self._rank} at step {step} "
                f"hold NaN or infinity in {bad}; mend the data, or set rehearsal.non_finite to 'skip' or 'keep'"
            )
        return chosen[finite.all(0)]


def finite_rows(column: Tensor) -> Tensor:
    """Which rows of a column `[n, ...]` hold finite numbers only, `[n]` bool."""
    if not column.numel():
        return torch.ones(len(column), dtype=torch.bool, device=column.device)
    if column.dtype.is_floating_point and column.dtype.itemsize == 1:
        column = column.float()  # torch has no `isfinite` of most of these dtypes
    return torch.isfinite(column).reshape(len(column), -1).all(1)
