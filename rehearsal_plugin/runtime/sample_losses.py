"""The loss of each sample of a micro-batch, from what a model gives for each token beside or instead of its own loss.

A model gives either `logits`, which are compared with the batch's `labels`, or `log_probs`, the log-probability of each
label, as fused heads do that never build the logits (`add_fused_lm_head` of TRL). Both lie one position before the
label. In a flat row of documents, a position belongs to the document of its label::

    documents   a a a b b       lengths 3, 2
    labels      . 5 7 . 9       -100 at the beginning of each
    log_probs   5 7 . 9         [1, 4]: two of a, one of b; that across the boundary does not count
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.token_losses import (
    LabelShift,
    checked_labels,
    losses_by_token,
    sums_by_row,
    token_losses,
)

__all__ = ["SampleLosses", "fused_log_probs", "sample_losses", "weighted_log_probs"]


@dataclass(frozen=True)
class SampleLosses:
    """Losses of all samples of a micro-batch, new ones first.

    Attributes:
        sums: `[samples]`, over the tokens that count; with gradients for replayed samples at most.
        counts: `[samples]` int64, how many count.
    """

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """`[samples]` float32, without gradients; 0 for a sample of which no token counts."""
        return self.sums.detach().float() / self.counts.clamp_min(1)


def fused_log_probs(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Log-probabilities of the labels and whether each counts, both `[rows, length]`; None where there are none."""
    if not isinstance(outputs, Mapping) or isinstance(outputs.get("logits"), Tensor):
        return None
    log_probs, mask = outputs.get("log_probs"), outputs.get("label_mask")
    if not isinstance(log_probs, Tensor) or not isinstance(mask, Tensor):
        return None
    return (log_probs, mask) if log_probs.ndim == 2 and log_probs.shape == mask.shape else None


def sample_losses(micro_batch: MicroBatch, outputs: Any, shift: LabelShift, *, weighted: bool) -> SampleLosses:
    """The losses of all samples.

    Args:
        micro_batch: Which.
        outputs: With `log_probs` and `label_mask`; or with `logits`, where the batch has `labels`.
        shift: Tells which label each position of the logits predicts.
        weighted: Whether those of replayed samples need gradients.

    Raises:
        BatchError: The outputs hold neither, or do not fit the micro-batch.
    """
    fused = fused_log_probs(outputs)
    if fused is not None:
        values, counted = -fused[0].detach(), fused[1]
        if micro_batch.lengths is not None:
            places = _labels_of_flat(micro_batch.lengths, values.shape)
            values, counted = (pad(one[:, : places - 1], (1, 0)) for one in (values, counted))
        elif len(values) != sum(micro_batch.sizes):
            raise BatchError(_misfit("log_probs", values, f"{sum(micro_batch.sizes)} rows"))
        return _summed(micro_batch, values, counted)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if micro_batch.labels is None or not isinstance(logits, Tensor):
        raise BatchError(
            "the losses of new and replayed rows are to be told apart (rehearsal.losses_every, "
            "rehearsal.strategy.partition_weights, rehearsal.strategy.loss_weight, rehearsal.buffer.score_by 'loss'), "
            "and the model gave no 'logits', or the batch has no 'labels'; compute the loss with "
            "rehearsal.loss(criterion, outputs, *targets)"
        )
    labels = micro_batch.labels.to(logits.device)
    shifted = shift(outputs, logits, labels)
    of_samples = _of_rows if micro_batch.lengths is None else _of_documents
    return of_samples(micro_batch, logits, labels, shifted=shifted, weighted=weighted)


def weighted_log_probs(micro_batch: MicroBatch, log_probs: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities that count by the factor of their sample.

    Args:
        micro_batch: Which.
        log_probs: `[rows, length]`.
        factors: `[replayed]`, of the replayed samples; new ones count as they are.

    Returns:
        All log-probabilities `[rows, length]`, those of new samples unchanged; and the weighted part of them.
    """
    if micro_batch.lengths is None:
        weighted = log_probs[micro_batch.new :] * factors.unsqueeze(1)
        return torch.cat((log_probs[: micro_batch.new], weighted)), weighted
    lengths = micro_batch.lengths
    first = max(0, int(lengths[: micro_batch.new].sum()) - 1)
    by_token = torch.repeat_interleave(factors, lengths[micro_batch.new :].to(factors.device))
    by_token = pad(by_token, (0, log_probs.shape[1] - first - len(by_token)), value=1.0)
    weighted = log_probs[:, first:] * by_token
    return torch.cat((log_probs[:, :first], weighted), dim=1), weighted


def _of_rows(micro_batch: MicroBatch, logits: Tensor, labels: Tensor, *, shifted: bool, weighted: bool) -> SampleLosses:
    """See `token_losses`; with gradients for replayed rows only, and where they are weighted."""
    new = micro_batch.new
    with torch.no_grad():
        of_new = token_losses(logits[:new], labels[:new], shifted=shifted)
    with torch.set_grad_enabled(weighted and torch.is_grad_enabled()):
        of_replayed = token_losses(logits[new:], labels[new:], shifted=shifted)
    return SampleLosses(torch.cat((of_new[0], of_replayed[0])), torch.cat((of_new[1], of_replayed[1])))


def _of_documents(
    micro_batch: MicroBatch, logits: Tensor, labels: Tensor, *, shifted: bool, weighted: bool
) -> SampleLosses:
    """As `_of_rows`, of a flat row."""
    assert micro_batch.lengths is not None
    labels = checked_labels(logits, labels, shifted=shifted)
    total = _labels_of_flat(micro_batch.lengths, labels.shape)
    if labels.shape[1] != total:
        raise BatchError(_misfit("logits", logits, f"a flat row of {total} tokens"))
    first = max(0, int(micro_batch.lengths[: micro_batch.new].sum()) - shifted)
    with torch.no_grad():
        of_new = losses_by_token(logits[:, :first], labels[:, :first])
    with torch.set_grad_enabled(weighted and torch.is_grad_enabled()):
        values = torch.cat((of_new, losses_by_token(logits[:, first:], labels[:, first:])), dim=1)
    counted = labels != IGNORED
    if shifted:
        values, counted = (pad(one[:, :-1], (1, 0)) for one in (values, counted))
    return _summed(micro_batch, values, counted)


def _summed(micro_batch: MicroBatch, values: Tensor, counted: Tensor) -> SampleLosses:
    """The sums over each sample of values `[rows, length]`, each at the place of its label."""
    if micro_batch.lengths is None:
        return SampleLosses(sums_by_row(values), sums_by_row(counted))
    lengths = micro_batch.lengths.to(values.device)
    sums = (torch.segment_reduce(one[0].float(), "sum", lengths=lengths, initial=0) for one in (values, counted))
    return SampleLosses(next(sums), next(sums).long())


def _labels_of_flat(lengths: Tensor, shape: torch.Size) -> int:
    """Labels of a flat row, for outputs of this shape: one for each, or one less as the first is not predicted."""
    total = int(lengths.sum())
    if shape[0] != 1 or shape[1] not in (total, total - 1):
        raise BatchError(
            f"the model gave an output of shape {tuple(shape)} for a flat row of {total} tokens, so losses cannot be "
            "told apart by document; leave tokens that the model adds out, or set rehearsal.packing to 'rows'"
        )
    return total


def _misfit(name: str, tensor: Tensor, wanted: str) -> str:
    return (
        f"the model's output '{name}' has the shape {tuple(tensor.shape)} and the micro-batch has {wanted}; give "
        "outputs for all that augment() returned"
    )
