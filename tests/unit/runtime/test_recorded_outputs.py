"""Outputs by position of rows that differ in length are refused at the first batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError

CLASSES = 7


def batch(width: int, shortest: int) -> dict[str, Tensor]:
    """Three texts, of which the first is the longest."""
    inside = torch.arange(width) < torch.tensor([width, shortest, shortest]).unsqueeze(1)
    labels = torch.where(inside, 5, -100)
    return {"input_ids": inside.long() * 5, "attention_mask": inside.long(), "labels": labels}


def step(rehearsal: Rehearsal, fields: dict[str, Tensor]) -> None:
    rows, width = rehearsal.augment(fields)["input_ids"].shape
    scores = torch.randn(rows, width, CLASSES, requires_grad=True)
    rehearsal.loss(lambda outputs: outputs.sum(), scores)
    rehearsal.step()


def job(name: str = "der") -> Rehearsal:
    section: dict[str, Any] = {"strategy": {"name": name, "k": 3}, "representatives": 1, "padding": {}}
    return Rehearsal(section, LocalTransport())


@pytest.mark.parametrize("name", ["der", "der++", "topk"])
def test_outputs_by_position_of_rows_that_differ_in_length_are_refused_at_once(name: str) -> None:
    with job(name) as rehearsal, pytest.raises(BatchError, match=r"stores the model.* positions of rows that differ"):
        step(rehearsal, batch(6, 4))


def test_rows_of_one_length_are_taken() -> None:
    with job() as rehearsal:
        for _ in range(5):
            step(rehearsal, batch(6, 6))
        assert rehearsal.metrics()["rows_replayed"] > 1


def test_rows_that_are_padded_to_one_width_are_taken() -> None:
    pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    fields = {name: torch.nn.functional.pad(leaf, (0, 3), value=pads[name]) for name, leaf in batch(6, 4).items()}
    with job() as rehearsal:
        for _ in range(5):
            step(rehearsal, fields)
        assert rehearsal.metrics()["rows_replayed"] > 1


def test_outputs_without_positions_are_taken() -> None:
    with job() as rehearsal:
        for _ in range(5):
            augmented = rehearsal.augment(batch(CLASSES, 4))
            rehearsal.loss(lambda outputs: outputs.sum(), torch.randn(len(augmented["input_ids"]), CLASSES))
            rehearsal.step()
        assert rehearsal.metrics()["rows_replayed"] > 1
