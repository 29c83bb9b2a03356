"""Losses of rows and tokens, apart for new and for replayed rows, and by partition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = [
    "LabelShift",
    "checked_labels",
    "counted_tokens",
    "groups",
    "losses_by_token",
    "predicts_next",
    "sums_by_row",
    "token_losses",
]

MOST = 1 << 26
"""Logits that are turned to float32 at a time, where nothing is differentiated."""

LOOKS = 8
"""Micro-batches that are asked for their shift, at most."""

IN_PLACE = ("MaskedLM", "Seq2Seq", "TokenClassifier")
"""How Hugging Face calls the outputs of models that answer each position with its own label."""


def counted_tokens(batch: FlatBatch) -> Tensor | None:
    """Which tokens count, `[rows, length]`: those with a label, else those of the mask; None without either.

    Args:
        batch: With a leaf `labels` `[rows, length]`, or `attention_mask` of that shape.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return labels != IGNORED
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None  # it may number documents


def predicts_next(outputs: Any) -> bool:
    """Whether each position of a model's logits is about the next label, as far as the type of the outputs tells."""
    return not type(outputs).__name__.startswith(IN_PLACE)


class LabelShift:
    """Whether each position predicts the label of the next one: by the model's own loss, or by the type of its outputs.

    A model of your own may take labels that are shifted already, and the type of its outputs does not tell. So in the
    first micro-batches its loss is compared with the mean over the tokens in both ways. Where one of them is the loss,
    that one holds from then on. Where neither is, as with label smoothing, the type decides.
    """

    def __init__(self) -> None:
        self._known: bool | None = None
        self._looks = LOOKS

    def __call__(self, outputs: Any, logits: Tensor, labels: Tensor) -> bool:
        """For outputs with `logits` `[rows, length, vocabulary]`, and `labels` `[rows, length]`."""
        own = outputs.get("loss")
        if self._known is None and self._looks and isinstance(own, Tensor) and own.numel() == 1 and labels.ndim == 2:
            self._looks -= 1
            self._known = _shift_of(own.item(), logits.detach(), labels)
        return predicts_next(outputs) if self._known is None else self._known


def _shift_of(own: float, logits: Tensor, labels: Tensor) -> bool | None:
    """With which shift the mean over the tokens is the model's own loss; None where that cannot be told."""
    sides = (token_losses(logits, labels, shifted=shifted) for shifted in (True, False))
    shifted, in_place = (abs(float(sums.sum() / counts.sum()) - own) for sums, counts in sides)
    nearer, other = sorted((shifted, in_place))
    return shifted == nearer if 8 * nearer < other and nearer < 5e-3 * abs(own) else None


def token_losses(logits: Tensor, labels: Tensor, *, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, as models of Hugging Face compute it: summed over its tokens, and how many count.

    Args:
        logits: `[rows, length, vocabulary]`, or `[rows, classes]`.
        labels: Integers `[rows, length]`, those of -100 do not count; or `[rows]`.
        shifted: Whether each position predicts the label of the next one, where there are positions.

    Returns:
        Sums `[rows]` float32, and numbers of tokens `[rows]` int64.

    Raises:
        BatchError: The shapes are others, or the labels are no classes.
    """
    labels = checked_labels(logits, labels, shifted=shifted)
    return sums_by_row(losses_by_token(logits, labels)), sums_by_row(labels != IGNORED)


def checked_labels(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """The label that each position of the logits predicts, with the shape of `labels`; see `token_losses`."""
    if logits.shape[:-1] != labels.shape or labels.ndim not in (1, 2) or labels.is_floating_point():
        raise BatchError(
            f"the losses of rows cannot be told from logits of shape {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape)} and {labels.dtype}; compute the loss with rehearsal.loss(criterion, outputs, "
            "*targets)"
        )
    return pad(labels[:, 1:], (0, 1), value=IGNORED) if labels.ndim == 2 and shifted else labels


def losses_by_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each position with its own label, float32 in the shape of `labels`; 0 where it is -100."""
    scores, wanted = logits.flatten(0, -2), labels.flatten().long()
    most = max(1, len(scores) if torch.is_grad_enabled() else MOST // max(1, scores.shape[1]))
    parts = zip(torch.split(scores, most), torch.split(wanted, most), strict=True)
    losses = [cross_entropy(part.float(), label, reduction="none", ignore_index=IGNORED) for part, label in parts]
    return torch.cat(losses).reshape(labels.shape)


def sums_by_row(values: Tensor) -> Tensor:
    """Sums `[rows]` over all dimensions but the first."""
    return values.unsqueeze(1).flatten(1).sum(1)


def groups(keys: IntArray | None, size: int) -> Iterator[tuple[int | None, Tensor]]:
    """The rows of each partition: its key, and their places `[n]` int64; all rows where there are no partitions."""
    if keys is None:
        yield None, torch.arange(size, device="cpu")
        return
    for key in np.unique(keys).tolist():
        yield key, torch.from_numpy(np.flatnonzero(keys == key))
