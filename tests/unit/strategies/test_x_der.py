"""X-DER: recorded scores are filled in for classes that came later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies import Part, Strategy
from tests.helpers.strategy_parts import CLASSES, entropies, labels, leaf, near, part, scores, squares, strategy

FEW = torch.tensor([0, 1, 0])


def seen(first: Tensor, **keys: float) -> tuple[Strategy, Part]:
    """A strategy that has met the classes 0 and 1, and its three rows as they come back later."""
    built = strategy("x-der", **keys)
    new = part(first, FEW)
    built.loss(new, [])
    return built, replace(new, state={name: tensor.clone() for name, tensor in built.state(new).items()})


def test_x_der_records_the_scores_and_which_classes_were_known() -> None:
    _, row = seen(scores(0, 3))
    assert torch.equal(row.state["scores"], scores(0, 3))
    assert row.state["known"].tolist() == [[True, True, *[False] * (CLASSES - 2)]] * 3


def test_x_der_keeps_what_was_recorded_when_a_class_comes_later() -> None:
    built, new = strategy("x-der"), part(scores(0, 3), FEW)
    built.loss(new, [])
    recorded, saved = built.state(new)["known"], built.state_dict()["known"]
    built.loss(part(scores(1), torch.full((6,), 5)), [])
    assert not recorded[:, 5].any()
    assert not saved[5]


def test_x_der_does_not_know_the_class_of_an_ignored_label() -> None:
    built, new = strategy("x-der"), part(scores(0, 3), torch.tensor([4, -100, 4]))
    built.loss(new, [])
    assert {*built.state(new)["known"].nonzero()[:, 1].tolist()} == {4}


def test_x_der_holds_the_first_draw_to_its_known_classes_and_learns_the_second() -> None:
    built, row = seen(scores(0, 3), alpha=0.3, beta=0.7)
    first, second, new = leaf(scores(1, 3)), scores(2, 3), (scores(3), labels(4))
    draws = [replace(row, outputs=first), replace(row, outputs=second)]
    loss = built.loss(part(*new), draws)
    distance = squares(first[:, :2], row.state["scores"][:, :2])
    assert near(loss, sum(entropies(*new)) / 6 + 0.3 * distance + 0.7 * sum(entropies(second, FEW)) / 3)
    assert not torch.autograd.grad(loss, first)[0][:, 2:].any(), "classes that were unknown are free"


def test_x_der_refresh_fills_in_new_classes_and_keeps_the_known_ones() -> None:
    built, row = seen(scores(0, 3))
    built.loss(part(scores(1), torch.full((6,), 5)), [])
    state = built.refresh(replace(row, outputs=scores(2, 3)))
    assert torch.equal(state["scores"][:, [0, 1, 2, 3, 4, 6]], row.state["scores"][:, [0, 1, 2, 3, 4, 6]])
    assert {*state["known"].nonzero()[:, 1].tolist()} == {0, 1, 5}


@pytest.mark.parametrize("gamma", [0.5, 0.85])
def test_x_der_scales_new_classes_below_gamma_times_the_score_of_the_rows_own(gamma: float) -> None:
    recorded = torch.zeros(3, CLASSES, dtype=torch.float64)
    recorded[torch.arange(3), FEW] = torch.tensor([2.0, 4.0, -1.0], dtype=torch.float64)
    built, row = seen(recorded, gamma=gamma)
    built.loss(part(scores(1), torch.tensor([4, 5, 6, 4, 5, 6])), [])
    present = torch.tensor([[0, 0, 0, 9, 1, 8, 4], [9, 9, 0, 9, 1, 2, 0.5], [0, 0, 0, 0, 1, 2, 3]], dtype=torch.float64)
    filled = built.refresh(replace(row, outputs=present))["scores"][:, 4:]
    torch.testing.assert_close(filled[0], torch.tensor([1, 8, 4], dtype=torch.float64) * 2 * gamma / 8)
    torch.testing.assert_close(filled[1], present[1, 4:], msg="scores below the limit are scaled")
    assert not filled[2].any(), "a negative score of the own class leaves no room above 0"


def test_x_der_refresh_without_new_classes_changes_nothing() -> None:
    built, row = seen(scores(0, 3))
    state = built.refresh(replace(row, outputs=scores(2, 3)))
    assert all(torch.equal(state[name], row.state[name]) for name in ("scores", "known"))


def test_x_der_remembers_known_classes_in_its_state() -> None:
    built, row = seen(scores(0, 3))
    resumed = strategy("x-der")
    resumed.load_state_dict(built.state_dict())
    assert torch.equal(resumed.state(row)["known"], row.state["known"])
    assert strategy("x-der").state_dict() == {}


@pytest.mark.parametrize("known", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.bool)])
def test_x_der_refuses_known_classes_of_another_form(known: Tensor) -> None:
    with pytest.raises(ValueError, match="known classes"):
        strategy("x-der").load_state_dict({"known": known})


@pytest.mark.parametrize("targets", [(), (scores(1),), (labels(1)[:, None],)])
def test_x_der_refuses_targets_that_are_no_class_labels(targets: tuple[Tensor, ...]) -> None:
    with pytest.raises(BatchError, match=r"'x-der' needs int64 class labels \[rows\]"):
        strategy("x-der").loss(part(scores(0), *targets), [])


@pytest.mark.parametrize("outputs", [{"a": scores(0), "b": scores(1)}, scores(0)[:, None]])
def test_x_der_refuses_outputs_that_are_not_one_tensor_of_scores(outputs: object) -> None:
    with pytest.raises(BatchError, match=r"'x-der' needs one output, scores \[rows, classes\]"):
        strategy("x-der").loss(part(outputs, labels(0)), [])


def test_x_der_refuses_outputs_without_labels() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.loss\(criterion, outputs, labels\)"):
        strategy("x-der").state(part(scores(0)))
