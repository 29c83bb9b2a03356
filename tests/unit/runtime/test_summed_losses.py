"""A criterion that sums over rows is refused where the loss is made of parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.summed_losses import SumCheck
from rehearsal_plugin.strategies import Part

SUMMED = partial(cross_entropy, reduction="sum")


def loss_of(criterion: Callable[..., Tensor], weight: float, new: int = 4, **section: Any) -> float:
    """The loss of the last of some steps."""
    torch.manual_seed(0)
    strategy = {"name": "er", "loss_weight": weight}
    section = {"buffer": {"capacity": 50}, "representatives": 2, "strategy": strategy, **section}
    model = torch.nn.Linear(3, 5)
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(6):
            batch = rehearsal.augment({"x": torch.randn(new, 3), "y": torch.randint(5, (new,))})
            loss = rehearsal.loss(criterion, model(batch["x"]), batch["y"])
            torch.autograd.backward(loss)
            rehearsal.step()
    return loss.item()


def test_a_sum_is_refused_by_name_where_replayed_rows_are_weighted() -> None:
    assert loss_of(SUMMED, 1.0) == pytest.approx(6 * loss_of(cross_entropy, 1.0))
    with pytest.raises(BatchError, match=r"the loss of all 6 rows, .* the criterion sums over rows.*takes the mean"):
        loss_of(SUMMED, 0.5)


def test_a_sum_of_negative_losses_is_refused() -> None:
    def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.softmax(1).gather(1, targets[:, None]).sum()

    with pytest.raises(BatchError, match="the criterion sums over rows"):
        loss_of(similarity, 0.5)


def test_a_few_replayed_rows_are_enough() -> None:
    with pytest.raises(BatchError, match="the criterion sums over rows"):
        loss_of(SUMMED, 0.5, new=20, representatives=1)


def test_a_sum_is_refused_where_losses_are_told_apart() -> None:
    with pytest.raises(BatchError, match="the criterion sums over rows"):
        loss_of(SUMMED, 1.0, losses_every=1)


def looked_at(*micro_batches: tuple[list[float], list[float]], criterion: Callable[..., Tensor] = torch.sum) -> None:
    """The losses of new and of replayed rows, micro-batch by micro-batch."""
    check = SumCheck()
    for of_parts in micro_batches:
        new, old = (torch.tensor(losses) for losses in of_parts)
        parts = [Part(losses, (), {}, len(losses), criterion) for losses in (new, old)]
        check(criterion, torch.cat((new, old)), (), parts)


@pytest.mark.parametrize(
    "first", [([2.0, 2.0], [0.0]), ([float("nan"), 2.0], [1.0]), ([2.0, 2.0], [-1.0]), ([float("inf")], [1.0])]
)
def test_where_one_look_does_not_tell_another_one_does(first: tuple[list[float], list[float]]) -> None:
    looked_at(first)
    with pytest.raises(BatchError, match="loss of all 3 rows, 5"):
        looked_at(first, ([2.0, 2.0], [1.0]))


def test_a_mean_that_was_seen_holds() -> None:
    with pytest.raises(BatchError, match="loss of all 3 rows, 5"):
        looked_at(([2.0, 2.0], [1.0]))
    check = SumCheck()
    parts = [Part(torch.full((2,), 2.0), (), {}, 2, torch.mean), Part(torch.ones(1), (), {}, 1, torch.mean)]
    check(torch.mean, torch.tensor([2.0, 2.0, 1.0]), (), parts)
    check(torch.sum, torch.tensor([2.0, 2.0, 1.0]), (), [replace(part, criterion=torch.sum) for part in parts])


@pytest.mark.parametrize("losses", [([1.0, 3.0], [2.0]), ([-4.0, 1.0], [3.0]), ([0.0, 0.0], [0.0]), ([5.0], [5.0])])
def test_means_of_any_sign_are_taken(losses: tuple[list[float], list[float]]) -> None:
    looked_at(losses, criterion=torch.mean)


def test_a_mean_is_not_refused() -> None:
    assert loss_of(cross_entropy, 0.999) == pytest.approx(loss_of(cross_entropy, 1.0), rel=1e-2)
