"""A warning, once, of partitions that are named and that nobody holds."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.distributed.absent_partitions import ABSENT_AFTER

LABELS = torch.arange(8) % 3


def messages(steps: int, caplog: pytest.LogCaptureFixture, **keys: Any) -> list[str]:
    section = {"buffer": {"capacity": 50, "partition_by": "label"}, "representatives": 2, **keys}
    with caplog.at_level(logging.WARNING), Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(steps):
            rehearsal.augment({"x": torch.zeros(8, 2), "label": LABELS})
            rehearsal.give_up_step()
            rehearsal.step()
        rehearsal.drain()
    return [said for said in caplog.messages if ", of which no rank" in said or ", of which rank 0" in said]


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"sampling": {"weights": {"0": 1.0, "7": 2.0}}}, "rehearsal.sampling.weights"),
        ({"strategy": {"partition_weights": {"7": 2.0}}}, "rehearsal.strategy.partition_weights"),
        ({"losses_every": 1, "guard": {"partitions": [1, 7]}}, "rehearsal.guard.partitions"),
    ],
)
def test_a_partition_that_nobody_holds_is_named_once(
    keys: dict[str, Any], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = messages(ABSENT_AFTER + 50, caplog, **keys)
    assert message.startswith(f"{path} names the partitions ['7'], of which ")
    assert "after 100 steps" in message
    assert "[0, 1, 2]" in message


@pytest.mark.parametrize("changes", [[ABSENT_AFTER + 20], [20], [ABSENT_AFTER + 20, ABSENT_AFTER + 60]])
def test_weights_that_are_changed_later_are_looked_at_too(changes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    section: dict[str, Any] = {"buffer": {"capacity": 50, "partition_by": "label"}, "representatives": 2}
    section |= {"sampling": {"weights": {"0": 1.0}}, "strategy": {"partition_weights": {"9": 1.0}}}
    with caplog.at_level(logging.WARNING), Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(2 * ABSENT_AFTER + 50):
            if step in changes:
                rehearsal.reweigh({"0": 1.0, "7": 2.0 + step})
            rehearsal.augment({"x": torch.zeros(8, 2), "label": LABELS})
            rehearsal.give_up_step()
            rehearsal.step()
        rehearsal.drain()
    paths = [said.split(" of which ")[0] for said in caplog.messages if " names the partitions " in said]
    assert sorted(paths) == [
        "rehearsal.sampling.weights names the partitions ['7'],",
        "rehearsal.strategy.partition_weights names the partitions ['9'],",
    ]


def test_partitions_that_are_held_or_count_nothing_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert messages(ABSENT_AFTER + 5, caplog, sampling={"weights": {"0": 1.0, "2": 2.0, "7": 0.0}}) == []


def test_nothing_is_said_before(caplog: pytest.LogCaptureFixture) -> None:
    assert messages(ABSENT_AFTER - 1, caplog, sampling={"weights": {"7": 1.0}}) == []
