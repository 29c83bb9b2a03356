"""Facts about all strategies: their loss before anything is replayed, their names and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.strategies import STRATEGIES
from tests.helpers.strategy_parts import (
    CLASSES,
    labels,
    leaf,
    near,
    part,
    scores,
    strategy,
)


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_before_anything_is_replayed_the_loss_is_the_tasks(name: str) -> None:
    new = scores(0), labels(1)
    assert near(strategy(name, loss_weight=0.3, alpha=2, beta=3).loss(part(*new), []), cross_entropy(*new))


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_where_every_new_row_was_displaced_the_loss_is_that_of_the_replayed(name: str) -> None:
    built = strategy(name, k=CLASSES)
    old = leaf(scores(2))
    replayed = [part(old, labels(3), state=built.state(part(scores(4)))) for _ in range(built.draws)]
    loss = built.loss(part(old[:0], labels(3)[:0]), replayed)
    assert loss.isfinite()
    assert loss > 0
    assert torch.autograd.grad(loss, old)[0].isfinite().all()


def test_an_unknown_strategy_is_refused_with_the_names_of_all_others() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.strategy\.name must .*not 'dar'") as error:
        strategy("dar")
    assert all(name in str(error.value) for name in STRATEGIES)


def test_who_needs_the_losses_apart_refuses_the_models_own() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.loss\(criterion, outputs"):
        strategy("er-ace").regularizer([part(scores(0), labels(0))])


def test_a_weight_of_replayed_rows_is_no_term_beside_the_models_loss() -> None:
    assert strategy("er", loss_weight=0.5).regularizer([part(scores(0), labels(0))]) is None
