"""A strategy's term that reaches no gradient is refused at the step, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError

STEPS = 6


def learn(loss_of: Callable[[Rehearsal, Tensor, Tensor], Tensor | None], **section: Any) -> Rehearsal:
    """Train some steps; `loss_of(rehearsal, outputs, targets)` gives the loss that is trained on, None for none."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    keys = {"buffer": {"capacity": 50}, "representatives": 2, "strategy": {"name": "der"}, **section}
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for _ in range(STEPS):
            batch = rehearsal.augment({"x": torch.randn(4, 2), "y": torch.randn(4, 1), "key": torch.arange(4) % 2})
            loss = loss_of(rehearsal, model(batch["x"]), batch["y"])
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            rehearsal.step()
    return rehearsal


def inside(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> Any:
    """As a model of Hugging Face that computes its loss itself."""
    return rehearsal.complete({"loss": mse_loss(outputs, targets), "logits": outputs})


def weighted() -> dict[str, Any]:
    return {
        "buffer": {"capacity": 50, "partition_by": "key"},
        "strategy": {"name": "er", "partition_weights": {0: 1.0, 1: 3.0}},
    }


def test_a_loss_that_is_trained_on_is_fine() -> None:
    learn(lambda rehearsal, outputs, targets: inside(rehearsal, outputs, targets)["loss"])
    learn(lambda rehearsal, outputs, targets: rehearsal.loss(mse_loss, outputs, targets) * 0.5)
    learn(lambda rehearsal, outputs, targets: rehearsal.loss(mse_loss, outputs, targets), **weighted())


def test_a_loss_of_ones_own_beside_the_models_is_refused() -> None:
    def own(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(inside(rehearsal, outputs, targets)["logits"], targets)

    with pytest.raises(BatchError, match=r"leaves out the term of strategy 'der'.*compute_loss_func"):
        learn(own)


@pytest.mark.parametrize(
    ("section", "subject"),
    [
        ({}, "strategy 'der'"),
        ({"strategy": {"name": "er", "loss_weight": 3}}, r"rehearsal\.strategy\.loss_weight"),
        (weighted(), r"rehearsal\.strategy\.partition_weights"),
    ],
)
def test_a_loss_that_was_asked_for_and_thrown_away_is_refused(section: dict[str, Any], subject: str) -> None:
    def thrown_away(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> Tensor:
        rehearsal.loss(mse_loss, outputs, targets)
        return mse_loss(outputs, targets)

    with pytest.raises(BatchError, match=f"leaves out the term of {subject}"):
        learn(thrown_away, **section)


def test_a_step_without_a_backward_pass_misses_nothing() -> None:
    def idle(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> Tensor | None:
        loss = rehearsal.loss(mse_loss, outputs, targets)
        return loss if rehearsal.steps % 2 else None

    learn(idle)


def test_what_was_given_up_is_not_missed() -> None:
    def given_up(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> None:
        rehearsal.loss(mse_loss, outputs, targets)
        outputs.sum().backward()  # type: ignore[no-untyped-call]
        rehearsal.give_up_step()

    learn(given_up)


def test_a_plain_loss_may_be_anywhere() -> None:
    def own(rehearsal: Rehearsal, outputs: Tensor, targets: Tensor) -> Tensor:
        rehearsal.loss(mse_loss, outputs, targets)
        return mse_loss(outputs, targets)

    learn(own, strategy={"name": "er"})


@pytest.mark.parametrize("trained", [True, False])
def test_a_loop_by_update_is_checked_too(trained: bool) -> None:
    model = nn.Linear(2, 1)
    keys = {"buffer": {"capacity": 50}, "representatives": 2, "strategy": {"name": "er", "loss_weight": 3}}
    with Rehearsal(keys, LocalTransport()) as rehearsal:

        def loop() -> None:
            for _ in range(STEPS):
                batch = rehearsal.update({"x": torch.randn(4, 2), "y": torch.randn(4, 1)})
                outputs = model(batch["x"])
                loss = rehearsal.loss(mse_loss, outputs, batch["y"])
                (loss if trained else mse_loss(outputs, batch["y"])).backward()  # type: ignore[no-untyped-call]

        if trained:
            loop()
        else:
            with pytest.raises(BatchError, match=r"leaves out the term of rehearsal\.strategy\.loss_weight"):
                loop()
