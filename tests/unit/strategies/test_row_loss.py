"""The loss of each row alone, and strategies whose rows carry it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies import Part, RowLoss
from rehearsal_plugin.strategies.row_loss import row_losses
from tests.helpers.strategy_parts import (
    CLASSES,
    ROWS,
    both,
    entropies,
    labels,
    leaf,
    maps,
    part,
    scores,
    squares,
    strategy,
    tokens,
)


def by_token(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), labels.flatten())


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, weight=torch.arange(1, CLASSES + 1, dtype=outputs.dtype))


@pytest.mark.parametrize("criterion", [cross_entropy, weighted])
def test_a_rows_loss_is_that_of_the_row_alone(criterion: Callable[..., Tensor]) -> None:
    outputs, targets = scores(0), labels(1)
    losses = row_losses(part(outputs, targets, criterion=criterion))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), torch.tensor(entropies(outputs, targets)).double())


def test_a_rows_loss_averages_over_its_own_tokens_that_count() -> None:
    outputs, targets = tokens(0), torch.tensor([[3, -100, -100, 5, 0], [-100, -100, -100, -100, 7]])
    by_hand = [entropies(row[wanted >= 0], wanted[wanted >= 0]) for row, wanted in zip(outputs, targets, strict=True)]
    losses = row_losses(part(outputs, targets, criterion=by_token))
    torch.testing.assert_close(losses, torch.tensor([sum(each) / len(each) for each in by_hand]))


def test_a_row_without_a_token_that_counts_has_no_number_as_loss() -> None:
    targets = torch.tensor([[-100] * 5, [1] * 5])
    assert row_losses(part(tokens(0), targets, criterion=by_token)).isnan().tolist() == [True, False]


def test_rows_losses_of_several_outputs_and_targets() -> None:
    outputs, targets = maps(0, 3), maps(4, 3)
    losses = row_losses(part(outputs, *targets, criterion=both))
    by_hand = [sum(squares(a[row], b[row]) for a, b in zip(outputs, targets, strict=True)) for row in range(3)]
    torch.testing.assert_close(losses.double(), torch.tensor(by_hand).double())


def test_a_rows_loss_takes_what_has_no_rows_as_it_is() -> None:
    def criterion(outputs: Mapping[str, Any], target: Tensor, power: float) -> Tensor:
        loss: Tensor = outputs["scale"] * (outputs["scores"][0] - target).abs().mean() ** power * outputs["prior"].sum()
        return loss

    outputs = {"scores": [scores(0)], "scale": torch.tensor(3.0), "prior": torch.ones(5), "name": "text"}
    losses = row_losses(Part(outputs, (scores(1), 2.0), {}, ROWS, criterion))  # type: ignore[arg-type]
    expected = 15 * (scores(0) - scores(1)).abs().mean(1) ** 2
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


def test_rows_losses_have_no_history_and_leave_that_of_the_outputs() -> None:
    outputs = leaf(scores(0))
    assert not row_losses(part(outputs, labels(1))).requires_grad
    cross_entropy(outputs, labels(1)).backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None


def test_no_rows_have_no_losses() -> None:
    assert row_losses(part(scores(0)[:0], labels(1)[:0])).shape == (0,)


def by_mask(outputs: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(outputs[target > 0], target[target > 0])


def by_number(outputs: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = cross_entropy(outputs, target) * target.max().item()
    return loss


@pytest.mark.parametrize("criterion", [by_mask, by_number])
def test_a_criterion_that_cannot_be_mapped_says_how_to_write_it(criterion: Callable[..., Tensor]) -> None:
    with pytest.raises(BatchError, match=r"score_by is 'loss'.*torch\.func\.vmap.*name a batch field"):
        row_losses(part(scores(0), labels(1), criterion=criterion))


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_rows_scored_by_their_loss_carry_it_beside_the_state_of_the_strategy(name: str) -> None:
    inner = strategy(name, k=2)
    built, new = RowLoss(inner), part(scores(0), labels(1))
    state = built.state(new)
    assert state.keys() == inner.state(new).keys() | {ROW_LOSS}
    assert torch.equal(state[ROW_LOSS], row_losses(new))
    assert (built.draws, built.plain, built.records, built.refreshes) == (inner.draws, inner.plain, True, True)


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_a_strategy_does_not_see_that_its_rows_are_scored(name: str) -> None:
    inner = strategy(name, k=2, alpha=0.3, beta=0.7, loss_weight=0.4)
    built, new = RowLoss(inner), part(scores(0), labels(1))
    draws = [
        part(scores(seed, 4), labels(seed, 4), state=built.state(part(scores(seed + 1, 4), labels(seed, 4))))
        for seed in range(2, 2 + inner.draws)
    ]
    bare = [
        part(each.outputs, *each.targets, state=inner.state(part(scores(seed + 1, 4), labels(seed, 4))))
        for seed, each in enumerate(draws, 2)
    ]
    assert torch.equal(built.loss(new, draws), inner.loss(new, bare))


@pytest.mark.parametrize("name", ["er", "der++", "topk"])
def test_a_refresh_brings_the_present_loss_and_leaves_other_state(name: str) -> None:
    built = RowLoss(strategy(name, k=2))
    before = built.state(part(scores(0), labels(1)))
    now = part(scores(5), labels(1), state=before)
    after = built.refresh(now)
    assert after.keys() == before.keys()
    assert torch.equal(after[ROW_LOSS], row_losses(now))
    assert not torch.equal(after[ROW_LOSS], before[ROW_LOSS])
    assert all(torch.equal(after[key], before[key]) for key in before if key != ROW_LOSS)


def test_x_der_refreshes_its_own_state_beside_the_loss() -> None:
    inner = strategy("x-der")
    built, few, many = RowLoss(inner), torch.tensor([0, 1, 0]), torch.arange(CLASSES)
    first = part(scores(0, 3), few)
    built.loss(first, [])
    state = {name: value.clone() for name, value in built.state(first).items()}
    built.loss(part(scores(1, CLASSES), many), [])
    after = built.refresh(part(scores(2, 3), few, state=state))
    assert after["known"].all()
    assert not torch.equal(after["scores"], state["scores"])
    torch.testing.assert_close(after[ROW_LOSS].double(), torch.tensor(entropies(scores(2, 3), few)).double())


def test_rows_scored_by_their_loss_have_the_term_of_their_strategy() -> None:
    given = [part(scores(0), labels(0))]
    assert RowLoss(strategy("er")).regularizer(given) is None
    with pytest.raises(ConfigError, match=r"rehearsal\.loss\(criterion, outputs"):
        RowLoss(strategy("er-ace")).regularizer(given)
