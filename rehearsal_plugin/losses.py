"""Losses of rows and tokens, apart for new and for replayed rows, and by partition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.shares import IntArray

__all__ = ["IGNORED", "LossMeter", "groups", "token_counts", "token_losses"]

IGNORED = -100
"""The label of a token that does not count, as in torch and in models of Hugging Face."""

MOST = 1 << 26
"""Logits that are turned to float32 at a time, where nothing is differentiated."""


def token_counts(batch: Any) -> Tensor | None:
    """Tokens of each row that count, `[rows]` int64: those with a label, else those of the mask; None without either.

    Args:
        batch: A mapping with `labels` `[rows, length]`, or with an `attention_mask` of that shape.
    """
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return (labels != IGNORED).sum(1)
    return mask.sum(1) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, as models of Hugging Face compute it: summed over its tokens, and how many count.

    Args:
        logits: `[rows, length, vocabulary]`, of which each position predicts the next label; or `[rows, classes]`.
        labels: `[rows, length]` int64, those of -100 do not count; or `[rows]`.

    Returns:
        Sums `[rows]` float32, and numbers of tokens `[rows]` int64.

    Raises:
        BatchError: The shapes are others.
    """
    if logits.ndim == 3 and logits.shape[:2] == labels.shape:
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif not (logits.ndim == 2 and logits.shape[:1] == labels.shape):
        raise BatchError(
            f"the losses of rows cannot be told from logits of shape {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape)}; compute the loss with rehearsal.loss(criterion, outputs, *targets)"
        )
    many = torch.is_grad_enabled() or not len(logits)
    rows = max(1, len(logits) if many else MOST // max(1, logits[0].numel()))
    sums = [_summed(*part) for part in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)]
    return torch.cat(sums), _by_row(labels != IGNORED)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    flat = cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return _by_row(flat.reshape(labels.shape))


def _by_row(values: Tensor) -> Tensor:
    """Sums over all dimensions but the first."""
    return values.unsqueeze(1).flatten(1).sum(1)


def groups(keys: IntArray | None, size: int) -> Iterator[tuple[int | None, Tensor]]:
    """The rows of each partition: its key, and their places `[n]` int64; all rows where there are no partitions."""
    if keys is None:
        yield None, torch.arange(size)
        return
    for key in np.unique(keys).tolist():
        yield key, torch.from_numpy(np.flatnonzero(keys == key))


class LossMeter:
    """Weighted means by name, from one call of `close` to the next."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, kind: str, key: int | None, total: float, weight: float) -> None:
        """Add a sum of losses to `loss_<kind>`, and to that of the partition."""
        for name in (f"loss_{kind}", *([] if key is None else [f"loss_{kind}/{key}"])):
            sums, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = sums + total, weights + weight

    def total(self, kind: str, keys: list[int] | None = None) -> tuple[float, float]:
        """Sum and weight so far of a kind, or of some of its partitions."""
        names = [f"loss_{kind}"] if keys is None else [f"loss_{kind}/{key}" for key in keys]
        found = [self._sums.get(name, (0.0, 0.0)) for name in names]
        return sum(total for total, _ in found), sum(weight for _, weight in found)

    def close(self) -> dict[str, float]:
        """The means by name; then it begins anew."""
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums.clear()
        return means
