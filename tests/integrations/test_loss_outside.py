"""Rows injected at a model's forward, and where the loss is computed: inside, outside, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rehearsal_plugin.errors import BatchError
from tests.helpers.injected import Model, Outputs, attached, backward, rows

OUTSIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "targets of the batch": lambda out, x: ((out[: len(x)] - x) ** 2).mean(),
    "targets made of the outputs": lambda out, x: nn.functional.binary_cross_entropy_with_logits(
        out, torch.zeros_like(out)
    ),
}


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("loss", OUTSIDE)
def test_a_loss_outside_the_model_is_refused_in_the_first_backward_pass(rehearse: Any, mode: str, loss: str) -> None:
    model = attached(rehearse(mode=mode), Model())
    with pytest.raises(BatchError, match=r"the loss is computed outside the model.*'loader'"):
        backward(OUTSIDE[loss](model(rows(0)), rows(0)))


@pytest.mark.parametrize(
    "answer",
    [
        lambda values: {"logits": values},
        lambda values: {"logits": values, "aux_loss": values.mean(), "loss": None},
        lambda values: Outputs(values),
        lambda values: (values, values.detach().mean()),
        lambda values: [values, [values + 1]],
    ],
)
def test_outputs_of_any_nesting_without_a_loss_are_known(rehearse: Any, answer: Any) -> None:
    outputs = attached(rehearse(), Model(answer))(rows(0))
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    logits = outputs[0] if logits is None else logits
    with pytest.raises(BatchError, match="the loss is computed outside the model"):
        backward(((logits - rows(0)) ** 2).mean())


def test_the_users_own_size_error_never_comes_first(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model())

    def train() -> None:
        for step in range(6):
            backward(nn.functional.mse_loss(model(rows(step)), rows(step)))
            rehearsal.step()

    with pytest.raises(BatchError):
        train()
    assert rehearsal.steps == 0


INSIDE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "scalar": (lambda values: (values**2).mean(), lambda out: out),
    "tuple": (lambda values: ((values**2).mean(), values), lambda out: out[0]),
    "mapping": (lambda values: {"loss": (values**2).mean(), "logits": values}, lambda out: out["loss"]),
    "object": (lambda values: Outputs(values, (values**2).mean()), lambda out: out.loss),
    "losses by name": (
        lambda values: {"box": values.mean(), "class": (values**2).mean()},
        lambda out: out["box"] + out["class"],
    ),
    "loss of each row, averaged outside": (lambda values: values[:, 0] ** 2, lambda out: out.mean()),
    "loss of each row, summed outside": (lambda values: values[:, 0] ** 2, lambda out: out.sum()),
}


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("form", INSIDE)
def test_a_loss_inside_the_model_is_fine(rehearse: Any, form: str, mode: str) -> None:
    answer, loss = INSIDE[form]
    rehearsal = rehearse(mode=mode)
    model = attached(rehearsal, Model(answer))
    for step in range(6):
        backward(loss(model(rows(step))))
        rehearsal.step()
    assert rehearsal.metrics()["rows_replayed"] > 0


WITH_A_LOSS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda values: ((values**2).mean(), values),
    "mapping": lambda values: {"loss": (values**2).mean(), "logits": values},
    "object": lambda values: Outputs(values, (values**2).mean()),
    "loss of each row": lambda values: {"loss": values[:, 0] ** 2, "logits": values},
    "beside another branch": lambda values: {
        "loss": (values**2).mean(),
        "logits": values * 2,
        "aux_loss": values.sum(),
    },
}

BESIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "targets of the batch": lambda logits, x: ((logits[: len(x)] - x) ** 2).mean(),
    "targets made of the outputs": lambda logits, x: ((logits - torch.arange(len(logits))[:, None]) ** 2).mean(),
}


def part_of(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, tuple):
        outputs = dict(zip(("loss", "logits"), outputs, strict=True))
    part: Tensor = outputs[name] if isinstance(outputs, dict) else getattr(outputs, name)
    return part


def logits_of(outputs: Any) -> Tensor:
    return part_of(outputs, "logits")


def loss_of(outputs: Any) -> Tensor:
    return part_of(outputs, "loss")


@pytest.mark.parametrize("section", [{}, {"mode": "replace"}, {"non_finite": "skip"}], ids=str)
@pytest.mark.parametrize("loss", BESIDE)
@pytest.mark.parametrize("form", WITH_A_LOSS)
def test_a_loss_that_the_script_ignores_is_refused_at_the_first_step(
    rehearse: Any, form: str, loss: str, section: dict[str, Any]
) -> None:
    rehearsal = rehearse(**section)
    model = attached(rehearsal, Model(WITH_A_LOSS[form]))
    for micro_batch in range(2):
        backward(BESIDE[loss](logits_of(model(rows(micro_batch))), rows(micro_batch)))
    with pytest.raises(BatchError, match=r"the loss that the model returned was not trained on.*'loader'"):
        rehearsal.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_is_ignored_is_refused_behind_a_checkpoint(rehearse: Any, reentrant: bool) -> None:
    rehearsal = rehearse()
    model, batch = attached(rehearsal, Model(WITH_A_LOSS["tuple"])), rows(0).requires_grad_()
    _, logits = checkpoint(model, batch, use_reentrant=reentrant)
    backward(((logits - rows(0)) ** 2).mean())
    with pytest.raises(BatchError, match="the loss that the model returned was not trained on"):
        rehearsal.step()


TRAINED: dict[str, Callable[[Any], Tensor]] = {
    "itself": loss_of,
    "weighted": lambda out: loss_of(out) * 0.3,
    "in half precision, scaled": lambda out: loss_of(out).bfloat16() * 2**16,
    "with a penalty": lambda out: loss_of(out) + 1e-3 * logits_of(out).logsumexp(0).square().mean(),
    "with a loss of its own outputs": lambda out: loss_of(out) + logits_of(out).std(),
    "outputs averaged": lambda out: logits_of(out).mean(),
}


@pytest.mark.parametrize("loss", TRAINED)
@pytest.mark.parametrize("form", [form for form in WITH_A_LOSS if form != "loss of each row"])
def test_a_loss_that_is_trained_on_in_any_way_is_fine(rehearse: Any, form: str, loss: str) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(WITH_A_LOSS[form]))
    for step in range(6):
        backward(TRAINED[loss](model(rows(step))))
        rehearsal.step()
    assert rehearsal.metrics()["rows_replayed"] > 0


def test_one_loss_of_several_is_enough(rehearse: Any) -> None:
    rehearsal = rehearse()
    losses = [lambda values: values.mean(), lambda values: (values**2).mean()]
    model = attached(rehearsal, Model(lambda values: {"a": losses[0](values), "b": losses[1](values), "c": values}))
    for step in range(6):
        backward(model(rows(step))["ab"[step % 2]])
        rehearsal.step()


def test_a_step_on_an_auxiliary_loss_alone_is_fine(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(lambda values: {"loss": values.mean(), "aux": (values**2).mean(), "c": values}))
    for step in range(6):
        backward(model(rows(step))["aux"])
        rehearsal.step()


def test_a_loss_by_rehearsal_of_what_the_model_returned_may_leave_out_the_models(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(lambda values: {"loss": values.mean(), "logits": values}))
    for step in range(6):
        logits = model(rows(step))["logits"]
        backward(rehearsal.loss(nn.functional.mse_loss, logits, logits.detach() + torch.arange(len(logits))[:, None]))
        rehearsal.step()


def test_a_step_without_a_backward_pass_ignores_nothing(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(WITH_A_LOSS["mapping"]))
    for step in range(6):
        model(rows(step))
        rehearsal.step()


def test_a_term_outside_beside_the_models_loss_is_said_once(rehearse: Any, caplog: Any) -> None:
    rehearsal = rehearse()
    model, teacher = attached(rehearsal, Model(WITH_A_LOSS["mapping"])), nn.Linear(1, 1)
    for step in range(3):
        out = model(rows(step))
        backward(out["loss"] + nn.functional.mse_loss(out["logits"], teacher(rows(step)).detach()))
        rehearsal.step()
    assert caplog.text.count("a term outside the model joins the loss that it returned") == 1


def test_two_passes_of_one_batch_may_be_compared(rehearse: Any, caplog: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(WITH_A_LOSS["mapping"]))
    for step in range(6):
        batch = rows(step)
        first, second = model(batch), model(batch)
        backward(first["loss"] + second["loss"] + ((first["logits"] - 2 * second["logits"]) ** 2).mean())
        rehearsal.step()
    assert "a term outside" not in caplog.text


@pytest.mark.parametrize("detached", [False, True])
def test_outputs_of_two_batches_are_never_compared(rehearse: Any, detached: bool) -> None:
    model = attached(rehearse(), Model(WITH_A_LOSS["mapping"]))
    first, second = model(rows(0)), model(rows(1))
    other = second["logits"].detach() if detached else second["logits"]
    with pytest.raises(BatchError, match="while another one waits for its backward pass"):
        backward(first["loss"] + second["loss"] + ((first["logits"] - 2 * other) ** 2).mean())


def test_a_loss_by_rehearsal_is_fine(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(lambda values: (values, values.detach() + 1)))
    for step in range(6):
        outputs, targets = model(rows(step))
        backward(rehearsal.loss(nn.functional.mse_loss, outputs, targets))
        rehearsal.step()
    assert rehearsal.metrics()["rows_replayed"] > 0


def test_once_closed_the_loss_may_be_anywhere(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model())
    rehearsal.close()
    backward(nn.functional.mse_loss(model(rows(0)), rows(0)))
