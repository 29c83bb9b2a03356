"""Keys without effect are named once."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.strategies.base import register
from rehearsal_plugin.strategies.er import ExperienceReplay


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("no effect")]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"strategy": {"name": "er", "alpha": 3.0}}, ["rehearsal.strategy.alpha"]),
        ({"strategy": {"name": "er", "k": 4, "outputs": ["logits"]}}, ["strategy.outputs", "strategy.k"]),
        ({"strategy": {"name": "er-ace", "beta": 1.0}}, ["rehearsal.strategy.beta"]),
        ({"strategy": {"name": "der", "loss_weight": 2.0, "beta": 0.1}}, ["strategy.loss_weight", "strategy.beta"]),
        ({"strategy": {"name": "topk", "gamma": 0.1}}, ["rehearsal.strategy.gamma"]),
        ({"sampling": {"queries": 4, "retrieved_share": 0.1}}, ["sampling.retrieved_share", "sampling.queries"]),
        ({"losses_every": 1, "guard": {"factor": 2.0, "most": 0.9}}, ["guard.factor", "guard.most"]),
    ],
)
def test_a_key_that_nothing_reads_is_named_once(
    section: dict[str, Any], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Rehearsal(section, LocalTransport()):
        pass
    (message,) = said(caplog)
    assert all(key in message for key in named)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"strategy": {"name": "er", "loss_weight": 2.0}},
        {"strategy": {"name": "x-der", "alpha": 0.1, "beta": 0.1, "gamma": 0.1, "outputs": ["output"]}},
        {"strategy": {"name": "topk", "alpha": 0.1, "k": 3}},
        {"ratio": 0.1, "losses_every": 1, "guard": {"action": "raise_ratio", "factor": 2.0, "most": 0.9}},
    ],
)
def test_keys_that_are_read_are_not(section: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Rehearsal(section, LocalTransport()):
        pass
    assert not said(caplog)


def test_nothing_is_said_of_a_strategy_that_may_read_any_key(caplog: pytest.LogCaptureFixture) -> None:
    @register("mine of test_unread")
    class Mine(ExperienceReplay):
        """Reads what it likes."""

    section = {"strategy": {"name": "mine of test_unread", "alpha": 3.0}}
    with caplog.at_level(logging.WARNING), Rehearsal(section, LocalTransport()):
        pass
    assert not said(caplog)
