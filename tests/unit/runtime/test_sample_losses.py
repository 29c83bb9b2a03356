"""Losses of rows and documents from the outputs of a model that computes its own loss, fused head or logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ForgettingError
from tests.helpers.fused_outputs import (
    Batch,
    documents,
    fused,
    losses_by_hand,
    rows,
    trained_loss,
    with_logits,
)

NEW, ADDED, STEPS = 4, 2, 8
MakeBatch = Callable[[int], Batch]
MakeOutputs = Callable[[Batch, Tensor], Any]

of_all = pytest.mark.parametrize("make", [rows, documents])
by_all = pytest.mark.parametrize("answer", [fused, with_logits])


def section(**keys: Any) -> dict[str, Any]:
    buffer = {"capacity": 60, "partition_by": "domain", **keys.pop("buffer", {})}
    return {"buffer": buffer, "representatives": ADDED, "exchange": {"timeout_s": 20}, **keys}


def step_of(
    rehearsal: Rehearsal, batch: Batch, answer: MakeOutputs, size: float = 1.0
) -> tuple[Batch, Tensor, Any, Any]:
    """A step; the batch that the model saw, its logits, its outputs as they were, and as the trainer got them."""
    seen = rehearsal.augment(batch)
    logits = (size * seen["noise"]).requires_grad_()
    outputs = answer(seen, logits)
    completed = rehearsal.complete(outputs)
    trained_loss(completed).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    rehearsal.step()
    return seen, logits, outputs, completed


def train(rehearsal: Rehearsal, make: MakeBatch, answer: MakeOutputs) -> tuple[Batch, Tensor, Any, Any]:
    for step in range(STEPS):
        last = step_of(rehearsal, make(step), answer)
    assert len(last[0]["domain"]) == NEW + ADDED
    return last


@of_all
@by_all
def test_losses_are_told_apart_by_sample_and_partition(make: MakeBatch, answer: MakeOutputs) -> None:
    with Rehearsal(section(losses_every=1), LocalTransport()) as rehearsal:
        seen, logits, outputs, completed = train(rehearsal, make, answer)
        measured = {name: value for name, value in rehearsal.metrics().items() if name.startswith("loss_")}
    assert completed is outputs
    sums, counts = losses_by_hand(seen, logits.detach())
    expected = {}
    for kind, part in (("new", slice(NEW)), ("replayed", slice(NEW, None))):
        expected[f"loss_{kind}"] = float(sums[part].sum() / counts[part].sum())
        for key in set(seen["domain"][part].tolist()):
            of_key = seen["domain"][part] == key
            if counts[part][of_key].sum():
                expected[f"loss_{kind}/{key}"] = float(sums[part][of_key].sum() / counts[part][of_key].sum())
    assert measured == pytest.approx(expected, abs=1e-6)


def weighted_by_hand(rehearsal: Rehearsal, seen: Batch, logits: Tensor, weight: float, by_key: Any) -> Tensor:
    """The sum over new samples, and over replayed ones times w / q and the weight, over all tokens."""
    sums, counts = losses_by_hand(seen, logits)
    factors = torch.full((NEW + ADDED,), weight)
    factors[:NEW] = 1
    replayed = {key: rehearsal.metrics().get(f"rows_replayed/{key}", 0) for key in by_key}
    named = [key for key in by_key if replayed[key]]
    for place in range(NEW, NEW + ADDED):
        key = int(seen["domain"][place])
        if key in named:
            share = replayed[key] / sum(replayed[one] for one in named)
            factors[place] *= by_key[key] / sum(by_key[one] for one in named) / share
    return (factors * sums).sum() / counts.sum()


@of_all
@by_all
@pytest.mark.parametrize(("weight", "by_key"), [(0.25, {}), (1.0, {0: 1.0, 1: 5.0, 2: 2.0}), (3.0, {1: 1.0, 2: 7.0})])
def test_replayed_samples_count_by_their_weights(
    make: MakeBatch, answer: MakeOutputs, weight: float, by_key: dict[int, float]
) -> None:
    strategy = {"loss_weight": weight, "partition_weights": by_key or None}
    with Rehearsal(section(strategy=strategy), LocalTransport()) as rehearsal:
        seen, logits, outputs, completed = train(rehearsal, make, answer)
        expected = weighted_by_hand(rehearsal, seen, logits, weight, by_key)
    assert type(completed) is type(outputs)
    torch.testing.assert_close(trained_loss(completed), expected, rtol=0, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(logits.grad, wanted, rtol=0, atol=1e-6)
    others = [name for name in outputs if name not in ("log_probs", "loss")]
    assert all(completed[name] is outputs[name] for name in others), "metrics of the trainer read these"


@of_all
@by_all
def test_the_loss_of_each_sample_is_stored(make: MakeBatch, answer: MakeOutputs) -> None:
    keys = section(buffer={"policy": "score", "score_by": "loss"})
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        train(rehearsal, make, answer)
        for size in (1.0, 2.0, 1.0):
            seen = rehearsal.augment(make(STEPS))
            micro_batch, _ = rehearsal.pending._current()
            prefetcher = rehearsal._coordinator.prefetcher
            assert micro_batch.share is not None
            assert prefetcher is not None
            stored = micro_batch.share.layout.unpack_state(micro_batch.share.rows)[ROW_LOSS]
            logits = seen["noise"].clone().requires_grad_()
            sums, counts = losses_by_hand(seen, logits.detach())
            means = (sums / counts.clamp(min=1))[NEW:]
            torch.testing.assert_close(stored, means, rtol=0, atol=1e-6)
            rehearsal.complete(answer(seen, size * logits))
            rehearsal.drop() if size != 1 else rehearsal.step()


@by_all
def test_a_replayed_documents_present_loss_is_stored_in_place_of_the_old_one(answer: MakeOutputs) -> None:
    keys = section(buffer={"policy": "score", "score_by": "loss"})
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        queued: list[Tensor] = []
        update = rehearsal._coordinator.queue.update_state

        def note(index: Tensor, state: Mapping[str, Tensor]) -> None:
            queued.append(state[ROW_LOSS])
            update(index, state)

        rehearsal._coordinator.queue.update_state = note  # type: ignore[method-assign]
        for step in range(STEPS):
            seen, logits, *_ = step_of(rehearsal, documents(step), answer, size=2.0)
        sums, counts = losses_by_hand(seen, logits.detach())
    torch.testing.assert_close(queued[-1], (sums / counts.clamp(min=1))[NEW:], rtol=0, atol=1e-6)


@of_all
def test_the_guard_watches_fused_losses(make: MakeBatch) -> None:
    def loop(rehearsal: Rehearsal) -> None:
        for step in range(60):
            step_of(rehearsal, make(step), fused, size=1.0 + max(0, step - 20))

    guard = {"window": 4, "bound": 4.0, "action": "stop"}
    with Rehearsal(section(losses_every=1, guard=guard), LocalTransport()) as rehearsal:
        with pytest.raises(ForgettingError, match="the loss on replayed rows"):
            loop(rehearsal)
        assert rehearsal.steps > 20


def test_a_loss_of_a_fused_head_that_is_not_weighted_is_refused() -> None:
    def loop(rehearsal: Rehearsal) -> None:
        for step in range(STEPS):
            seen = rehearsal.augment(rows(step))
            completed: Any = rehearsal.complete(fused(seen, seen["noise"].clone().requires_grad_()))
            completed.loss.backward()
            rehearsal.step()

    with (
        Rehearsal(section(strategy={"loss_weight": 2.0}), LocalTransport()) as rehearsal,
        pytest.raises(BatchError, match=r"leaves out the term of rehearsal\.strategy\.loss_weight.*'log_probs'"),
    ):
        loop(rehearsal)


def test_a_criterion_of_documents_is_refused() -> None:
    with Rehearsal(section(losses_every=1), LocalTransport()) as rehearsal:
        seen = rehearsal.augment(documents(0))
        with pytest.raises(BatchError, match=r"losses_every.* one loss for a flat row of documents.*packing"):
            rehearsal.loss(lambda noise: noise.mean(), seen["noise"])


@pytest.mark.parametrize("virtual", [2, -3])
@by_all
def test_outputs_that_do_not_fit_the_documents_are_refused(answer: MakeOutputs, virtual: int) -> None:
    with Rehearsal(section(losses_every=1), LocalTransport()) as rehearsal:
        seen = dict(rehearsal.augment(documents(0)))
        total = seen["labels"].shape[1] + virtual
        seen["labels"] = seen["labels"].repeat(1, 2)[:, :total]
        logits = torch.randn(1, total, 11)
        mask = seen["labels"][:, 1:] != -100
        outputs: Any = {"loss": logits.sum(), "logits": logits}
        if answer is fused:
            outputs = {"log_probs": logits[:, 1:, 0], "label_mask": mask}
        with pytest.raises(BatchError, match=r"losses of rows cannot be told|for a flat row of 14 tokens"):
            rehearsal.complete(outputs)


def test_log_probs_of_other_rows_are_refused() -> None:
    with Rehearsal(section(losses_every=1), LocalTransport()) as rehearsal:
        rehearsal.augment(rows(0))
        with pytest.raises(BatchError, match=r"'log_probs' has the shape \(3, 4\) and the micro-batch has 4 rows"):
            rehearsal.complete({"log_probs": torch.zeros(3, 4), "label_mask": torch.ones(3, 4).bool()})


def test_labels_that_come_shifted_are_scored_in_place() -> None:
    """As under context parallelism: as many log-probabilities as tokens, the last without a label."""

    def shifted(batch: Batch, logits: Tensor) -> Any:
        outputs = fused(batch, logits)
        wide = {name: torch.nn.functional.pad(outputs[name], (0, 1)) for name in ("log_probs", "label_mask")}
        return {**wide, "loss": outputs["loss"]}

    found = []
    for answer in (fused, shifted):
        with Rehearsal(section(losses_every=1, strategy={"loss_weight": 0.5}), LocalTransport()) as rehearsal:
            for step in range(STEPS):
                seen = rehearsal.augment(documents(step))
                logits = seen["noise"].clone().requires_grad_()
                completed = rehearsal.complete(answer(seen, logits))
                (-completed["log_probs"].sum()).backward()
                rehearsal.step()
            found.append((rehearsal.metrics()["loss_replayed"], logits.grad))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
