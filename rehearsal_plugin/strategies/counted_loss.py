"""The task's loss over parts of a micro-batch, in some of which nothing may count.

Rows whose labels are all -100, or whose mask is all zero, have a mean of 0 / 0. Such a part is left out, and its
gradient with it. A loss that is no number for any other reason stays and is seen: that of a model that diverged, of
logits that overflow, of targets that are missing, of a criterion that is broken. The criterion tells them apart. It is
asked again about other outputs, and then about other targets too, where they are the same throughout:

    labels        of the model    of other outputs    and of labels -100  0
    -100  -100        NaN              NaN                 1.4                  nothing counts
       2     2        NaN              1.4               not asked              the model diverged
       2     2        NaN              NaN                 NaN                  the criterion is broken
       1     2        NaN              NaN                 NaN                  the criterion is broken
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
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
    """Whether the criterion has no number for these targets, whatever the outputs, but one with others among them."""
    asked = replace(part, outputs=map_leaves(part.outputs, _other_numbers))
    if _is_missing(part.targets) or not asked.loss().isnan():
        return False
    changes = (partial(_other_targets, of_ones=of_ones) for of_ones in (False, True))
    return any(_has_number(replace(asked, targets=map_leaves(tuple(part.targets), change))) for change in changes)


def _is_missing(targets: Sequence[Any]) -> bool:
    """Whether any target is NaN somewhere."""
    found: list[bool] = []

    def look(_: str, leaf: Any) -> None:
        if isinstance(leaf, (Tensor, np.ndarray)):
            not_itself: Any = leaf != leaf
            found.append(bool(not_itself.any()))

    map_leaves(tuple(targets), look)
    return any(found)


def _has_number(part: Part) -> bool:
    """Whether the loss is a number; it is none for targets that the criterion does not take."""
    try:
        return bool(part.loss().isfinite())
    except Exception:  # whatever a criterion of somebody's own raises
        return False


def _other_numbers(_: str, leaf: Any) -> Any:
    """Numbers between 0 and 1 in place of those of an output: a criterion of logits and of probabilities has them."""
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return torch.linspace(0.25, 0.75, leaf.numel(), dtype=leaf.dtype, device=leaf.device).reshape(leaf.shape)


def _other_targets(name: str, leaf: Any, *, of_ones: bool) -> Any:
    """A target that is the same throughout, with others in every second place, of which the last is one.

    -100 -100 -100     0 -100 0
       0    0    0     1    0 1
       1    1    1     1    1 1, as in a mask of ones; 0 1 0 with `of_ones`
    """
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        return _other_targets(name, torch.from_numpy(np.array(leaf)), of_ones=of_ones).numpy()
    if not isinstance(leaf, Tensor) or not leaf.numel():
        return leaf
    values = leaf.flatten().clone()
    first = values[0].item()
    if bool((values == first).all()) and (first != 1 or of_ones):
        values[(len(values) - 1) % 2 :: 2] = 1 if first == 0 else 0
    return values.reshape(leaf.shape)
