"""Distillation from the k most likely classes, against the full distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies.topk import distillation_loss
from tests.helpers.replay_jobs import SIZE, owners, ranks, section, train
from tests.helpers.samples import new_batch, rank_of
from tests.helpers.strategy_parts import entropies, labels, leaf, log_softmax, part, scores, strategy, tokens


def full_distillation(logits: Tensor, recorded: Tensor) -> Tensor:
    return -(recorded.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def test_topk_with_all_classes_is_full_distillation() -> None:
    logits, recorded = leaf(tokens(0)), tokens(1)
    state = strategy("topk", k=11).state(part(recorded))
    loss, full = distillation_loss(logits, state["values"], state["ids"]), full_distillation(logits, recorded)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, full)))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_topk_counts_all_other_classes_as_one(k: int) -> None:
    logits, recorded = leaf(tokens(0)), tokens(1)
    state = strategy("topk", k=k).state(part(recorded))
    total = 0.0
    for now, then in zip(logits.view(-1, 11).tolist(), recorded.view(-1, 11).tolist(), strict=True):
        kept = sorted(range(11), key=lambda c, then=then: -then[c])[:k]  # type: ignore[misc]
        p, q = ([2.718281828459045**value for value in log_softmax(row)] for row in (then, now))
        rest = (1 - sum(p[c] for c in kept), 1 - sum(q[c] for c in kept))
        pairs = [*((p[c], q[c]) for c in kept), rest]
        total -= sum(a * float(torch.tensor(b, dtype=torch.float64).log()) for a, b in pairs)
    loss = distillation_loss(logits, state["values"], state["ids"])
    torch.testing.assert_close(loss.double(), torch.tensor(total / 10).double(), rtol=1e-5, atol=1e-6)
    reference = leaf(logits.detach().double())
    exact = distillation_loss_by_masks(reference, recorded.double(), k)
    gradients = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(exact, reference)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-6)


def distillation_loss_by_masks(logits: Tensor, recorded: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(recorded, dtype=torch.bool).scatter(-1, recorded.topk(k).indices, True)
    p, q = recorded.softmax(-1), logits.softmax(-1)
    rest = (p * ~kept).sum(-1) * (q * ~kept).sum(-1).log()
    return -((p * q.log() * kept).sum(-1) + rest).mean()


def test_topk_is_least_where_nothing_has_changed() -> None:
    recorded = tokens(1)
    state = strategy("topk", k=4).state(part(recorded))
    unchanged = leaf(recorded)
    loss = distillation_loss(unchanged, state["values"], state["ids"])
    assert torch.autograd.grad(loss, unchanged)[0].abs().max() < 1e-6
    assert all(distillation_loss(tokens(seed), state["values"], state["ids"]) > loss for seed in range(2, 12))


EXTREME = {
    "high": torch.full((1, 2, 5), 1e4),
    "low": torch.full((1, 2, 5), -1e4),
    "one-hot": torch.eye(5)[:2][None] * 1e4,
    "split": torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0]).expand(1, 2, 5),
}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("now", EXTREME)
@pytest.mark.parametrize("then", EXTREME)
def test_topk_stays_finite_for_extreme_logits(now: str, then: str, k: int) -> None:
    logits = leaf(EXTREME[now])
    state = strategy("topk", k=k).state(part(EXTREME[then]))
    loss = distillation_loss(logits, state["values"], state["ids"])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_records_float32_values_and_int32_ids(dtype: torch.dtype) -> None:
    recorded = tokens(1).to(dtype)
    outputs = {"loss": torch.tensor(1.0), "hidden": torch.ones(2, 5, 4), "logits": recorded}
    state = strategy("topk", k=3).state(part(outputs))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "values": (torch.float32, (2, 5, 3)),
        "ids": (torch.int32, (2, 5, 3)),
    }
    torch.testing.assert_close(state["values"], recorded.float().log_softmax(-1).gather(-1, state["ids"].long()))


def test_topk_is_the_mean_loss_over_all_rows_and_the_distillation_of_replayed_ones() -> None:
    built = strategy("topk", k=3, alpha=0.25)
    new, old, recorded = (scores(0, 5), labels(1, 5)), (scores(2, 3), labels(3, 3)), scores(4, 3)
    loss = built.loss(part(*new), [part(*old, state=built.state(part(recorded)))])
    kept = distillation_loss_by_masks(old[0], recorded, 3)
    assert torch.isclose(loss, sum(entropies(*new) + entropies(*old)) / 8 + 0.25 * kept, rtol=1e-5)


@pytest.mark.parametrize("logits", [torch.ones(4, 5), torch.ones(6)])
def test_topk_refuses_outputs_without_enough_classes(logits: Tensor) -> None:
    with pytest.raises(BatchError, match=r"at least 6 classes \(rehearsal.strategy.k\)"):
        strategy("topk", k=6).state(part(logits))


def test_topk_values_and_ids_come_back_as_they_were_recorded() -> None:
    found = train(name="topk", strategy={"k": 2})
    states = [(ids, state) for draws in found.draws for ids, state in draws]
    assert states
    for ids, state in states:
        given = torch.stack([found.given[row] for row in ids]).log_softmax(-1).topk(2)
        assert state["values"].dtype == torch.float32
        assert state["ids"].dtype == torch.int32
        assert torch.equal(state["values"], given.values)
        assert torch.equal(state["ids"], given.indices.int())


def test_topk_travels_between_ranks_bit_for_bit() -> None:
    given = owners([rank["topk"] for rank in ranks()])
    foreign = 0
    for number, rank in enumerate(ranks()):
        for ids, state in (draw for draws in rank["topk"].draws for draw in draws):
            expected = torch.stack([given[row] for row in ids]).log_softmax(-1).topk(2)
            assert state["values"].dtype == torch.float32
            assert state["ids"].dtype == torch.int32
            assert torch.equal(state["values"], expected.values)
            assert torch.equal(state["ids"], expected.indices.int())
            foreign += sum(rank_of(row) != number for row in ids)
    assert foreign


def test_topk_refuses_positions_that_changed() -> None:
    def loss(outputs: Tensor) -> Tensor:
        return outputs.mean()

    with Rehearsal(section("topk", strategy={"k": 2}), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            rehearsal.loss(loss, torch.zeros(len(batch["id"]), 3, 5))
            rehearsal.step()
        batch = rehearsal.augment(new_batch(0, 5, SIZE))
        with pytest.raises(BatchError, match="shape"):
            rehearsal.loss(loss, torch.zeros(len(batch["id"]), 4, 5))
