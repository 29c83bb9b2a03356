"""DER: the loss of new rows and the distance to recorded outputs, recomputed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies import Part
from rehearsal_plugin.strategies.base import distance
from tests.helpers.strategy_parts import (
    CLASSES,
    ROWS,
    entropies,
    labels,
    leaf,
    near,
    part,
    scores,
    squares,
    strategy,
)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_der_is_the_tasks_loss_on_new_rows_and_the_distance_on_replayed_ones(alpha: float) -> None:
    new, old, recorded = (leaf(scores(0)), labels(1)), leaf(scores(2, 4)), scores(3, 4)
    loss = strategy("der", alpha=alpha).loss(part(*new), [part(old, labels(4, 4), state={"output": recorded})])
    assert near(loss, sum(entropies(*new)) / ROWS + alpha * squares(old, recorded))
    fresh, replayed = torch.autograd.grad(loss, (new[0], old))
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[new[1]]
    torch.testing.assert_close(fresh, (new[0].detach().softmax(1) - one_hot) / ROWS)
    torch.testing.assert_close(replayed, alpha * 2 * (old.detach() - recorded) / old.numel(), rtol=1e-5, atol=1e-6)


def test_outputs_chooses_by_name_what_is_recorded_and_compared() -> None:
    built = strategy("der", alpha=1, outputs=["heads.1"])
    old, recorded = ({"heads": [scores(i), scores(i + 1)], "prior": [torch.ones(3)]} for i in (0, 5))
    state = built.state(part(recorded))
    assert list(state) == ["heads.1"]
    assert torch.equal(state["heads.1"], recorded["heads"][1])
    dark = built.regularizer([Part(old, (), state, ROWS, cross_entropy)])
    assert dark is not None
    assert near(dark, squares(old["heads"][1], recorded["heads"][1]))


def test_half_precision_outputs_are_recorded_as_they_are_and_compared_in_float() -> None:
    built = strategy("der", alpha=1)
    old, recorded = scores(0).bfloat16(), scores(1).bfloat16()
    state = built.state(part(recorded))
    assert state["output"].dtype == torch.bfloat16
    dark = built.regularizer([Part(old, (), state, ROWS, cross_entropy)])
    assert dark is not None
    assert dark.dtype == torch.float32
    assert near(dark, squares(old, recorded))


@pytest.mark.parametrize("now", [{"other": scores(0)}, {"output": scores(0, ROWS, 1)}, {"output": scores(0, ROWS, 9)}])
def test_outputs_of_another_name_or_shape_than_recorded_are_refused(now: dict[str, Tensor]) -> None:
    with pytest.raises(BatchError, match=r"'output'.*recorded"):
        distance(now, {"output": scores(1)})


def test_outputs_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(BatchError, match=r"\['a', 'b'\].*names \['c'\]"):
        strategy("der", outputs=["a", "c"]).state(part({"a": scores(0), "b": scores(1)}))


def test_a_model_without_tensors_is_refused() -> None:
    with pytest.raises(BatchError, match="nothing to replay"):
        strategy("der").state(part({"loss": torch.tensor(1.0)}))
