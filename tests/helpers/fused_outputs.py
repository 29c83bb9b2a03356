"""Batches of language data as padded rows or flat rows of documents, and outputs of a model with a fused head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

IGNORED = -100
LENGTHS = (3, 5, 2, 4)
WORDS = 11

Batch = dict[str, Any]


@dataclass
class FusedOutput(ModelOutput):
    """As TRL's `FusedCausalLMOutput`."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """As `CausalLMOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


def rows(step: int) -> Batch:
    """Four rows of five tokens; the domain of each row alternates."""
    torch.manual_seed(step)
    labels = torch.randint(WORDS, (4, 5))
    labels[1, 3:], labels[2, :] = IGNORED, IGNORED
    return {"labels": labels, "noise": torch.randn(4, 5, WORDS), "domain": torch.arange(4) % 2 + step % 2}


def documents(step: int) -> Batch:
    """A flat row of four documents, of which one is a single labelled token long."""
    torch.manual_seed(step)
    total = sum(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    labels = torch.randint(WORDS, (1, total)).masked_fill(positions == 0, IGNORED)
    return {
        "input_ids": torch.randint(WORDS, (1, total)),
        "labels": labels,
        "position_ids": positions[None],
        "noise": torch.randn(1, total, WORDS),
        "domain": torch.arange(4) % 2 + step % 2,
    }


def samples(batch: Batch, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits `[length, words]` and labels `[length]` of each sample."""
    if "position_ids" not in batch:
        return list(zip(logits, batch["labels"], strict=True))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    spans = zip(starts, [*starts[1:], None], strict=True)
    return [(logits[0, start:end], batch["labels"][0, start:end]) for start, end in spans]


def losses_by_hand(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy over each sample alone, `[samples]`, and its tokens."""
    sums, counts = [], []
    for scores, labels in samples(batch, logits):
        picked = [(at, int(label)) for at, label in enumerate(labels[1:].tolist()) if label != IGNORED]
        log_probs = scores.log_softmax(-1)
        sums.append(-sum((log_probs[at, label] for at, label in picked), torch.zeros(())))
        counts.append(len(picked))
    return torch.stack(sums), torch.tensor(counts)


def fused(batch: Batch, logits: Tensor) -> FusedOutput:
    """What TRL's fused head gives: `[rows, length - 1]`, 0 where the label is -100."""
    mask = batch["labels"][:, 1:] != IGNORED
    log_probs = logits[:, :-1].log_softmax(-1)
    at_label = log_probs.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return FusedOutput(loss=-at_label.sum() / mask.sum(), log_probs=at_label, entropy=entropy.detach(), label_mask=mask)


def with_logits(batch: Batch, logits: Tensor) -> LogitsOutput:
    """What a causal model of Hugging Face gives."""
    sums, counts = losses_by_hand(batch, logits)
    return LogitsOutput(loss=sums.sum() / counts.sum(), logits=logits)


def trained_loss(outputs: Any) -> Tensor:
    """The loss that the trainer makes of the outputs."""
    if isinstance(outputs, FusedOutput):
        assert outputs.log_probs is not None
        assert outputs.label_mask is not None
        return -outputs.log_probs.sum() / outputs.label_mask.sum()
    loss: Tensor = outputs.loss
    return loss
