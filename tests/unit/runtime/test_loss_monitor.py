"""Losses of new and replayed rows told apart, weighted by partition, and watched by the guard."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.core.metrics import MOST_PENDING, Metrics
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError, ForgettingError
from rehearsal_plugin.runtime.loss_monitor import LossMonitor
from rehearsal_plugin.runtime.token_losses import token_losses
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, language, new_batch

SIZE, WANTED, CLASSES = 8, 4, 5
EXCHANGE = {"timeout_s": 20}


def section(**keys: Any) -> dict[str, Any]:
    return {
        "buffer": {"capacity": 60, "partition_by": "label"},
        "representatives": WANTED,
        "losses_every": 2,
        "exchange": EXCHANGE,
        **keys,
    }


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer((x % 97).float() / 97)
        return scores


# --- apart -----------------------------------------------------------------------------------------------------------


def train(rehearsal: Rehearsal, first: int, last: int, rank: int = 0) -> tuple[Batch, Tensor]:
    """Steps of a loop with a loss of its own; the last batch, and what the model made of it."""
    model = Model()
    for step in range(first, last):
        batch = rehearsal.augment(new_batch(rank, step, SIZE))
        outputs = model(batch["x"])
        rehearsal.loss(cross_entropy, outputs, batch["label"])
        rehearsal.step()
    return batch, outputs


def test_rows_in_which_nothing_counts_are_left_out_of_the_measurement() -> None:
    section_ = {"buffer": {"capacity": 60}, "representatives": 1, "losses_every": 1}
    with Rehearsal(section_, LocalTransport()) as rehearsal:
        model = Model()
        for step in range(12):
            batch = new_batch(0, step, SIZE)
            batch["label"] = batch["label"].where(torch.arange(SIZE) < 2, -100)  # most of the replayed rows have none
            batch = rehearsal.augment(batch)
            rehearsal.loss(cross_entropy, model(batch["x"]), batch["label"])
            rehearsal.step()
            told = {name: value for name, value in rehearsal.metrics().items() if name.startswith("loss_")}
            assert all(np.isfinite(value) for value in told.values())
            assert ("loss_replayed" in told) == bool((batch["label"][SIZE:] >= 0).any())


@pytest.mark.parametrize("strategy", ["er", "der++", "x-der"])
def test_a_loop_learns_the_losses_of_new_and_replayed_rows_by_partition(strategy: str) -> None:
    with Rehearsal(section(strategy={"name": strategy}), LocalTransport()) as rehearsal:
        batch, outputs = train(rehearsal, 0, 9)
        outputs = outputs.detach()
        metrics = rehearsal.metrics()
    labels = batch["label"]
    expected = {}
    for kind, part in (("new", slice(SIZE)), ("replayed", slice(SIZE, None))):
        expected[f"loss_{kind}"] = float(cross_entropy(outputs[part], labels[part]))
        for label in sorted(set(labels[part].tolist())):
            rows = labels[part] == label
            expected[f"loss_{kind}/{label}"] = float(cross_entropy(outputs[part][rows], labels[part][rows]))
    found = {name: value for name, value in metrics.items() if name.startswith("loss_")}
    assert found == pytest.approx(expected, rel=1e-5)


def test_between_measurements_the_last_one_stands() -> None:
    with Rehearsal(section(losses_every=4), LocalTransport()) as rehearsal:
        train(rehearsal, 0, 9)
        then = rehearsal.metrics()["loss_new"]
        train(rehearsal, 9, 12)
        assert rehearsal.metrics()["loss_new"] == then
        train(rehearsal, 12, 13)
        assert rehearsal.metrics()["loss_new"] != then


def test_a_loop_that_asks_for_no_loss_is_told() -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        rehearsal.augment(new_batch(0, 0, SIZE))
        with pytest.raises(BatchError, match=r"losses_every.*loss\(criterion"):
            rehearsal.step()
        with pytest.raises(ConfigError, match=r"losses_every.*update\(\) never sees"):
            rehearsal.update(new_batch(0, 0, SIZE))


def hugging(rehearsal: Rehearsal, step: int, divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """A step with a model that computes its own loss, divided by anything; logits, labels, keys, and its outputs."""
    logits, labels = language(step, rows=SIZE)
    keys = torch.arange(SIZE) % 2 + step % 2
    batch = rehearsal.augment({"labels": labels, "noise": logits, "label": keys})
    given = batch["noise"].clone().requires_grad_()
    sums, counts = token_losses(given, batch["labels"])
    outputs = rehearsal.complete({"loss": sums.sum() / (counts.sum() * divisor), "logits": given})
    rehearsal.step()
    return given, batch["labels"], batch["label"], outputs


def test_a_models_own_loss_is_told_apart_by_tokens() -> None:
    with Rehearsal(section(losses_every=1), LocalTransport()) as rehearsal:
        for step in range(8):
            given, labels, keys, outputs = hugging(rehearsal, step)
        metrics = rehearsal.metrics()
    sums, counts = token_losses(given.detach(), labels)
    for kind, part in (("new", slice(SIZE)), ("replayed", slice(SIZE, None))):
        assert metrics[f"loss_{kind}"] == pytest.approx(float(sums[part].sum() / counts[part].sum()), rel=1e-5)
        for key in sorted(set(keys[part][counts[part] > 0].tolist())):
            rows = keys[part] == key
            mean = float(sums[part][rows].sum() / counts[part][rows].sum())
            assert metrics[f"loss_{kind}/{key}"] == pytest.approx(mean, rel=1e-5)
    assert float(outputs["loss"].detach()) == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-5), "as it was"


def test_tokens_are_counted_by_domain() -> None:
    new = dict.fromkeys(range(3), 0)
    with Rehearsal(section(losses_every=0), LocalTransport()) as rehearsal:
        for step in range(6):
            _, labels = language(step, rows=SIZE)
            keys = torch.arange(SIZE) % 2 + step % 2
            for key, row in zip(keys.tolist(), labels, strict=True):
                new[key] += int((row != -100).sum())
            batch = rehearsal.augment({"labels": labels, "label": keys})
            rehearsal.step()
        metrics = rehearsal.metrics()
    assert {key: metrics[f"tokens_new/{key}"] for key in range(3)} == new
    assert metrics["tokens_new"] == sum(new.values())
    assert metrics["tokens_replayed"] == sum(metrics[f"tokens_replayed/{key}"] for key in range(3)) > 0
    assert len(batch["labels"]) == SIZE + WANTED


def test_tokens_are_read_from_the_device_once_for_many_micro_batches() -> None:
    metrics, keys = Metrics(), np.array([0, 1, 0, 7])
    expected = {"tokens_new": 0, "tokens_replayed": 0, "tokens_new/0": 0, "tokens_new/1": 0}
    expected |= {"tokens_replayed/0": 0, "tokens_replayed/7": 0}
    for step in range(MOST_PENDING + 5):
        metrics.count_tokens(torch.tensor([step, 2, 3, 4]), 2, keys)
        expected["tokens_new/0"] += step
        expected["tokens_new/1"] += 2
        expected["tokens_replayed/0"] += 3
        expected["tokens_replayed/7"] += 4
        if step == MOST_PENDING - 2:
            assert metrics.tokens_new == 0
    for name in ("tokens_new", "tokens_replayed"):
        expected[name] = sum(tokens for key, tokens in expected.items() if key.startswith(f"{name}/"))
    assert {name: value for name, value in metrics.flat().items() if name.startswith("tokens")} == expected


# --- importance ------------------------------------------------------------------------------------------------------

WEIGHTS = {"0": 1.0, "1": 1.0, "2": 6.0}


def factors(counts: dict[int, float], keys: list[int]) -> Tensor:
    """w / q by hand."""
    named = [key for key in (0, 1, 2) if counts.get(key)]
    weight, rows = sum(WEIGHTS[str(key)] for key in named), sum(counts[key] for key in named)
    return torch.tensor([WEIGHTS[str(k)] / weight / (counts[k] / rows) if k in named else 1.0 for k in keys])


def counts_of(rehearsal: Rehearsal) -> dict[int, float]:
    metrics = rehearsal.metrics()
    return {key: metrics.get(f"rows_replayed/{key}", 0.0) for key in range(CLASSES)}


def test_rows_of_a_partition_count_by_its_weight_whatever_its_share() -> None:
    keys = section(strategy={"partition_weights": WEIGHTS}, losses_every=0)
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        train(rehearsal, 0, 9)
        batch = rehearsal.augment(new_batch(0, 9, SIZE))
        outputs = Model()(batch["x"]).detach().requires_grad_()
        loss = rehearsal.loss(cross_entropy, outputs, batch["label"])
        factor = factors(counts_of(rehearsal), batch["label"][SIZE:].tolist())
    rows = cross_entropy(outputs, batch["label"], reduction="none")
    expected = (rows[:SIZE].sum() + (factor * rows[SIZE:]).sum()) / len(rows)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(one, outputs, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("divisor", [1.0, 3.7])
def test_a_models_own_loss_is_weighted_whatever_it_was_divided_by(divisor: float) -> None:
    keys = section(strategy={"partition_weights": WEIGHTS}, losses_every=0)
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for step in range(8):
            given, labels, partitions, outputs = hugging(rehearsal, step, divisor)
        factor = factors(counts_of(rehearsal), partitions[SIZE:].tolist())
    sums, counts = token_losses(given, labels)
    expected = (sums[:SIZE].sum() + (factor * sums[SIZE:]).sum()) / (counts.sum() * divisor)
    torch.testing.assert_close(outputs["loss"], expected)
    got, wanted = (torch.autograd.grad(one, given, retain_graph=True)[0] for one in (outputs["loss"], expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_only_replayed_rows_are_differentiated_once_more() -> None:
    keys = section(strategy={"partition_weights": WEIGHTS}, losses_every=1)
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for step in range(8):
            hugging(rehearsal, step)
        logits, labels = language(8, rows=SIZE)
        batch = rehearsal.augment({"labels": labels, "noise": logits, "label": torch.arange(SIZE) % 2})
        given = batch["noise"].clone().requires_grad_()
        outputs = rehearsal.complete({"loss": torch.tensor(1.0), "logits": given})
    (got,) = torch.autograd.grad(outputs["loss"], given)
    assert not got[:SIZE].any()
    assert got[SIZE:].any()


@pytest.mark.parametrize("buffer", [{}, {"policy": "score", "score_by": "loss"}])
def test_weights_for_a_loss_that_the_strategy_has_not_are_refused(buffer: dict[str, str]) -> None:
    keys = section(strategy={"name": "der", "partition_weights": WEIGHTS})
    keys["buffer"] = {**keys["buffer"], **buffer}
    with (
        Rehearsal(keys, LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match="strategy 'der' has none; use another strategy"),
    ):
        train(rehearsal, 0, 1)


@pytest.mark.parametrize("strategy", ["er", "der++", "x-der", "er-ace", "topk"])
def test_weights_and_measurements_change_only_what_replayed_rows_count_for(strategy: str) -> None:
    """With a weight in proportion to the share, every factor is 1, and the loss is that of a job without weights."""
    losses = []
    for weights in (None, {"4": 3.0}):  # one partition alone: its share is 1
        keys = section(strategy={"name": strategy, "k": 3, "partition_weights": weights}, losses_every=3)
        with Rehearsal(keys, LocalTransport()) as rehearsal:
            model, told = Model(), []
            for step in range(8):
                batch = rehearsal.augment(new_batch(0, step, SIZE, label=4))
                told.append(float(rehearsal.loss(cross_entropy, model(batch["x"]), batch["label"]).detach()))
                rehearsal.step()
        losses.append(told)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- the guard -------------------------------------------------------------------------------------------------------


def worse(rehearsal: Rehearsal, first: int, last: int, rank: int = 0, rising: int = 20) -> list[float]:
    """Steps with a loss that rises from step `rising` on, on rank 0 alone; the ratio after each."""
    ratios = []
    for step in range(first, last):
        batch = rehearsal.augment(new_batch(rank, step, SIZE))
        bad = 1.0 + (step >= rising) * (rank == 0) * 0.2 * (step - rising)
        value = torch.tensor(bad, requires_grad=True)
        rehearsal.loss(lambda outputs, value=value: value + 0 * outputs.sum(), batch["x"].float())
        rehearsal.step()
        ratios.append(rehearsal._coordinator.queue.ratio.ratio)
    return ratios


def guarded(**keys: Any) -> dict[str, Any]:
    given = {"window": 4, "bound": 1.3, **keys}
    amount: dict[str, Any] = {"ratio": 0.2, "representatives": None}
    return section(losses_every=1, guard=given, **amount)


def test_a_warning_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(guarded(), LocalTransport()) as rehearsal, caplog.at_level(logging.WARNING, "rehearsal_plugin"):
        worse(rehearsal, 0, 40)
    (line,) = caplog.messages
    assert "the loss on replayed rows is 1." in line
    assert "1.3 times its lowest mean of 1 " in line


def test_a_steady_loss_leaves_all_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(guarded(action="stop"), LocalTransport()) as rehearsal:
        worse(rehearsal, 0, 40, rising=100)
    assert not caplog.messages


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_stays_no_number_is_shown_and_ends_the_job(value: float) -> None:
    def train() -> None:
        for step in range(12):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            rehearsal.loss(lambda outputs: torch.tensor(value), batch["x"])
            rehearsal.step()

    with Rehearsal(guarded(action="stop"), LocalTransport()) as rehearsal:
        with pytest.raises(ForgettingError, match=r"NaN or infinite in each of the last \d+ measurements"):
            train()
        assert str(rehearsal.metrics()["loss_replayed"]) == str(value)


def test_the_ratio_is_raised_step_by_step_up_to_a_bound() -> None:
    with Rehearsal(guarded(action="raise_ratio", factor=2.0, most=0.5), LocalTransport()) as rehearsal:
        ratios = worse(rehearsal, 0, 60)
    assert sorted(set(ratios)) == pytest.approx([0.2, 0.4, 0.5])
    assert ratios == sorted(ratios)


def test_the_job_ends_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with Rehearsal(guarded(action="stop"), LocalTransport()) as rehearsal:
        worse(rehearsal, 0, 10)
        rehearsal.save(tmp_path / "good")
        with pytest.raises(ForgettingError, match=f"from before: {tmp_path / 'good'}"):
            worse(rehearsal, 10, 60)


def on_ranks(folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    with Rehearsal(guarded(action="raise_ratio", factor=2.0, most=0.9)) as whole:
        expected = worse(whole, 0, 40, rank)
    with Rehearsal(guarded(action="raise_ratio", factor=2.0, most=0.9)) as first:
        worse(first, 0, 23, rank)
        first.save(folder)
        dist.barrier()
    with Rehearsal(guarded(action="raise_ratio", factor=2.0, most=0.9)) as second:
        second.load(folder)
        resumed = worse(second, 23, 40, rank)
    with Rehearsal(guarded(action="stop")) as ended:
        try:
            worse(ended, 0, 60, rank)
        except ForgettingError:
            stopped = ended.steps
    return {"ratios": expected, "resumed": resumed == expected[23:], "stopped": stopped}


def test_all_ranks_do_the_same_at_the_same_step_and_after_a_resumption(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, tmp_path, timeout_s=60)
    assert first == second
    assert first["resumed"]
    assert max(first["ratios"]) > 0.2


@pytest.mark.parametrize("every", [2, 4, 5, 50])
def test_measured_steps_of_a_budget_keep_no_rhythm(every: int) -> None:
    """One step of each block, each place in the end: rows that come in a rhythm of their own are met."""
    block = {"ratio": {"budget": 0.1}, "buffer": {"partition_by": "domain"}, "losses_every": every}
    coordinator = SimpleNamespace(step=0)
    monitor = LossMonitor(RehearsalConfig.load(block), coordinator)  # type: ignore[arg-type]
    due = []
    for coordinator.step in range(40 * every):
        due += [coordinator.step] if monitor.due else []
    assert [step // every for step in due] == list(range(40))
    assert len({step % every for step in due}) > min(every, 25) * 0.7
    steady = LossMonitor(RehearsalConfig.load({"losses_every": every}), coordinator)  # type: ignore[arg-type]
    coordinator.step = 3 * every
    assert steady.due
