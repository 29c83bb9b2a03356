"""The task's loss over parts of a micro-batch, in some of which nothing may count.

Rows whose labels are all -100, or whose mask is all zero, have a mean of 0 / 0. Such a part is left out, and its
gradient with it. A loss that is no number for any other reason stays and is seen: that of a model that diverged, of
logits that overflow, of targets that are missing. The criterion tells them apart, when it is asked again about other
outputs:

    labels        of the model    of other outputs
    -100  -100        NaN              NaN              nothing counts
       2     2        NaN              1.4              the model diverged
       1     2        NaN                               not asked: labels that differ count
"""

from __future__ import annotations

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
    """Whether a target is the same throughout, and the criterion has no number for it, whatever the outputs are."""
    targets: list[Tensor] = []

    def collect(_: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.ndim:
            targets.append(leaf)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            targets.append(torch.from_numpy(np.array(leaf)))

    map_leaves(tuple(part.targets), collect)
    constant = any(bool((one == one.flatten()[:1]).all()) for one in targets)
    if not constant or any(bool(one.isnan().any()) for one in targets):
        return False
    return bool(replace(part, outputs=map_leaves(part.outputs, _other_numbers)).loss().isnan())


def _other_numbers(_: str, leaf: Any) -> Any:
    """Numbers between 0 and 1 in place of those of an output: a criterion of logits and of probabilities has them."""
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return torch.linspace(0.25, 0.75, leaf.numel(), dtype=leaf.dtype, device=leaf.device).reshape(leaf.shape)
