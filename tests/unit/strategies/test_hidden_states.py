"""Embeddings out of hidden states: pooling, and models that are watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies.hidden_states import HiddenStates, pooled
from tests.helpers.hidden_model import Model, by_hand, tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_has_no_part_in_an_embedding(pool: Any, side: str) -> None:
    hidden = torch.randn(4, 6, 3)
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in (1, 3, 6, 5)])
    mask = mask.flip(1) if side == "left" else mask
    found = pooled(hidden, mask, pool)
    for row, kept, vector in zip(hidden, mask.bool(), found, strict=True):
        torch.testing.assert_close(vector, row[kept].mean(0) if pool == "mean" else row[kept][-1])
    changed = torch.where(mask.bool()[:, :, None], hidden, torch.full_like(hidden, 1e6))
    assert torch.equal(pooled(changed, mask, "last"), pooled(hidden, mask, "last"))


def test_without_a_mask_all_are_tokens_and_vectors_stay_as_they_are() -> None:
    hidden = torch.randn(4, 6, 3)
    torch.testing.assert_close(pooled(hidden, None, "mean"), hidden.mean(1))
    assert torch.equal(pooled(hidden, None, "last"), hidden[:, -1])
    assert torch.equal(pooled(hidden[:, 0], None, "mean"), hidden[:, 0])
    assert not pooled(hidden, torch.zeros(4, 6), "mean").any()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_what_a_model_makes_of_padding_may_be_no_number(pool: Any) -> None:
    hidden, mask = torch.randn(3, 4, 2), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    expected = pooled(hidden, mask, pool)
    assert torch.equal(pooled(hidden.masked_fill(mask[:, :, None] == 0, torch.nan), mask, pool), expected)


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_an_embedding_has_memory_of_its_own(pool: Any, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape)
    found, expected = pooled(hidden, None, pool), pooled(hidden.clone(), None, pool)
    hidden.zero_()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("hidden", "mask"), [((2, 3, 4, 5), None), ((2, 3, 4), (2, 5))])
def test_shapes_that_do_not_fit_are_refused(hidden: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    with pytest.raises(BatchError, match="rows, tokens"):
        pooled(torch.zeros(hidden), None if mask is None else torch.zeros(mask), "mean")


def test_a_model_that_is_watched_tells_the_embeddings_of_what_it_saw_last() -> None:
    model, listener = Model(), HiddenStates("body")
    with pytest.raises(ConfigError, match="watch"):
        listener.take()
    with pytest.raises(ConfigError, match=r"no module 'spine'.*embed, body, head"):
        HiddenStates("spine").watch(model)
    listener.watch(model)
    model(**tokens(1))
    torch.testing.assert_close(listener.take(), by_hand(model, tokens(1), "mean"))
    assert not listener.take().requires_grad
    listener.close()
    with pytest.raises(ConfigError, match="watch"):
        listener.take()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_is_found_whether_it_is_given_by_name_or_by_place(compiled: bool) -> None:
    model, batch = Model(), tokens(1)
    called: Any = torch.compile(model, backend="eager") if compiled else model
    listener = HiddenStates("_orig_mod.body" if compiled else "body")
    listener.watch(called)
    called(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(listener.take(), by_hand(model, batch, "mean"))
