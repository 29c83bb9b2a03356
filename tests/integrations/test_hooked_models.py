"""Models with rows injected at their forward: calls that fail, models that call themselves, compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rehearsal_plugin.errors import BatchError
from tests.helpers.injected import ROWS, WANTED, Model, attached, backward, rows

STEPS = 7


def with_loss(values: Tensor) -> dict[str, Tensor]:
    return {"loss": (values**2).mean(), "logits": values}


class Failing(nn.Module):
    """Raises where it is told to, in the midst of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(with_loss)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Any:
        outputs = self.inner(x)
        if self.error is not None:
            raise self.error("out of memory")
        return outputs


# --- a forward that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{}, {"mode": "replace"}, {"strategy": {"name": "der"}}], ids=str)
@pytest.mark.parametrize("again", ["the same tensors", "others", "half of it", "nothing"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_batch_whose_forward_failed_may_come_again(
    rehearse: Any, error: type[BaseException], again: str, section: dict[str, Any]
) -> None:
    rehearsal = rehearse(**section)
    model = attached(rehearsal, Failing())
    offered = 0
    for step in range(STEPS):
        batch = rows(step)
        model.error = error
        with pytest.raises(error):
            model(batch)
        model.error = None
        if again != "nothing":
            batch = {"the same tensors": batch, "others": batch.clone(), "half of it": batch[: ROWS // 2]}[again]
            backward(model(batch)["loss"])
            offered += len(batch)
        else:
            backward(model(rows(step + 100))["loss"])
            offered += ROWS
        rehearsal.step()
    metrics = rehearsal.metrics()
    displaced = metrics["rows_displaced"] if section.get("strategy") else 0
    assert metrics["rows_offered"] == offered - displaced
    assert metrics["rows_replayed"] == (STEPS - 3) * WANTED


def test_a_failed_forward_at_the_end_of_a_step_is_not_offered(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Failing())
    for step in range(3):
        backward(model(rows(2 * step))["loss"])
        model.error = ValueError
        with pytest.raises(ValueError, match="out of memory"):
            model(rows(2 * step + 1))
        model.error = None
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == 3 * ROWS


def test_a_drop_by_the_script_beside_it_takes_back_nothing_more(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Failing())
    backward(model(rows(0))["loss"])
    model.error = ValueError
    with pytest.raises(ValueError, match="out of memory"):
        model(rows(1))
    rehearsal.drop()
    rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == ROWS


# --- a model that calls itself ---------------------------------------------------------------------------------------


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(with_loss)

    def forward(self, x: Tensor, depth: int = 2) -> Any:
        return self(x, depth=depth - 1) if depth else self.inner(x)


@pytest.mark.parametrize("section", [{}, {"strategy": {"name": "der"}}], ids=str)
def test_a_model_that_calls_itself_gets_rows_once(rehearse: Any, section: dict[str, Any]) -> None:
    rehearsal = rehearse(**section)
    model = attached(rehearsal, Recursive())
    for step in range(STEPS):
        backward(model(rows(step))["loss"])
        rehearsal.step()
    assert [len(seen) for seen in model.inner.seen] == [ROWS] * 3 + [ROWS + WANTED] * (STEPS - 3)
    assert rehearsal.metrics()["rows_offered"] == STEPS * ROWS


# --- compiled and wrapped --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return with_loss(self.linear(x))


def compiled_behind(rehearsal: Any) -> Any:
    return torch.compile(attached(rehearsal, Plain()), backend="aot_eager")


def compiled_in_place(rehearsal: Any) -> Any:
    model = attached(rehearsal, Plain())
    model.compile(backend="aot_eager")
    return model


def compiled_before(rehearsal: Any) -> Any:
    return attached(rehearsal, torch.compile(Plain(), backend="aot_eager"))  # type: ignore[arg-type]


COMPILED = [compiled_behind, compiled_in_place, compiled_before]


@pytest.mark.parametrize("section", [{}, {"mode": "replace"}, {"strategy": {"name": "der"}}], ids=str)
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_sees_replayed_rows(
    rehearse: Any, compiled: Callable[[Any], Any], section: dict[str, Any]
) -> None:
    rehearsal = rehearse(**section)
    model = compiled(rehearsal)
    sizes = []
    for step in range(STEPS):
        outputs = model(rows(step))
        sizes.append(len(outputs["logits"]))
        backward(outputs["loss"])
        rehearsal.step()
    assert sizes == [ROWS] * 3 + [ROWS + WANTED * (section.get("mode") != "replace")] * (STEPS - 3)
    assert rehearsal.metrics()["rows_replayed"] == (STEPS - 3) * WANTED


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_models_loss_may_not_be_ignored(rehearse: Any, compiled: Callable[[Any], Any]) -> None:
    rehearsal = rehearse()
    logits = compiled(rehearsal)(rows(0))["logits"]
    backward(((logits - rows(0)) ** 2).mean())
    with pytest.raises(BatchError, match="the loss that the model returned was not trained on"):
        rehearsal.step()
