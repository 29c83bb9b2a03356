"""Parts in which nothing counts are left out of the loss; whatever else is no number is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.strategies import Part
from rehearsal_plugin.strategies.counted_loss import add_loss, counted_loss, mean_over_rows
from tests.helpers.strategy_parts import labels, leaf, near, part, scores, strategy

NAN = float("nan")


def ignored(rows: int = 3) -> Tensor:
    return torch.full((rows,), -100)


def by_mask(outputs: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    return (mask * (outputs - wanted).square().mean(1)).sum() / mask.sum()


def by_hand(outputs: Tensor, wanted: Tensor) -> Tensor:
    """As many a script has it."""
    counted = wanted >= 0
    return (cross_entropy(outputs, wanted, reduction="none") * counted).sum() / counted.sum()


def of_next(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The loss of a causal model: the first label is nobody's."""
    return cross_entropy(outputs[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())


def weights(of_two: float) -> Tensor:
    """One for each class."""
    return torch.tensor([1.0, 1, of_two, 1, 1, 1, 1]).double()


def only_ignored(outputs: Tensor, wanted: Tensor) -> Tensor:
    if bool((wanted >= 0).any()):
        raise ValueError("a label")
    return cross_entropy(outputs, wanted)


def of_arrays(outputs: Tensor, wanted: Any) -> Tensor:
    return cross_entropy(outputs, torch.as_tensor(wanted))


# --- left out --------------------------------------------------------------------------------------------------------

VOID = {
    "labels of -100": part(leaf(scores(0, 3)), ignored()),
    "a mask of zeros": part(leaf(scores(0, 3)), scores(1, 3), torch.zeros(3), criterion=by_mask),
    "a mask of whole zeros": part(leaf(scores(0, 3)), scores(1, 3), torch.zeros(3).long(), criterion=by_mask),
    "labels and a mask": part(leaf(scores(0, 3)), ignored(), criterion=by_hand),
    "labels in an array": Part(leaf(scores(0, 3)), [np.full(3, -100)], {}, 3, of_arrays),  # type: ignore[list-item]
    "labels of 255": part(
        leaf(scores(0, 3)), torch.full((3,), 255), criterion=lambda o, t: cross_entropy(o, t, ignore_index=255)
    ),
    "labels of 0": part(
        leaf(scores(0, 3)), torch.zeros(3).long(), criterion=lambda o, t: cross_entropy(o, t, ignore_index=0)
    ),
    "labels of 1": part(
        leaf(scores(0, 3)), torch.ones(3).long(), criterion=lambda o, t: cross_entropy(o, t, ignore_index=1)
    ),
    "labels beside a mask of ones": part(
        leaf(scores(0, 3)),
        ignored(),
        torch.ones(3),
        criterion=lambda o, t, m: cross_entropy(o, t, reduction="sum") / (m * (t >= 0)).sum(),
    ),
    "one row": part(leaf(scores(0, 1)), ignored(1)),
    "labels of words that follow": part(
        leaf(scores(0, 6).reshape(2, 3, 7)), torch.full((2, 3), -100), criterion=of_next
    ),
    "a class of weight 0": part(
        leaf(scores(0, 3)), torch.full((3,), 2), criterion=lambda o, t: cross_entropy(o, t, weights(0.0))
    ),
    "logits of words that are left out": part(
        leaf(scores(0, 3).masked_fill(torch.arange(7) > 4, -torch.inf)), ignored()
    ),
}


@pytest.mark.parametrize("name", VOID)
@pytest.mark.parametrize("place", [0, 1])
def test_a_part_in_which_nothing_counts_is_left_out_of_loss_and_gradient(name: str, place: int) -> None:
    void, other = VOID[name], part(leaf(scores(5, 4)), labels(5, 4))
    parts = [(other, 0.5), (void, 1.0)] if place else [(void, 1.0), (other, 0.5)]
    for loss in (mean_over_rows(parts), add_loss(0.5 * other.loss(), 2.0, void)):
        assert loss is not None
        assert near(loss, 0.5 * other.loss())
        given = torch.autograd.grad(loss, [one.outputs for one, _ in parts], allow_unused=True)
        assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in given)


def test_where_nothing_counts_at_all_there_is_no_loss() -> None:
    void = VOID["labels of -100"]
    assert mean_over_rows([(void, 1.0), (void, 0.5)]).isnan()
    assert counted_loss(void) is None
    assert add_loss(None, 1.0, void) is None


@pytest.mark.parametrize("name", ["er", "er-ace", "der", "der++", "topk"])
def test_every_strategy_leaves_out_new_rows_in_which_nothing_counts(name: str) -> None:
    one = strategy(name, **({"k": 2} if name == "topk" else {}))
    old = part(leaf(scores(1, 3)), labels(1, 3))
    state = one.state(replace(old, outputs=scores(2, 3))) if one.records else {}
    loss = one.loss(part(leaf(scores(0, 3)), ignored()), [replace(old, state=state)] * one.draws)
    assert loss.isfinite()
    assert bool(torch.autograd.grad(loss, old.outputs)[0].isfinite().all())


# --- seen ------------------------------------------------------------------------------------------------------------


def raised(values: Tensor, place: Any, value: float) -> Tensor:
    values = values.clone()
    values[place] = value
    return values


BROKEN: dict[str, Part] = {
    "a criterion that is broken": part(scores(0, 3), labels(0, 3), criterion=lambda *_: torch.tensor(NAN)),
    "no target": part(scores(0, 3), criterion=lambda outputs: outputs.sum() * NAN),
    "a label that nobody predicts": part(
        leaf(scores(0, 6).reshape(2, 3, 7)), torch.tensor([[4, -100, -100]] * 2), criterion=of_next
    ),
    "classes of weight 0": part(
        leaf(scores(0, 3)), labels(0, 3), criterion=lambda o, t: cross_entropy(o, t, torch.zeros(7).double())
    ),
    "a temperature of the criterion": part(
        leaf(scores(0, 3)), torch.full((3,), 2), criterion=lambda o, t: cross_entropy(o * NAN, t)
    ),
    "a temperature, and one row": part(
        leaf(scores(0, 1)), torch.full((1,), 2), criterion=lambda o, t: cross_entropy(o * NAN, t)
    ),
    "the weight of a class": part(
        leaf(scores(0, 3)), torch.full((3,), 2), criterion=lambda o, t: cross_entropy(o, t, weights(NAN))
    ),
    "a criterion that takes these labels alone": part(leaf(scores(0, 3)), ignored(), criterion=only_ignored),
    "a criterion for one class": part(
        leaf(scores(0, 3)[:, :1]), torch.zeros(3).long(), criterion=lambda o, t: cross_entropy(o * NAN, t)
    ),
    "outputs": part(scores(0, 3) * NAN, labels(0, 3)),
    "outputs of one class": part(scores(0, 3) * NAN, torch.full((3,), 2)),
    "one row": part(scores(0, 1) * NAN, labels(0, 1)),
    "logits that overflow": part(scores(0, 3) + torch.inf, torch.full((3,), 2)),
    "complex outputs": part(
        torch.complex(scores(0, 3), scores(1, 3)) * NAN,
        torch.ones(3),
        criterion=lambda o, t: (o.abs().mean(1) * t).mean(),
    ),
    "missing values": part(scores(0, 3), raised(scores(1, 3), (1, 2), NAN), criterion=mse_loss),
    "missing values beside a mask": part(
        scores(0, 3), raised(scores(1, 3), (1, 2), NAN), torch.ones(3), criterion=by_mask
    ),
    "missing values in an array": Part(
        scores(0, 3),
        [np.full((3, 7), NAN)],  # type: ignore[list-item]
        {},
        3,
        lambda outputs, wanted: mse_loss(outputs, torch.as_tensor(wanted)),
    ),
    "a criterion that has no number here": part(
        scores(0, 3).abs() * torch.tensor([0.0, 1, 1, 1, 1, 1, 1]),
        torch.ones(3),
        criterion=lambda o, t: (o * o.log()).mean(),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_loss_that_is_no_number_for_another_reason_is_seen(name: str) -> None:
    broken, other = BROKEN[name], part(scores(5, 4), labels(5, 4))
    for parts in ([(other, 0.5), (broken, 1.0)], [(broken, 1.0), (other, 0.5)]):
        assert mean_over_rows(parts).isnan()
    total = add_loss(torch.tensor(2.0), 0.5, broken)
    assert total is not None
    assert total.isnan()


@pytest.mark.parametrize("weights", [None, {"0": 1.0, "1": 2.0}])
@pytest.mark.parametrize("broken", ["model", "new rows", "an old class"])
def test_what_diverges_shows_in_the_weighted_loss(weights: dict[str, float] | None, broken: str) -> None:
    section = {
        "buffer": {"capacity": 50, "partition_by": "label"},
        "representatives": 4,
        "strategy": {"name": "er", "loss_weight": 0.5, "partition_weights": weights},
    }
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5)
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(9):
            last = step == 8
            batch = {"x": torch.randn(4, 3), "label": torch.arange(4) % 2 + 2 * (step > 3)}
            if last and broken == "model":
                torch.nn.init.constant_(model.weight, NAN)
            elif last and broken == "new rows":
                batch["x"] *= NAN
            seen = rehearsal.augment(batch)
            outputs: Tensor = model(seen["x"])
            if last and broken == "an old class":
                outputs = torch.where((seen["label"] == 0)[:, None], outputs + torch.inf, outputs)
            loss = rehearsal.loss(cross_entropy, outputs, seen["label"])
            assert bool(loss.isnan()) == (last and (broken != "an old class" or bool((seen["label"] == 0).any())))
            rehearsal.step()
    assert loss.isnan()


def counted_calls() -> tuple[Callable[..., Tensor], list[int]]:
    calls: list[int] = []

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        return cross_entropy(outputs, targets)

    return criterion, calls


def test_a_number_is_not_asked_for_twice() -> None:
    criterion, calls = counted_calls()
    mean_over_rows([(part(scores(0, 3), labels(0, 3), criterion=criterion), 1.0)])
    assert calls == [3]
