"""How samples lie in a batch: rows, padded rows, rows that belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.batch_form import BatchForm, GroupForm, RowForm
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.config.replay import PaddingConfig
from rehearsal_plugin.core.tree import flatten


def texts(*rows: list[int]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows])}


def padding() -> Padding:
    return Padding(PaddingConfig(length=6, values={"input_ids": 0}))


def test_a_padded_row_is_stored_at_one_length_and_joined_at_that_of_the_longest() -> None:
    form: BatchForm = RowForm(padding())
    layout, samples = form.infer(flatten(texts([1, 2, 3, 4], [5])), None)
    assert layout.pads == {"input_ids": 0}
    assert samples["input_ids"].shape == (2, 6)
    batch, replayed = form.fit(flatten(texts([7], [8, 9])), {"input_ids": samples["input_ids"][:1]})
    joined = form.join(layout, batch, replayed, 1)
    assert joined["input_ids"].tolist() == [[7, 0, 0, 0], [1, 2, 3, 4]]
    assert (form.tokens(batch, 1), form.replayed_tokens(replayed), form.replayed_tokens({})) == (1, 4, 0)
    assert form.sums(batch, batch["input_ids"]).tolist() == [7, 17]  # type: ignore[union-attr]


def test_rows_without_length_count_one_each() -> None:
    form = RowForm(None)
    layout, samples = form.infer(flatten({"x": torch.zeros(3, 2)}), None)
    assert layout.pads == {}
    assert (form.tokens(samples, 2), form.replayed_tokens({"x": torch.zeros(4, 2)})) == (2, 4)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_belong_together_stay_together(padded: bool) -> None:
    form: BatchForm = GroupForm(SampleGroups(2, "halves"), padding() if padded else None)
    batch = flatten(texts([1, 1], [2, 2], [3, 3], [4, 4]))
    layout, samples = form.infer(batch, None)
    replayed = {"input_ids": form.samples(batch, layout)["input_ids"][1:]}
    fitted = form.fit(flatten(texts([5, 5], [6, 6])), replayed)
    joined = form.join(layout, *fitted, 0)
    assert joined["input_ids"].tolist() == [[5, 5], [2, 2], [6, 6], [4, 4]]
    assert form.sums(joined, joined["input_ids"]) is None
    assert len(samples["input_ids"]) == 2


@pytest.mark.parametrize("form", [RowForm(None), GroupForm(SampleGroups(2, "interleaved"), None)])
def test_a_transform_sees_rows(form: Any) -> None:
    layout, samples = form.infer(flatten(texts([1], [2], [3], [4])), None)
    replayed = {"input_ids": samples["input_ids"][1:]}
    as_batch = form.as_batch(layout, replayed)
    assert as_batch["input_ids"].ndim == 2
    assert torch.equal(form.as_samples(as_batch, ["input_ids"])["input_ids"], replayed["input_ids"])
