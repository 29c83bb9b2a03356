"""Experience replay: one mean loss over new and replayed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError
from tests.helpers.replay_jobs import SIZE, Model, section
from tests.helpers.samples import new_batch
from tests.helpers.strategy_parts import entropies, labels, leaf, near, part, scores, strategy


def test_er_is_the_mean_loss_over_all_rows() -> None:
    outputs, targets = leaf(scores(0, 9)), labels(1, 9)
    parts = [part(outputs[span], targets[span]) for span in (slice(0, 5), slice(5, 9))]
    loss = strategy("er").loss(parts[0], parts[1:])
    assert near(loss, cross_entropy(outputs, targets))
    (gradient,) = torch.autograd.grad(loss, outputs)
    (expected,) = torch.autograd.grad(cross_entropy(outputs, targets), outputs)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.5])
def test_er_weights_each_replayed_row(weight: float) -> None:
    new, old = (scores(0, 5), labels(1, 5)), (scores(2, 3), labels(3, 3))
    by_hand = (sum(entropies(*new)) + weight * sum(entropies(*old))) / 8
    assert near(strategy("er", loss_weight=weight).loss(part(*new), [part(*old)]), by_hand)


def masked(outputs: Tensor, label: Tensor) -> Tensor:
    """A mean over what counts, which is not the mean of the means of parts."""
    return cross_entropy(outputs, label, ignore_index=0)


def test_er_is_the_criterion_of_all_rows_whatever_it_averages_over() -> None:
    with Rehearsal(section("er"), LocalTransport()) as rehearsal:
        for step in range(10):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs = Model()(batch["x"])
            assert torch.equal(rehearsal.loss(masked, outputs, batch["label"]), masked(outputs, batch["label"]))
            rehearsal.step()


def test_er_weights_ask_for_their_loss_in_a_plain_loop_too() -> None:
    with Rehearsal(section("er", strategy={"loss_weight": 0.5}), LocalTransport()) as rehearsal:
        batch = rehearsal.update(new_batch(0, 0, SIZE))
        rehearsal.loss(cross_entropy, batch["x"].float(), batch["label"] % 3)
        rehearsal.update(new_batch(0, 1, SIZE))
        with pytest.raises(BatchError, match=r"'er'.*loss\(criterion"):
            rehearsal.update(new_batch(0, 2, SIZE))
