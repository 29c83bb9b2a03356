"""Micro-batches that wait for their loss: in their order, and never forgotten without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from rehearsal_plugin import LocalTransport, RehearsalConfig, RowLayout
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.strategies import make_strategy

LAYOUT = RowLayout.infer({"x": torch.zeros(1)})


def pending(name: str = "er", **keys: Any) -> PendingLosses:
    config = RehearsalConfig.load({"buffer": {"capacity": 9}, "strategy": {"name": name}, **keys})
    strategy = make_strategy(config.strategy)
    coordinator = ReplayCoordinator(config, LocalTransport(), strategy.draws, strategy.refreshes)
    return PendingLosses(config, strategy, coordinator, JobReport(config))


def expect(losses: PendingLosses, rows: int, draws: int = 1) -> None:
    losses.expect(MicroBatch([torch.zeros(rows)], rows, None, draws), LAYOUT)


def test_losses_come_in_the_order_of_the_micro_batches() -> None:
    losses = pending("der")
    expect(losses, 2)
    expect(losses, 3)
    for rows in (2, 3):
        losses.loss(mse_loss, torch.ones(rows), torch.zeros(rows))
    losses.check()


def test_a_loss_that_nobody_waits_for_is_refused() -> None:
    with pytest.raises(BatchError, match=r"no micro-batch to compute a loss for; call augment\(batch\)"):
        pending().loss(mse_loss, torch.ones(2), torch.zeros(2))


def test_a_strategy_that_records_outputs_misses_them() -> None:
    losses = pending("der")
    expect(losses, 2)
    with pytest.raises(BatchError, match=r"strategy 'der' stores the model's outputs.*record\(outputs\)"):
        losses.check()


def test_a_plain_strategy_needs_no_loss() -> None:
    losses = pending()
    expect(losses, 2)
    losses.check()


def test_a_dropped_micro_batch_is_not_missed() -> None:
    losses = pending("der")
    expect(losses, 2)
    losses.drop()
    losses.check()


def test_measured_losses_are_missed_in_their_steps() -> None:
    losses = pending(losses_every=1)
    expect(losses, 2)
    with pytest.raises(BatchError, match=r"rehearsal\.losses_every needs the losses"):
        losses.check()


def test_a_plain_loss_is_the_criterion_of_all_rows() -> None:
    losses = pending()
    expect(losses, 2)
    outputs = torch.tensor([1.0, 3.0])
    assert losses.loss(mse_loss, outputs, torch.zeros(2)).item() == 5.0


def test_a_models_own_loss_is_left_as_it_is_without_a_term() -> None:
    losses = pending()
    expect(losses, 2)
    outputs = {"loss": torch.tensor(2.0), "logits": torch.zeros(2, 3)}
    assert losses.complete(outputs, 1.0) is outputs
