"""Refuses a criterion that sums over rows: a mean over new and replayed rows cannot be made of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies.base import Criterion, Part

__all__ = ["SumCheck"]

LOOKS = 8
"""Micro-batches that are looked at, at most."""

NEAR = 0.01
"""Part of the largest loss within which two losses are one, however they were rounded."""


class SumCheck:
    """Compares the loss of all rows with those of the parts, until they tell a mean from a sum.

    A mean lies between those of the parts. For 6 rows of loss 2, of which 2 are replayed::

        a mean    2 and 2, all rows 2
        a sum     8 and 4, all rows 12, as much as the parts together

    Where the parts are 8 and 0, or no numbers, the next micro-batch is looked at.
    """

    def __init__(self) -> None:
        self._looks = LOOKS

    def __call__(self, criterion: Criterion, outputs: Any, targets: Sequence[Any], parts: Sequence[Part]) -> None:
        """Look at a micro-batch.

        Raises:
            BatchError: The criterion sums over rows.
        """
        if not self._looks:
            return
        self._looks -= 1
        with torch.no_grad():
            whole, losses = float(criterion(outputs, *targets)), [float(part.loss()) for part in parts]
        if not all(map(math.isfinite, (whole, *losses))):
            return
        margin = NEAR * max(map(abs, losses))
        if abs(whole - sum(losses)) > margin:
            self._looks = 0
        elif not min(losses) - margin <= whole <= max(losses) + margin:
            raise BatchError(
                f"the loss of all {sum(part.size for part in parts)} rows, {whole:.4g}, is the sum of those of new and "
                "of replayed rows, so the criterion sums over rows; give rehearsal.loss one that takes the mean, such "
                "as reduction='mean'"
            )
