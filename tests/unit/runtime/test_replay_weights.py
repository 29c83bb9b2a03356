"""What a replayed sample counts for: the strategy's weight times that of its partition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.replay_weights import ReplayWeights, add_to_loss
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.strategies import make_strategy

KEYS = np.array([0, 1, 1, 0, 0, 0, 1], dtype=np.int64)
LAYOUT = RowLayout.infer({"x": torch.zeros(1)})


def weights(name: str = "er", **strategy: Any) -> ReplayWeights:
    config = RehearsalConfig.load(
        {"buffer": {"capacity": 9, "partition_by": "key"}, "strategy": {"name": name, **strategy}}
    )
    made = make_strategy(config.strategy)
    coordinator = ReplayCoordinator(config, LocalTransport(), made.draws, made.refreshes)
    coordinator.metrics.count_replayed(KEYS[3:])
    return ReplayWeights(config, made, coordinator)


def micro_batch(replayed: int = 4) -> MicroBatch:
    rows = torch.zeros((replayed, LAYOUT.row_bytes), dtype=torch.uint8)
    return MicroBatch([], 3, Share(rows, [replayed], torch.arange(replayed), LAYOUT), 1, KEYS[: 3 + replayed])


def test_without_weights_there_are_no_factors() -> None:
    assert weights().factors(micro_batch()) is None
    assert weights("der").factors(micro_batch()) is None
    assert weights(loss_weight=2.0).factors(micro_batch(0)) is None


def test_factors_are_the_product_of_both_weights() -> None:
    one = weights(loss_weight=0.5).factors(micro_batch())
    assert one is not None
    assert one.tolist() == [0.5] * 4
    # Shares of partitions are 3/4 and 1/4, weights are 1/2 each.
    both = weights(loss_weight=0.5, partition_weights={0: 1.0, 1: 1.0}).factors(micro_batch())
    assert both is not None
    assert both.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_a_message_names_what_changes_the_loss() -> None:
    assert weights(loss_weight=2.0).subject == "rehearsal.strategy.loss_weight"
    assert weights(partition_weights={0: 1.0}).subject == "rehearsal.strategy.partition_weights"
    assert weights("der++", partition_weights={0: 1.0}).subject == "strategy 'der++'"


def test_a_term_is_added_to_the_loss_alone() -> None:
    outputs = {"loss": torch.tensor(1.0), "logits": torch.ones(2)}
    added = add_to_loss(outputs, torch.tensor(0.5))
    assert float(added["loss"]) == 1.5
    assert added["logits"] is outputs["logits"]
