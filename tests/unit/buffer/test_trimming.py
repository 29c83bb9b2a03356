"""Rows without their padding."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.copies import find_lengths, pad_rows, trim_rows
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.runs import Runs
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer, TrimmedRows
from rehearsal_plugin.checkpoint.layout_json import layout_from_json, layout_to_json
from rehearsal_plugin.core.tree import flatten
from tests.helpers.ragged_rows import LAYOUT, LONGEST, PADS, packed_rows, padded_batch

LENGTHS = [3, 0, LONGEST, 1, 17]


def trimmed(rows: Tensor, layout: RowLayout = LAYOUT) -> TrimmedRows:
    trimmer, places = RowTrimmer(layout), np.arange(len(rows))
    lengths = trimmer.lengths(rows.numpy(), places)
    sizes = trimmer.sizes(lengths)
    packed = np.zeros(int(sizes.sum()), dtype=np.uint8)
    trimmer.trim(rows.numpy(), places, lengths, Runs.packed(packed, sizes))
    return TrimmedRows(trimmer, Runs.packed(packed, sizes), lengths)


def test_a_row_is_as_long_as_what_is_no_padding() -> None:
    assert trimmed(packed_rows(LENGTHS)).lengths.tolist() == LENGTHS


def test_a_padded_row_is_the_one_that_was_trimmed() -> None:
    rows = packed_rows(LENGTHS)
    assert torch.equal(trimmed(rows)[:], rows)


def test_a_trimmed_row_takes_its_own_bytes() -> None:
    fixed = LAYOUT.row_bytes - LONGEST * (4 + 8)
    assert len(trimmed(packed_rows(LENGTHS)).packed()) == len(LENGTHS) * fixed + sum(LENGTHS) * (4 + 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_positions_have_any_dtype_and_shape(dtype: torch.dtype) -> None:
    numbers = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    numbers[1, 5:], numbers[3] = 7, 7
    layout = RowLayout.infer({"numbers": numbers, "mask": torch.ones(4, 9, dtype=torch.bool)})
    layout = dataclasses.replace(layout, pads={"numbers": 7})  # the mask has no padding: it is stored whole
    rows = torch.zeros((4, layout.row_bytes), dtype=torch.uint8)
    layout.pack([numbers, torch.ones(4, 9, dtype=torch.bool)], rows)
    one = trimmed(rows, layout)
    assert one.lengths.tolist() == [9, 5, 9, 0]
    assert torch.equal(one[:], rows)


def test_padding_within_a_row_stays() -> None:
    rows = packed_rows([8])
    LAYOUT.field("tokens").view(rows)[0, 2:4] = 0
    LAYOUT.field("labels").view(rows)[0, :4] = -100
    assert trimmed(rows).lengths.tolist() == [8]
    assert torch.equal(trimmed(rows)[:], rows)


def test_a_last_token_that_is_padding_elsewhere_counts_by_its_label() -> None:
    rows = packed_rows([5])
    LAYOUT.field("labels").view(rows)[0, 6] = 9
    assert trimmed(rows).lengths.tolist() == [7]


def test_recorded_state_is_stored_whole() -> None:
    layout = LAYOUT.with_state({"logits": torch.zeros(1, LONGEST, 2)})
    rows = torch.zeros((1, layout.row_bytes), dtype=torch.uint8)
    rows[:, : LAYOUT.row_bytes] = packed_rows([2])
    layout.field("logits").view(rows)[:] = torch.arange(2 * LONGEST).view(1, LONGEST, 2)
    assert torch.equal(trimmed(rows, layout)[:], rows)


def test_chosen_and_joined_rows_are_those_rows() -> None:
    first, second = packed_rows(LENGTHS), packed_rows([9, 2], seed=1)
    joined = TrimmedRows.joined([trimmed(first), trimmed(second)])
    both = torch.cat((first, second))
    assert joined.shape == both.shape
    assert torch.equal(joined[2:], both[2:])
    index = np.array([6, 0, 0, 4])
    assert torch.equal(joined.select(index)[:], both[index])
    assert torch.equal(joined.select(index).copied()[:], both[index])
    assert torch.equal(joined[torch.tensor([5])], both[5:6])


def test_rows_of_a_file_are_checked() -> None:
    one = trimmed(packed_rows(LENGTHS))
    packed = one.packed()
    assert torch.equal(TrimmedRows.of(LAYOUT, packed, one.lengths)[:], one[:])
    cases: tuple[tuple[Tensor, Any], ...] = (
        (packed[:-1], one.lengths),
        (packed, one.lengths + 1),
        (packed, one.lengths - 1),
        (packed, one.lengths.astype(np.int32)),
        (packed.view(1, -1), one.lengths),
        (packed, np.array([LONGEST + 1, -1, 3, 1, 17])),
    )
    for bad_bytes, bad_lengths in cases:
        with pytest.raises(ValueError, match="rows"):
            TrimmedRows.of(LAYOUT, bad_bytes, bad_lengths)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_rows_of_a_sample_are_trimmed_to_the_longest_of_them(layout: Any) -> None:
    batch = flatten(padded_batch([3, 9, 5, 1, 0, 24]))
    groups = SampleGroups(2, layout)
    rows_layout, samples = groups.infer(batch, None)
    rows_layout = dataclasses.replace(rows_layout, pads=PADS)
    rows = torch.zeros((3, rows_layout.row_bytes), dtype=torch.uint8)
    rows_layout.pack(rows_layout.columns(samples), rows)
    one = trimmed(rows, rows_layout)
    assert one.lengths.tolist() == ([3, 9, 24] if layout == "halves" else [9, 5, 24])
    assert torch.equal(one[:], rows)
    again = layout_from_json(json.loads(json.dumps(layout_to_json(rows_layout))))
    assert torch.equal(TrimmedRows.of(again, one.packed(), one.lengths)[:], rows)


TRIM: dict[str, Any] = {"places": np.array([0, 1]), "lengths": np.array([3, 1]), "to": 64, "starts": np.array([0, 20])}


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (IndexError, {"places": np.array([0, 2])}),
        (IndexError, {"places": np.array([-1, 0])}),
        (ValueError, {"lengths": np.array([3, 7])}),
        (ValueError, {"lengths": np.array([3])}),
        (IndexError, {"lengths": np.array([3, -1])}),
        (IndexError, {"lengths": np.array([3, 1 << 62])}),
        (IndexError, {"starts": np.array([0, 60])}),
        (IndexError, {"starts": np.array([0, -1])}),
        (IndexError, {"to": 20}),
    ],
)
def test_rows_that_do_not_fit_are_not_trimmed(error: type[Exception], change: dict[str, Any]) -> None:
    call = {**TRIM, **change}
    rows, to, which = (
        np.ones((2, 32), dtype=np.uint8),
        np.zeros(call["to"], dtype=np.uint8),
        np.zeros(2, dtype=np.int64),
    )
    pieces = np.array([0, 8]), np.array([4, 0]), np.array([0, 4])
    with pytest.raises(error):
        trim_rows(rows, call["places"], call["lengths"], *pieces, [to], which, call["starts"])
    assert not to.any()


PAD: dict[str, Any] = {
    "source": 64, "starts": np.array([0, 20]), "lengths": np.array([3, 1]), "blank": 32, "bounds": np.array([5, 0])
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (None, {}),
        (IndexError, {"source": 20}),
        (IndexError, {"starts": np.array([-1, 0])}),
        (ValueError, {"lengths": np.array([7, 1])}),
        (ValueError, {"lengths": np.array([7])}),
        (ValueError, {"blank": 31}),
        (ValueError, {"bounds": np.array([7, 0])}),
        (ValueError, {"bounds": np.array([5])}),
    ],
)
def test_rows_that_do_not_fit_are_not_padded(error: type[Exception] | None, change: dict[str, Any]) -> None:
    call = {**PAD, **change}
    source, blank = np.ones(call["source"], dtype=np.uint8), np.full(call["blank"], 9, dtype=np.uint8)
    out, bounds, which = np.zeros((2, 32), dtype=np.uint8), call["bounds"].copy(), np.zeros(2, dtype=np.int64)
    pieces = np.array([0, 8]), np.array([4, 0]), np.array([0, 4])

    def pad() -> None:
        pad_rows([source], which, call["starts"], call["lengths"], *pieces, blank, out, bounds)

    if error is None:
        pad()
        assert out[0].tolist() == [1] * 4 + [0] * 4 + [1] * 12 + [9] * 8 + [0] * 4
        assert out[1].tolist() == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 20
        assert bounds.tolist() == [3, 1]
        return
    with pytest.raises(error):
        pad()
    assert not out.any()
    assert np.array_equal(bounds, call["bounds"])


@pytest.mark.parametrize("bounds", [np.array([9]), np.array([-1]), np.array([3, 3])])
def test_bounds_that_do_not_fit_are_refused(bounds: Any) -> None:
    rows, lengths = np.ones((1, 32), dtype=np.uint8), np.zeros(1, dtype=np.int64)
    with pytest.raises((IndexError, ValueError), match="bounds"):
        find_lengths(rows, np.zeros(1, dtype=np.int64), np.zeros(32, dtype=np.uint8), 0, 4, bounds, lengths)
    assert lengths.tolist() == [0]
