"""Strategies whose rows carry an embedding: of the forward in which they were new, or of the last replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies import Part, RowEmbedding
from tests.helpers.strategy_parts import ROWS, labels, part, scores, strategy

NAMES = ["er", "der", "der++", "x-der", "er-ace", "topk"]
NAME = "rehearsal.embedding"


def embedding(rows: int) -> Tensor:
    return torch.arange(2.0 * rows).view(rows, 2)


def embedded(name: str, rows: int, *, refresh: bool = True) -> RowEmbedding:
    """A strategy whose model has just seen `rows` rows."""
    return RowEmbedding(strategy(name, k=2, alpha=0.3, beta=0.7), NAME, lambda: embedding(rows), refresh=refresh)


def step(built: RowEmbedding, size: int = 4) -> tuple[Part, list[Part]]:
    """New rows and a part of `size` replayed rows for each draw, after the loss was computed."""
    new = part(scores(0), labels(1))
    built.tensors(scores(9, ROWS + built.draws * size))  # all rows of the forward are looked at first
    built.loss(new, [])
    state = {name: tensor[:size] for name, tensor in built.state(new).items()}
    return new, [part(scores(2 + draw, size), labels(1, size), state=state) for draw in range(built.draws)]


@pytest.mark.parametrize("name", NAMES)
def test_new_rows_carry_the_first_embeddings_beside_the_state_of_the_strategy(name: str) -> None:
    built, inner = embedded(name, ROWS), strategy(name, k=2)
    built.tensors(scores(0))
    new = part(scores(0), labels(1))
    built.loss(new, [])
    inner.loss(new, [])
    state = built.state(new)
    assert state.keys() == inner.state(new).keys() | {NAME}
    assert torch.equal(state[NAME], embedding(ROWS))


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_does_not_see_that_its_rows_are_embedded(name: str) -> None:
    inner = strategy(name, k=2, alpha=0.3, beta=0.7)
    built = embedded(name, ROWS + inner.draws * 4)
    new, draws = step(built)
    inner.loss(new, [])
    bare = [replace(one, state={key: value for key, value in one.state.items() if key != NAME}) for one in draws]
    assert torch.equal(built.loss(new, draws), inner.loss(new, bare))
    assert (built.draws, built.plain, built.relearns) == (inner.draws, inner.plain, inner.relearns)


@pytest.mark.parametrize("name", NAMES)
def test_a_refresh_takes_the_embeddings_of_each_draw_in_turn(name: str) -> None:
    size, draws = 4, strategy(name).draws
    rows = ROWS + draws * size
    built = embedded(name, rows)
    new, replayed = step(built, size)
    built.loss(new, replayed)
    refreshed = [built.refresh(one)[NAME] for one in replayed]
    assert torch.equal(torch.cat(refreshed), embedding(rows)[ROWS:])


def test_without_refresh_a_replayed_row_keeps_its_embedding() -> None:
    built = embedded("er", ROWS + 4, refresh=False)
    new, (row,) = step(built)
    built.loss(new, [row])
    assert torch.equal(built.refresh(row)[NAME], row.state[NAME])
    assert not built.refreshes


def test_embeddings_of_another_forward_are_refused() -> None:
    built = embedded("er", ROWS + 1)
    built.tensors(scores(0))
    with pytest.raises(BatchError, match=rf"those of {ROWS + 1} rows, and the outputs those of {ROWS}"):
        built.state(part(scores(0), labels(1)))


def test_a_plain_strategy_adds_nothing_to_the_loss_of_a_model() -> None:
    assert embedded("er", ROWS).regularizer([]) is None
