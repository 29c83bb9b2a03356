"""A criterion that sums over rows is refused where the loss is made of parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError


def loss_of(criterion: Callable[..., Tensor], weight: float) -> float:
    """The loss of the last of some steps."""
    torch.manual_seed(0)
    section = {"buffer": {"capacity": 50}, "representatives": 2, "strategy": {"name": "er", "loss_weight": weight}}
    model = torch.nn.Linear(3, 5)
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(6):
            batch = rehearsal.augment({"x": torch.randn(4, 3), "y": torch.randint(5, (4,))})
            loss = rehearsal.loss(criterion, model(batch["x"]), batch["y"])
            torch.autograd.backward(loss)
            rehearsal.step()
    return loss.item()


def test_a_sum_is_refused_by_name_where_replayed_rows_are_weighted() -> None:
    summed = partial(cross_entropy, reduction="sum")
    assert loss_of(summed, 1.0) == pytest.approx(6 * loss_of(cross_entropy, 1.0))
    with pytest.raises(BatchError, match=r"the loss of all 6 rows, .* the criterion sums over rows.*takes the mean"):
        loss_of(summed, 0.5)


def test_a_sum_of_negative_losses_is_refused() -> None:
    def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.softmax(1).gather(1, targets[:, None]).sum()

    with pytest.raises(BatchError, match="the criterion sums over rows"):
        loss_of(similarity, 0.5)


def test_a_mean_is_not() -> None:
    assert loss_of(cross_entropy, 0.999) == pytest.approx(loss_of(cross_entropy, 1.0), rel=1e-2)
