"""Rows injected at a model's forward: several passes a step, recomputation, copies, hidden fields."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rehearsal_plugin.errors import BatchError, ConfigError
from tests.helpers.injected import ROWS, Model, attached, backward, itself, rows

# --- several passes a step -------------------------------------------------------------------------------------------


def test_the_same_batch_before_the_backward_pass_gets_the_same_rows(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(lambda values: {"loss": values.mean(), "logits": values}))
    for step in range(6):
        batch = rows(step)
        first, second = model(batch), model(batch, flag=True) if step % 2 else model(batch)
        assert step % 2 or model.seen[-1] == model.seen[-2]
        backward(first["loss"] + second["loss"])
        rehearsal.step()


def test_two_views_with_the_loss_outside_are_refused_at_the_second(rehearse: Any) -> None:
    model = attached(rehearse(), Model())
    first = model(rows(0))
    with pytest.raises(BatchError, match="a second training pass through the model began"):
        model(rows(1))
    del first


def test_micro_batches_with_their_own_loss_may_wait_for_one_backward_pass(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(lambda values: values.mean()))
    for step in range(6):
        backward(model(rows(2 * step)) + model(rows(2 * step + 1)))
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == 12 * ROWS


def test_a_tensor_that_is_filled_anew_is_another_batch(rehearse: Any) -> None:
    rehearsal, batch = rehearse(), rows(0)
    model = attached(rehearsal, Model(lambda values: values.mean()))
    first = model(batch)
    batch += 1
    backward(model(batch))
    assert first.grad_fn is not None
    rehearsal.step()
    assert model.seen[1] == [value + 1 for value in model.seen[0]]
    assert rehearsal.metrics()["rows_offered"] == 2 * ROWS


def test_outputs_that_nobody_kept_wait_for_nothing(rehearse: Any) -> None:
    model = attached(rehearse(), Model())
    for step in range(3):
        model(rows(step))


# --- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_recomputed_pass_sees_the_rows_of_the_first(rehearse: Any, reentrant: bool, passes: int, mode: str) -> None:
    rehearsal = rehearse(mode=mode)
    model = attached(rehearsal, Model())
    for step in range(6):
        model.seen.clear()
        model.linear.weight.grad = None
        batches = [rows(passes * step + i).requires_grad_() for i in range(passes)]
        losses = [checkpoint(model, batch, use_reentrant=reentrant).sum() for batch in batches]
        first = list(model.seen)
        backward(torch.stack(losses).sum())
        assert sorted(model.seen[passes:]) == sorted(first)
        assert model.linear.weight.grad.item() == pytest.approx(sum(map(sum, first)))
        rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == 6 * passes * ROWS
    assert rehearsal.metrics()["rows_replayed"] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_outside_a_recomputed_pass_is_refused(rehearse: Any, reentrant: bool) -> None:
    model, batch = attached(rehearse(), Model()), rows(0).requires_grad_()
    with pytest.raises(BatchError, match="the loss is computed outside"):
        backward(((checkpoint(model, batch, use_reentrant=reentrant) - rows(0)) ** 2).mean())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_strategy_that_records_refuses_recomputation(rehearse: Any, reentrant: bool) -> None:
    rehearsal = rehearse(strategy={"name": "der"})
    outputs = checkpoint(attached(rehearsal, Model()), rows(0).requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(BatchError, match="by activation checkpointing around the call"):
        backward(outputs.sum())


def test_reentrant_recomputation_would_lose_the_gradient_of_earlier_layers(rehearse: Any) -> None:
    model, before = attached(rehearse(), Model()), nn.Linear(1, 1)
    with pytest.raises(BatchError, match="use_reentrant=False"):
        backward(checkpoint(model, before(rows(0)), use_reentrant=True).sum())


def test_evaluation_within_no_grad_stays_one(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model())
    with torch.no_grad():
        checkpoint(model, rows(0), use_reentrant=False)
        model(rows(0))
    assert rehearsal.metrics()["rows_offered"] == 0


# --- copies ----------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_is_neither_augmented_nor_stored(rehearse: Any, duplicate: Any, training: bool) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(itself))
    twin = duplicate(model).train(training)
    if duplicate is copy.copy:
        model.train()
        twin.seen = []
    sizes = []
    for step in range(6):
        sizes.append(len(model(rows(step))))
        assert len(twin(rows(step))) == ROWS
        rehearsal.step()
    assert sizes == [8, 8, 8, 10, 10, 10]
    assert rehearsal.metrics()["rows_offered"] == 6 * ROWS


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_of_a_copy_too_and_hidden_fields_stay_hidden(rehearse: Any, duplicate: Any) -> None:
    rehearsal = rehearse(hidden=["domain"])
    model = attached(rehearsal, Model(itself))
    twin = duplicate(duplicate(model))
    assert twin(rows(0), domain=torch.zeros(ROWS)).shape == (ROWS, 1)
    assert rehearsal.metrics()["rows_offered"] == 0


def test_an_average_of_the_weights_follows(rehearse: Any) -> None:
    rehearsal = rehearse()
    model = attached(rehearsal, Model(itself))
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(5):
        backward(model(rows(step)).sum())
        average.update_parameters(model)
        assert len(average(rows(step))) == ROWS
        rehearsal.step()


# --- hidden arguments given by position ------------------------------------------------------------------------------


class Positional(nn.Module):
    def forward(self, x: Tensor, domain: Any = None, labels: Any = None, weight: Any = None) -> Any:
        return x, domain, labels, weight


class PositionalOnly(nn.Module):
    def forward(self, x: Tensor, domain: Any = None, labels: Any = None, /) -> Any:
        return x, domain, labels


class Rest(nn.Module):
    def forward(self, x: Tensor, domain: Any = None, *rest: Any) -> Any:
        return x, domain, rest


def hiding(rehearse: Any, model: nn.Module, *names: str) -> Any:
    return attached(rehearse(hidden=list(names)), model)


@pytest.mark.parametrize("training", [True, False])
def test_arguments_behind_a_hidden_one_keep_their_places(rehearse: Any, training: bool) -> None:
    model = hiding(rehearse, Positional(), "domain").train(training)
    x, domain, labels = rows(0), rows(1), rows(2)
    outputs = model(x, domain, labels, weight=rows(3))
    assert [outputs[0][0], outputs[2][0], outputs[3][0]] == [x[0], labels[0], rows(3)[0]]
    assert outputs[1] is None


def test_two_hidden_arguments_leave_the_last_in_its_place(rehearse: Any) -> None:
    model = hiding(rehearse, Positional(), "domain", "labels")
    outputs = model(rows(0), rows(1), rows(2), rows(3))
    assert outputs[1] is outputs[2] is None
    assert outputs[3] is not None


@pytest.mark.parametrize("kind", [PositionalOnly, Rest])
def test_arguments_that_have_no_name_behind_a_hidden_one_are_refused(rehearse: Any, kind: type[nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.hidden takes the argument 'domain' out"):
        hiding(rehearse, kind(), "domain")(rows(0), rows(1), rows(2))
    assert hiding(rehearse, kind(), "domain")(rows(0), rows(1))[1] is None


def test_numbered_arguments_move_up(rehearse: Any) -> None:
    _, domain, rest = hiding(rehearse, Rest(), "2")(rows(0), rows(1), rows(2), rows(3))
    assert torch.equal(domain, rows(1))
    assert torch.equal(rest[0], rows(3))
    assert len(rest) == 1
