"""Columns that are narrower than a row: with padding behind them, they are the columns of its full length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.buffer.rows.cells import blank, copy_cells, pad_behind, width_of
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError
from tests.helpers.ragged_rows import LAYOUT, LONGEST, PADS, padded_batch


def narrowed(batch: dict[str, Tensor], **widths: int) -> dict[str, Tensor]:
    return {**batch, **{name: batch[name][:, :width] for name, width in widths.items()}}


def packed_whole(batch: Any, layout: RowLayout) -> Tensor:
    columns = layout.columns(batch)
    rows = torch.zeros((len(columns[0]), layout.row_bytes), dtype=torch.uint8)
    layout.pack(columns, rows)
    return rows


def packed_narrow(batch: Any, layout: RowLayout, junk: int) -> Tensor:
    """The same where other rows of up to `junk` positions were before."""
    columns = layout.columns(batch, narrow=True)
    rows = torch.zeros((len(columns[0]), layout.row_bytes), dtype=torch.uint8)
    blank(layout.cells, rows)
    for cell in layout.cells:
        if cell.padding is not None:
            cell.field.view(rows)[:, :junk] = 3
    layout.pack(columns, rows)
    pad_behind(layout.cells, columns, rows, junk)
    return rows


@pytest.mark.parametrize("junk", [0, 5, 11, LONGEST])
@pytest.mark.parametrize("widths", [(9, 9), (9, 6), (LONGEST, LONGEST), (0, 0)])
def test_narrow_columns_with_padding_behind_are_whole_ones(widths: tuple[int, int], junk: int) -> None:
    batch = padded_batch([min(5, widths[1]), 0, min(4, widths[1])])
    narrow = narrowed(batch, tokens=widths[0], labels=widths[1])
    assert width_of(LAYOUT.cells, LAYOUT.columns(narrow, narrow=True)) == max(widths)
    assert torch.equal(packed_narrow(narrow, LAYOUT, junk), packed_whole(batch, LAYOUT))


@pytest.mark.parametrize("order", ["halves", "interleaved"])
def test_each_row_of_a_sample_has_its_own_cells(order: Any) -> None:
    batch, groups = padded_batch([3, 7, 5, 1, 0, 2]), SampleGroups(2, order)
    layout, samples = groups.infer(flatten(batch), None)
    layout = dataclasses.replace(layout, pads=PADS)
    narrow = groups.grouped(flatten(narrowed(batch, tokens=8, labels=8)), layout.names)
    assert torch.equal(packed_narrow(narrow, layout, 12), packed_whole(samples, layout))


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.uint16])
def test_padding_has_the_bits_of_its_value(dtype: torch.dtype, value: float) -> None:
    if not dtype.is_floating_point:
        value = float(int(value))
    whole = functional.pad(torch.ones(2, 3, 2), (0, 0, 0, 6), value=value).to(dtype)
    layout = dataclasses.replace(RowLayout.infer({"x": whole}), pads={"x": value})
    assert torch.equal(packed_narrow({"x": whole[:, :3]}, layout, 5), packed_whole({"x": whole}, layout))


def test_samples_can_be_chosen_of_narrow_columns() -> None:
    batch, index = padded_batch([3, 7, 5]), torch.tensor([2, 0])
    columns = LAYOUT.columns(narrowed(batch, tokens=7, labels=7), narrow=True)
    rows = torch.zeros((2, LAYOUT.row_bytes), dtype=torch.uint8)
    blank(LAYOUT.cells, rows)
    LAYOUT.pack(columns, rows, index)
    assert torch.equal(rows, packed_whole(batch, LAYOUT)[index])


def test_only_padded_fields_may_be_narrow_and_only_where_that_is_asked_for() -> None:
    batch = padded_batch([3, 7])
    with pytest.raises(BatchError, match="'tokens' must have shape"):
        LAYOUT.columns(narrowed(batch, tokens=7, labels=7))
    for wrong in ({"tokens": torch.zeros(2, LONGEST + 1, dtype=torch.int32)}, {"labels": torch.zeros(2, 3, 1)}):
        with pytest.raises(BatchError, match=r"'(tokens|labels)'"):
            LAYOUT.columns({**batch, **wrong}, narrow=True)
    plain = dataclasses.replace(LAYOUT, pads={"tokens": 0.0})
    with pytest.raises(BatchError, match="'labels' must have shape"):
        plain.columns(narrowed(batch, tokens=7, labels=7), narrow=True)


@pytest.mark.parametrize("index", [None, [2, 0, 2]])
def test_copies_on_a_device_are_those_in_host_memory(index: list[int] | None) -> None:
    """Called here with memory of the host."""
    columns = LAYOUT.columns(narrowed(padded_batch([3, 7, 0]), tokens=9, labels=7), narrow=True)
    places = None if index is None else torch.tensor(index)
    rows = [torch.full((3, LAYOUT.row_bytes), 9, dtype=torch.uint8) for _ in range(2)]
    LAYOUT.pack(columns, rows[0], places)
    copy_cells(LAYOUT.cells, [cell.of(columns) for cell in LAYOUT.cells], rows[1], places)
    assert torch.equal(*rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_a_device_are_padded_there() -> None:
    batch = padded_batch([3, 7, 0])
    narrow = {name: field.cuda() for name, field in narrowed(batch, tokens=7, labels=7).items()}
    columns = LAYOUT.columns(narrow, narrow=True)
    rows = torch.full((3, LAYOUT.row_bytes), 9, dtype=torch.uint8, device="cuda")
    whole = packed_whole(batch, LAYOUT)
    for cell in LAYOUT.cells:
        cell.field.view(rows).fill_(1)
    LAYOUT.pack(columns, rows)
    pad_behind(LAYOUT.cells, columns, rows, LONGEST)
    for field in LAYOUT.fields:
        assert torch.equal(field.view(rows).cpu(), field.view(whole))
