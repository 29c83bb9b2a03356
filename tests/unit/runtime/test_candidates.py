"""Which rows of a micro-batch are offered. Statistics are tested at the significance of `tests.helpers.chance`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import RehearsalConfig, RowLayout
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.candidates import CandidateSelection, finite_rows
from tests.helpers.chance import SIGNIFICANCE, equally_included

NAN, INF = float("nan"), float("inf")


def choose(batch: dict[str, Tensor], step: int = 0, micro_batch: int = 0, rank: int = 0, **keys: Any) -> Tensor | None:
    layout = RowLayout.infer(batch)
    selection = CandidateSelection(RehearsalConfig.load(keys), rank)
    return selection.choose(layout.columns(batch), layout.fields, step, micro_batch)


def test_all_rows_are_candidates_by_default() -> None:
    assert choose({"x": torch.zeros(6)}) is None


def test_so_many_rows_are_drawn_in_their_order() -> None:
    places = choose({"x": torch.zeros(9)}, candidates=4)
    assert places is not None
    assert len(places) == 4
    assert places.tolist() == sorted(set(places.tolist()))


def test_every_row_is_a_candidate_equally_often() -> None:
    drawn = Counter[int]()
    for step in range(3000):
        places = choose({"x": torch.zeros(9)}, step, candidates=3)
        assert places is not None
        drawn.update(places.tolist())
    assert equally_included([drawn[place] for place in range(9)], 3000, 3) > SIGNIFICANCE


@pytest.mark.parametrize("other", [{"step": 1}, {"micro_batch": 1}, {"rank": 1}], ids=lambda other: next(iter(other)))
def test_other_steps_micro_batches_and_ranks_draw_other_rows(other: dict[str, int]) -> None:
    first, second = (choose({"x": torch.zeros(1000)}, candidates=500, **keys) for keys in ({}, other))
    assert first is not None
    assert second is not None
    assert first.tolist() != second.tolist()


def test_rows_without_finite_numbers_are_skipped() -> None:
    batch = {"x": torch.tensor([[1.0, 2.0], [NAN, 0.0], [0.0, 0.0]]), "y": torch.tensor([0.0, 0.0, INF])}
    places = choose(batch, non_finite="skip")
    assert places is not None
    assert places.tolist() == [0]


def test_rows_without_finite_numbers_are_refused_with_field_rank_and_step() -> None:
    batch = {"x": torch.tensor([1.0, NAN]), "y": torch.zeros(2)}
    with pytest.raises(BatchError, match=r"1 of 2 candidates on rank 3 at step 5 .*\['x'\]; mend"):
        choose(batch, step=5, rank=3, non_finite="refuse")


def test_only_candidates_are_looked_at() -> None:
    batch = {"x": torch.full((8,), NAN)}
    with pytest.raises(BatchError, match="2 of 2 candidates"):
        choose(batch, candidates=2, non_finite="refuse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64])
def test_numbers_of_any_dtype_are_told_from_others(dtype: torch.dtype) -> None:
    assert finite_rows(torch.tensor([1.0, NAN, -1.0]).to(dtype)).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (3, 0), (0,), (0, 4)], ids=str)
def test_there_is_one_answer_a_row(shape: tuple[int, ...]) -> None:
    assert finite_rows(torch.zeros(shape)).tolist() == [True] * shape[0]
