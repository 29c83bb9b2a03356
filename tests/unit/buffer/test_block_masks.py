"""Masks of every pair of positions are stored as the documents that they follow from."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.buffer.rows.block_masks import BlockMask, block_mask_of
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError

INDEX = torch.tensor([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1], [1, 2, 3, 0, 0, 0]])


def mask_by_hand(index: Tensor, dtype: torch.dtype, closed: float, *, causal: bool = True) -> Tensor:
    """Pair by pair."""
    rows, length = index.shape
    mask = torch.full((rows, 1, length, length), closed).to(dtype)
    for row in range(rows):
        for here in range(length):
            for there in range(here + 1 if causal else length):
                if index[row, here] == index[row, there] != 0:
                    mask[row, 0, here, there] = dtype == torch.bool
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "closed"),
    [
        (torch.bool, 0.0),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.float32, -1e4),
    ],
)
def test_a_mask_and_its_index_are_made_of_each_other(dtype: torch.dtype, closed: float, causal: bool) -> None:
    mask = mask_by_hand(INDEX, dtype, closed, causal=causal)
    block = block_mask_of(flatten({"attention_mask": mask}))
    assert block is not None
    assert (block.dtype, block.causal) == (dtype, causal)
    index = block.index_of(mask)
    assert index is not None
    assert torch.equal(index, INDEX)
    assert torch.equal(block.mask_of(index), mask)


def test_a_position_that_may_look_nowhere_looks_at_itself_where_all_else_is_minus_infinity() -> None:
    mask = BlockMask("mask", torch.float32, -math.inf, causal=True).mask_of(torch.tensor([[1, 1, 0]]))
    assert torch.softmax(mask, -1).isfinite().all()


def changed(place: tuple[int, ...], value: float) -> Tensor:
    mask = mask_by_hand(INDEX, torch.float32, -1.0)
    mask[place] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(changed((0, 0, 3, 0), 0.0), id="a position that looks at another document"),
        pytest.param(changed((1, 0, 3, 0), -1.0), id="a window"),
        pytest.param(changed((1, 0, 3, 0), -2.0), id="two numbers for what is closed"),
    ],
)
def test_other_masks_are_stored_whole_and_warned_of(mask: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert block_mask_of(flatten({"attention_mask": mask})) is None
    assert "MiB of it are stored with every row" in caplog.text


@pytest.mark.parametrize("leaf", [torch.ones(3, 6), torch.ones(3, 2, 6, 6), torch.ones(3, 1, 1, 6), [1, 2], None])
def test_other_leaves_are_no_such_masks(leaf: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert block_mask_of(flatten({"attention_mask": leaf})) is None
    assert not caplog.records


def packed(step: int, length: int = 6, rows: int = 3) -> dict[str, Tensor]:
    """Rows of documents, the number of the step in their tokens."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.rand(rows, length, generator=generator) < 0.4
    index = begins.cumsum(1) + 1
    index[:, length - 1] = 0
    mask = mask_by_hand(index, torch.float32, torch.finfo(torch.float32).min)
    tokens = torch.where(index > 0, 10 * step + torch.arange(rows).unsqueeze(1) + 1, 0)
    return {"input_ids": tokens, "labels": torch.where(index > 0, tokens, -100), "attention_mask": mask}


@pytest.mark.parametrize(
    ("section", "widths"),
    [
        ({"ratio": 0.4}, [6]),
        ({"ratio": 0.3, "mode": "replace"}, [6]),
        ({"representatives": 2, "padding": {"token_id": 0}}, [6]),
        ({"representatives": 2, "padding": {"token_id": 0}}, [6, 4, 9]),
    ],
)
def test_rows_come_back_with_their_masks(section: dict[str, Any], widths: list[int]) -> None:
    known: dict[int, Tensor] = {}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(12):
            batch = packed(step, widths[step % len(widths)])
            known |= {int(ids[0]): mask for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)}
            seen = rehearsal.update(batch)
            for ids, mask in zip(seen["input_ids"], seen["attention_mask"], strict=True):
                expected = known[int(ids[0])]
                length = min(expected.shape[-1], mask.shape[-1])  # a batch is as wide as its longest row needs
                assert torch.equal(mask[:, :length, :length], expected[:, :length, :length])
                assert (mask[:, length:] != 0).all()
                assert (mask[:, :, length:] != 0).all()
        assert rehearsal.metrics()["rows_replayed"] > 8


def test_a_row_holds_a_number_for_each_position() -> None:
    with Rehearsal({"representatives": 1}, LocalTransport()) as rehearsal:
        for step in range(2):
            rehearsal.update(packed(step, 32))
        assert rehearsal.buffer is not None
        mask = rehearsal.buffer.layout.field("attention_mask")
        assert (mask.shape, mask.dtype) == ((32,), torch.int32)


def test_a_mask_of_another_kind_is_refused_later_by_the_cure() -> None:
    with Rehearsal({"representatives": 1}, LocalTransport()) as rehearsal:
        rehearsal.update(packed(0))
        other = packed(1)
        other["attention_mask"][0, 0, 4, 0] = -5.0
        with pytest.raises(BatchError, match=r"'attention_mask' followed from the documents .*packing to 'rows'"):
            rehearsal.update(other)


def test_masks_stay_whole_where_the_section_says_so() -> None:
    with Rehearsal({"representatives": 1, "packing": "rows"}, LocalTransport()) as rehearsal:
        for step in range(5):
            batch = packed(step)
            batch["attention_mask"][0, 0, 4, 0] = -5.0 - step
            seen = rehearsal.update(batch)
        assert seen["attention_mask"].shape == (4, 1, 6, 6)
