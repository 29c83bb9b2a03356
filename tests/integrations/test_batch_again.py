"""A batch that a training loop gives to the model again within a step, as the closures of SAM and LBFGS do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rehearsal_plugin.errors import BatchError
from tests.helpers.injected import ROWS, WANTED, Model, attached, backward, rows

STEPS = 7


def with_loss(values: Tensor) -> dict[str, Tensor]:
    return {"loss": (values**2).mean(), "logits": values}


# --- optimizers that need several passes over a batch ----------------------------------------------------------------


def sharpness_aware(model: nn.Module, passes: Callable[[], None]) -> None:
    """SAM: up the gradient, a second pass, and back."""
    passes()
    moved = [(weight, 0.05 * weight.grad) for weight in model.parameters() if weight.grad is not None]
    with torch.no_grad():
        for weight, change in moved:
            weight.add_(change)
    model.zero_grad()
    passes()
    with torch.no_grad():
        for weight, change in moved:
            weight.sub_(change)


def by_data(model: nn.Module, passes: Callable[[], None]) -> None:
    """FGM: as SAM, with gradients added up, and with changes of `.data`, which no version counts."""
    passes()
    for weight in model.parameters():
        weight.data.add_(0.05)
    passes()
    for weight in model.parameters():
        weight.data.sub_(0.05)


def lbfgs(model: nn.Module, passes: Callable[[], None]) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=3)

    def closure() -> float:
        optimizer.zero_grad()
        passes()
        return 1.0

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def line_search(model: nn.Module, passes: Callable[[], None]) -> None:
    passes()  # before the optimizer's own
    lbfgs(model, passes)


LOOPS = [sharpness_aware, by_data, lbfgs, line_search]


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_each_pass_sees_the_rows_of_the_first(rehearse: Any, loop: Any, micro_batches: int, mode: str) -> None:
    rehearsal = rehearse(mode=mode)
    model = attached(rehearsal, Model(with_loss))
    for step in range(STEPS):
        batches = [rows(step * micro_batches + i) for i in range(micro_batches)]
        model.seen.clear()

        def passes(batches: list[Tensor] = batches) -> None:
            for batch in batches:
                backward(model(batch)["loss"])

        loop(model, passes)
        assert len(model.seen) > micro_batches
        assert all(seen == model.seen[i % micro_batches] for i, seen in enumerate(model.seen))
        rehearsal.step()
    metrics = rehearsal.metrics()
    assert metrics["rows_offered"] == STEPS * micro_batches * ROWS
    assert metrics["rows_replayed"] == (STEPS - 3) * micro_batches * WANTED


def test_a_closure_that_begins_late_is_known_from_its_second_step_on(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(with_loss))
    for step in range(STEPS):
        batch = rows(step)
        model.seen.clear()
        for _ in range(1 if step < 4 else 3):
            backward(model(batch)["loss"])
        assert step < 5 or model.seen[0] == model.seen[1] == model.seen[2]
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == (STEPS + 1) * ROWS


def test_a_second_pass_by_position_or_by_name_is_the_same(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(with_loss))
    for step in range(STEPS):
        batch = rows(step)
        backward(model(batch)["loss"])
        backward(model(x=batch)["loss"])
        assert model.seen[-1] == model.seen[-2]
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == STEPS * ROWS


def test_a_strategy_that_needs_one_answer_refuses_a_second_pass(rehearse: Any) -> None:
    model, batch = attached(rehearse(strategy={"name": "der"}), Model(with_loss)), rows(0)
    backward(model(batch)["loss"])
    with pytest.raises(BatchError, match="the model is called twice with the same batch in a step"):
        model(batch)


# --- memory that is used again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["numpy", "data", "in place"])
def test_memory_that_is_filled_anew_is_another_batch(rehearse: Any, fill: str) -> None:
    """As loaders do that give their batches in a few blocks of memory, again and again."""
    rehearsal = rehearse()
    model = attached(rehearsal, Model(with_loss))
    memory = np.zeros((ROWS, 1), np.float32)
    batch = torch.from_numpy(memory)
    offered = 0
    for step in range(STEPS):
        for micro_batch in range(3):
            fresh = rows(3 * step + micro_batch)
            if fill == "numpy":
                memory[:] = fresh.numpy()
            else:
                (batch.data if fill == "data" else batch).copy_(fresh)
            model.seen.clear()
            backward(model(batch)["loss"])
            assert model.seen[0][:ROWS] == fresh.flatten().tolist()
            offered += ROWS
        rehearsal.step()
        assert rehearsal.metrics()["rows_offered"] == offered


def test_the_same_batch_in_another_step_is_another_batch(rehearse: Any) -> None:
    rehearsal, batch = rehearse(), rows(0)
    model = attached(rehearsal, Model(with_loss))
    for _ in range(STEPS):
        backward(model(batch)["loss"])
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == STEPS * ROWS


def test_batches_are_let_go_after_their_backward_pass(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(with_loss))
    for step in range(3):
        alive = []
        for micro_batch in range(4):
            batch = rows(4 * step + micro_batch)
            alive.append(weakref.ref(batch))
            backward(model(batch)["loss"])
            assert step == 0 or sum(one() is not None for one in alive) == 1
        rehearsal.step()


@pytest.mark.parametrize("section", [{}, {"strategy": {"name": "der"}}], ids=str)
@pytest.mark.parametrize("forget", ["drop", "give_up_step"])
def test_a_batch_that_was_dropped_comes_as_if_for_the_first_time(
    rehearse: Any, forget: str, section: dict[str, Any]
) -> None:
    rehearsal = rehearse(**section)
    model = attached(rehearsal, Model(with_loss))
    for step in range(STEPS):
        batch = rows(step)
        model(batch)  # whose backward pass fails
        getattr(rehearsal, forget)()
        backward(model(batch)["loss"])
        rehearsal.step()
    metrics, times = rehearsal.metrics(), 1 if forget == "drop" else 2  # what was given up stays offered
    assert metrics["rows_offered"] == STEPS * ROWS * times
    assert metrics["rows_replayed"] == (STEPS - 3) * WANTED * times
