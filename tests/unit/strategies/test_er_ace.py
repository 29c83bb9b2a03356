"""ER-ACE: new rows compete with the classes of their batch only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError
from tests.helpers.strategy_parts import (
    entropies,
    labels,
    leaf,
    near,
    part,
    scores,
    strategy,
)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_er_ace_masks_absent_classes_for_new_rows_only(weight: float) -> None:
    outputs, targets = leaf(scores(0, 4)), torch.tensor([2, 5, 2, 5])
    old, classes = leaf(scores(2, 3)), torch.tensor([0, 1, 2])
    loss = strategy("er-ace", loss_weight=weight).loss(part(outputs, targets), [part(old, classes)])
    among = entropies(outputs[:, [2, 5]], torch.tensor([0, 1, 0, 1]))
    assert near(loss, sum(among) / 4 + weight * sum(entropies(old, classes)) / 3)
    fresh, replayed = torch.autograd.grad(loss, (outputs, old))
    absent = [0, 1, 3, 4, 6]
    assert not fresh[:, absent].any(), "new rows push classes that are not in the batch"
    assert fresh[:, [2, 5]].all()
    assert replayed.all(), "replayed rows compete among all classes"


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (scores(0), []),
        (scores(0), [scores(1)]),
        ((scores(0), scores(1)), [labels(0)]),
        (scores(0)[:, None], [labels(0)]),
    ],
)
def test_er_ace_refuses_what_is_no_classification(outputs: Any, targets: list[Tensor]) -> None:
    with pytest.raises(BatchError, match=r"er-ace.*scores \[rows, classes\]"):
        strategy("er-ace").loss(part(outputs, *targets), [part(scores(0), labels(0))])


def test_er_ace_leaves_out_the_labels_that_the_loss_ignores() -> None:
    outputs, targets = leaf(scores(0, 5)), torch.tensor([2, -100, 5, -100, 2])
    old, classes = leaf(scores(2, 3)), torch.tensor([0, -100, 2])
    loss = strategy("er-ace").loss(part(outputs, targets), [part(old, classes)])
    counted, replayed = [0, 2, 4], [0, 2]
    among = entropies(outputs[counted][:, [2, 5]], torch.tensor([0, 1, 0]))
    assert near(loss, sum(among) / 3 + sum(entropies(old[replayed], classes[replayed])) / 2)
    fresh = torch.autograd.grad(loss, outputs)[0]
    assert not fresh[[1, 3]].any()
    assert not fresh[:, [0, 1, 3, 4, 6]].any(), "an ignored label counts as a class of the batch"
