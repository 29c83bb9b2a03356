"""Refuses a criterion that sums over rows: a mean over new and replayed rows cannot be made of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies.base import Criterion, Part

__all__ = ["refuse_sum"]


def refuse_sum(criterion: Criterion, outputs: Any, targets: Sequence[Any], parts: Sequence[Part]) -> None:
    """Compare the loss of all rows with those of the parts.

    For 6 rows of loss 2, of which 2 are replayed::

        a mean    2 and 2, all rows 2
        a sum     8 and 4, all rows 12, as much as the parts together

    Raises:
        BatchError: The criterion sums over rows.
    """
    with torch.no_grad():
        whole, losses = float(criterion(outputs, *targets)), [float(part.loss()) for part in parts]
    if math.isclose(whole, sum(losses), rel_tol=1e-3) and abs(whole) > 1.1 * max(map(abs, losses)):
        raise BatchError(
            f"the loss of all {sum(part.size for part in parts)} rows, {whole:.4g}, is the sum of those of new and of "
            "replayed rows, so the criterion sums over rows; give rehearsal.loss one that takes the mean, such as "
            "reduction='mean'"
        )
