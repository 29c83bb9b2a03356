"""Calls of `Rehearsal.loss` in a loop: memory, order and refusals."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError
from tests.helpers.replay_jobs import (
    SIZE,
    WANTED,
    Model,
    section,
    started,
)
from tests.helpers.samples import new_batch


def test_who_records_nothing_keeps_no_batch_alive() -> None:
    with Rehearsal(section("er-ace"), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = new_batch(0, step, SIZE)
            fields = [weakref.ref(value) for value in batch.values()]
            seen = rehearsal.augment(batch)
            outputs, label = torch.zeros(len(seen["x"]), 5), seen["label"].clone()
            del batch, seen
            assert not any(value() is not None for value in fields)
            rehearsal.loss(cross_entropy, outputs, label)
            rehearsal.step()


@pytest.mark.parametrize("name", ["er", "er-ace", "der", "der++", "topk"])
def test_a_computed_loss_leaves_neither_batch_nor_outputs_behind(name: str) -> None:
    model = Model()
    with Rehearsal(section(name, strategy={"k": 2}), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs = model(batch["x"])
            kept = [weakref.ref(value) for value in (*batch.values(), outputs)]
            torch.autograd.backward(rehearsal.loss(cross_entropy, outputs, batch["label"]))
            del batch, outputs
            assert not any(value() is not None for value in kept)
            rehearsal.step()


def test_update_is_refused_where_outputs_are_recorded() -> None:
    with (
        Rehearsal(section("der"), LocalTransport()) as rehearsal,
        pytest.raises(
            ConfigError, match=r"'der'.*augment\(batch\), loss\(criterion, outputs, \*targets\) and step\(\)"
        ),
    ):
        rehearsal.update(new_batch(0, 0, SIZE))


@pytest.mark.parametrize("name", ["der", "er-ace"])
@pytest.mark.parametrize("call", ["step", "augment"])
def test_a_strategy_whose_loss_was_not_asked_for_says_so(name: str, call: str) -> None:
    with (
        started(name) as rehearsal,
        pytest.raises(BatchError, match=rf"'{name}'.*loss\(criterion, outputs, \*targets\)"),
    ):
        rehearsal.step() if call == "step" else rehearsal.augment(new_batch(0, 9, SIZE))


def test_record_stands_in_for_the_loss() -> None:
    with started() as rehearsal:
        rehearsal.record(torch.zeros(SIZE + WANTED, 5))
        rehearsal.step()
        assert rehearsal.metrics()["steps"] == 6


@pytest.mark.parametrize("name", ["er", "der", "er-ace"])
@pytest.mark.parametrize("rows", [SIZE, SIZE + WANTED + 1])
def test_outputs_for_other_rows_are_refused(name: str, rows: int) -> None:
    with (
        started(name) as rehearsal,
        pytest.raises(BatchError, match=rf"output 'output' has {rows} rows and the micro-batch has {SIZE + WANTED}"),
    ):
        rehearsal.loss(cross_entropy, torch.zeros(rows, 5), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("name", ["der", "er-ace"])
def test_targets_for_other_rows_are_refused(name: str) -> None:
    with (
        started(name, representatives=SIZE) as rehearsal,
        pytest.raises(BatchError, match=rf"target '0' has {SIZE} rows and the micro-batch has {2 * SIZE}"),
    ):
        rehearsal.loss(cross_entropy, torch.zeros(2 * SIZE, 5), new_batch(0, 5, SIZE)["label"])


@pytest.mark.parametrize(
    "outputs",
    [torch.zeros(SIZE + WANTED, 7), torch.zeros(SIZE + WANTED, 5, dtype=torch.float64)],
    ids=["shape", "dtype"],
)
def test_outputs_that_changed_since_the_first_step_are_refused(outputs: Tensor) -> None:
    with started() as rehearsal, pytest.raises(BatchError, match="'output'"):
        rehearsal.loss(cross_entropy, outputs, torch.zeros(SIZE + WANTED, dtype=torch.int64))


def test_a_refused_loss_may_be_asked_for_again() -> None:
    with started() as rehearsal:
        with pytest.raises(BatchError):
            rehearsal.loss(cross_entropy, torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
        rehearsal.loss(cross_entropy, torch.zeros(SIZE + WANTED, 5), torch.zeros(SIZE + WANTED, dtype=torch.int64))
        rehearsal.step()


@pytest.mark.parametrize("name", ["er", "der"])
def test_a_loss_without_a_micro_batch_is_refused(name: str) -> None:
    outputs, label = torch.zeros(SIZE, 5), torch.zeros(SIZE, dtype=torch.int64)
    with Rehearsal(section(name), LocalTransport()) as rehearsal:
        with pytest.raises(BatchError, match=r"call augment\(batch\) once before each"):
            rehearsal.loss(cross_entropy, outputs, label)
        rehearsal.augment(new_batch(0, 0, SIZE))
        rehearsal.loss(cross_entropy, outputs, label)
        with pytest.raises(BatchError, match=r"call augment\(batch\) once before each"):
            rehearsal.loss(cross_entropy, outputs, label)


def test_micro_batches_that_were_read_ahead_are_answered_in_their_order() -> None:
    model = Model()
    one_by_one, ahead = (Rehearsal(section("der++", ratio=0.3), LocalTransport()) for _ in range(2))
    for step in range(8):
        batches = [new_batch(0, 3 * step + micro, SIZE - micro) for micro in range(3)]
        losses = []
        for batch in batches:
            seen = one_by_one.augment(batch)
            losses.append(one_by_one.loss(cross_entropy, model(seen["x"]), seen["label"]))
        read = [ahead.augment(batch, ahead=True) for batch in batches]
        assert [ahead.loss(cross_entropy, model(seen["x"]), seen["label"]) for seen in read] == losses
        for rehearsal in (one_by_one, ahead):
            rehearsal.step()
    one_by_one.close()
    ahead.close()
