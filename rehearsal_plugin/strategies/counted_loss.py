"""The task's loss over parts of a micro-batch, in some of which nothing may count.

Rows whose labels are all -100, or whose mask is all zero, have a mean of 0 / 0. Such a part is left out, and its
gradient with it. A loss that is no number for any other reason stays and is seen: that of a model that diverged, of
logits that overflow, of targets that are missing. The criterion tells them apart, when it is asked again about other
outputs:

    labels        of the model    of other outputs
    -100  -100        NaN              NaN              nothing counts
       2     2        NaN              1.4              the model diverged
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.strategies.base import Part

__all__ = ["add_loss", "counted_loss", "mean_over_rows"]


def counted_loss(part: Part) -> Tensor | None:
    """The task's loss, a mean over the rows of a part; None where nothing of it counts."""
    loss = part.loss()
    return None if loss.isnan() and _counts_nothing(part) else loss


def mean_over_rows(parts: Iterable[tuple[Part, float]]) -> Tensor:
    """The mean loss over the rows of parts, whose losses count by a weight each.

    Parts in which nothing counts are left out; where that is so in all of them, the loss is no number.
    """
    parts = list(parts)
    counted = [(part.size, weight, loss) for part, weight in parts if (loss := counted_loss(part)) is not None]
    if not counted:
        return parts[0][0].loss()
    total = sum(weight * size * loss for size, weight, loss in counted)
    return torch.as_tensor(total / sum(size for size, *_ in counted))


def add_loss(total: Tensor | None, weight: float, part: Part) -> Tensor | None:
    """A loss, None for none yet, and `weight` times that of a part, unless nothing of it counts."""
    loss = counted_loss(part)
    if loss is None:
        return total
    return weight * loss if total is None else total + weight * loss


@torch.no_grad()
def _counts_nothing(part: Part) -> bool:
    """Whether the criterion has no number for these targets, whatever the outputs are."""
    missing: list[bool] = []
    map_leaves(tuple(part.targets), lambda _, leaf: missing.append(_holds_nan(leaf)))
    if any(missing):
        return False
    return bool(replace(part, outputs=map_leaves(part.outputs, _other_numbers)).loss().isnan())


def _holds_nan(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return bool(leaf.isnan().any())
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "fc" and bool(np.isnan(leaf).any())
    return isinstance(leaf, float) and math.isnan(leaf)


def _other_numbers(_: str, leaf: Any) -> Any:
    """Numbers between 0 and 1 in place of those of an output: a criterion of logits and of probabilities has them."""
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return torch.linspace(0.25, 0.75, leaf.numel(), dtype=leaf.dtype, device=leaf.device).reshape(leaf.shape)
