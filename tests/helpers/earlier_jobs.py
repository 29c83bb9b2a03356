"""Small jobs with a digest of every batch, loss and count; digests of an earlier release are kept beside the tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal

__all__ = ["JOBS", "drive", "drive_all", "job"]

CLASSES, WIDTH, LENGTH, PAD = 5, 6, 12, 0

BUFFER: dict[str, Any] = {"capacity": 24}
BY_LABEL: dict[str, Any] = {**BUFFER, "partition_by": "labels"}
PADDED: dict[str, Any] = {"length": LENGTH, "values": {"tokens": PAD, "mask": 0}}

JOBS: Mapping[str, dict[str, Any]] = {
    "reservoir": {"buffer": BUFFER, "ratio": 0.3},
    "candidates": {"buffer": {**BUFFER, "policy": "random_replace"}, "representatives": 3, "candidates": 5},
    "fifo": {"buffer": {**BUFFER, "policy": "fifo", "deduplicate": True}, "ratio": 0.2, "mode": "replace"},
    "balanced": {
        "buffer": {**BY_LABEL, "policy": "balanced"},
        "ratio": 0.3,
        "mode": "replace",
        "sampling": {"weights": "balanced"},
    },
    "mixture": {
        "buffer": BY_LABEL,
        "ratio": 0.25,
        "sampling": {"weights": {"0": 3, "1": 1, "4": 1}},
        "losses_every": 2,
        "guard": {"bound": 1.01, "window": 2, "action": "raise_ratio", "factor": 1.5, "most": 0.4},
        "ratio_schedule": {"to": 0.35, "steps": 12},
    },
    "weighted": {
        "buffer": BY_LABEL,
        "ratio": 0.25,
        "strategy": {"name": "er", "partition_weights": {"0": 2, "3": 1}},
    },
    "score": {
        "buffer": {**BUFFER, "policy": "score", "score_by": "loss"},
        "ratio": 0.3,
        "sampling": {"weights": "score"},
    },
    "herding": {
        "buffer": {**BY_LABEL, "policy": "herding", "score_by": "inputs"},
        "ratio": 0.3,
    },
    "der": {"buffer": BUFFER, "representatives": 3, "strategy": {"name": "der", "alpha": 0.5}},
    "der++": {"buffer": BUFFER, "representatives": 3, "strategy": {"name": "der++", "alpha": 0.5, "beta": 0.5}},
    "x-der": {
        "buffer": BY_LABEL,
        "representatives": 3,
        "strategy": {"name": "x-der", "alpha": 0.5, "beta": 0.5, "gamma": 0.5},
    },
    "tokens": {"buffer": BUFFER, "ratio": 0.3, "ratio_in": "tokens", "padding": PADDED},
}
"""Sections by name."""

NEAREST: dict[str, Any] = {
    "buffer": BUFFER,
    "representatives": 4,
    "retrieval": {"embedding": "inputs", "metric": "inner_product"},
    "sampling": {"weights": "retrieved", "queries": 3},
}
"""A section that needs faiss."""


def job(name: str, transport: Any = None) -> Rehearsal:
    """A rehearsal with the section called `name`."""
    return Rehearsal({**(NEAREST if name == "nearest" else JOBS[name]), "seed": 7}, transport)


def drive(rehearsal: Rehearsal, first: int, steps: int, rank: int = 0) -> list[str]:
    """Run `steps` steps of two micro-batches from step `first` on.

    Returns:
        A digest of what each step gave: its batches, its losses and all counts.
    """
    return [_step(rehearsal, step, rank) for step in range(first, first + steps)]


def drive_all(names: Sequence[str]) -> dict[str, list[str]]:
    """Run 16 steps of the jobs called `names` on the ranks of torch.distributed; what this rank's steps gave."""
    results = {}
    for name in names:
        with job(name) as rehearsal:
            results[name] = drive(rehearsal, 0, 16, dist.get_rank())
    return results


def _step(rehearsal: Rehearsal, step: int, rank: int) -> str:
    digest = hashlib.sha256()
    make = _batch if rehearsal.config.padding is None else _padded_batch
    for micro in range(2):
        batch = rehearsal.augment(make(step, micro, rank))
        for name in sorted(batch):
            value = batch[name]["inner"] if isinstance(batch[name], Mapping) else batch[name]
            digest.update(_bytes(value))
        if "labels" in batch:
            outputs = batch["inputs"] @ _weights(step)
            loss = rehearsal.loss(_criterion, outputs, batch["labels"])
            digest.update(_bytes(loss.detach().reshape(1)))
    rehearsal.step()
    rehearsal.drain()  # some things are counted in the background
    counts = {name: value for name, value in rehearsal.metrics().items() if not name.endswith("_ms")}
    digest.update(json.dumps(counts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _batch(step: int, micro: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    rows = 7 + step % 3
    return {
        "inputs": torch.randint(-9, 10, (rows, WIDTH), generator=generator) / 8.0,
        "labels": torch.randint(0, min(CLASSES, 2 + step // 3), (rows,), generator=generator),
        "nested": {"inner": torch.randint(-9, 10, (rows, 3), generator=generator).bfloat16()},
        "step": step,
    }


def _padded_batch(step: int, micro: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    lengths = torch.randint(1, LENGTH + 1, (7 + step % 3, 1), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    return {"tokens": torch.randint(1, 50, mask.shape, generator=generator) * mask, "mask": mask}


def _weights(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-9, 10, (WIDTH, CLASSES), generator=generator) / 16.0


def _criterion(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss without a rounding error, so that every processor gives the same bits."""
    return (outputs.gather(1, labels[:, None]) - 1).square().mean()


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return value.contiguous().view(torch.uint8).numpy().tobytes()
    return repr(value).encode()
