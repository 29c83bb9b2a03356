"""Rows packed with fewer positions: widths, layouts, and the same fields as in whole rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rehearsal_plugin import RowLayout
from rehearsal_plugin.buffer.rows.fields import ALIGNMENT
from rehearsal_plugin.buffer.rows.narrowing import cut, narrowed, widened, width_for
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer

LONGEST = 75
STATE = {"old": torch.zeros(1, 3), "scores": torch.zeros(1, LONGEST)}


def layout(samples: int = 1) -> RowLayout:
    """Fields of one and of several bytes a position, before and behind others; state that has positions, too."""
    shape = (1, LONGEST) if samples == 1 else (1, samples, LONGEST)
    fields = {"flags": torch.zeros(shape, dtype=torch.bool), "id": torch.zeros(1, dtype=torch.int16)}
    fields |= {
        "tokens": torch.zeros(shape, dtype=torch.int32),
        "points": torch.zeros((*shape, 3)),
        "end": torch.ones(1),
    }
    pads = {"flags": 1.0, "tokens": 9.0, "points": -1.0}
    return dataclasses.replace(RowLayout.infer(fields), pads=pads, rows_per_sample=samples).with_state(STATE)


def rows_of(stored: RowLayout, used: int, count: int = 4) -> torch.Tensor:
    """Packed rows with random numbers in the first `used` positions of the padded fields, and everywhere else."""
    rows, numbers = torch.zeros((count, stored.row_bytes), dtype=torch.uint8), torch.Generator().manual_seed(used)
    for field in (*stored.fields, *stored.state):
        shape = (count, *field.shape)
        values = torch.randint(0, 2, shape, generator=numbers).to(field.dtype)
        if field.name in stored.pads:
            axis = 1 if stored.rows_per_sample == 1 else 2
            values.narrow(axis, used, LONGEST - used).fill_(stored.pads[field.name])
        field.view(rows).copy_(values)
    return rows


@given(needed=st.integers(0, 1 << 17), longest=st.integers(1, 1 << 17))
def test_a_width_has_room_and_not_much_more(needed: int, longest: int) -> None:
    needed = min(needed, longest)
    width = width_for(needed, longest)
    assert max(1, needed) <= width <= min(longest, needed * 5 / 4 + 2 * ALIGNMENT)
    assert (longest - width) % ALIGNMENT == 0


@given(longest=st.integers(1, 1 << 15), first=st.integers(0, 1 << 15), second=st.integers(0, 1 << 15))
def test_a_longer_row_never_has_a_smaller_width(longest: int, first: int, second: int) -> None:
    shorter, longer = sorted((min(first, longest), min(second, longest)))
    assert width_for(shorter, longest) <= width_for(longer, longest)


def test_there_are_few_widths() -> None:
    assert len({width_for(needed, 1 << 15) for needed in range(1 << 15)}) < 48


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("used", [0, 1, 11, 27, 60])
def test_all_fields_are_those_of_the_whole_rows(samples: int, used: int) -> None:
    stored = layout(samples)
    packed = narrowed(stored, width_for(used, LONGEST))
    rows = rows_of(stored, used)
    cut_rows = cut(rows, stored, packed)
    whole, found = stored.views(rows, used), packed.views(cut_rows, used)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    state = packed.unpack_state(cut_rows)
    assert all(torch.equal(state[name], value) for name, value in stored.unpack_state(rows).items())
    assert packed.state_bytes == stored.state_bytes
    assert all(field.offset % ALIGNMENT == 0 for field in (*packed.fields, *packed.state))


@pytest.mark.parametrize("samples", [1, 2])
def test_narrow_rows_are_padded_as_they_were(samples: int) -> None:
    stored, used = layout(samples), 27
    packed = narrowed(stored, width_for(used, LONGEST))
    rows = rows_of(stored, used)
    found, whole = widened(cut(rows, stored, packed), packed, stored), stored.views(rows)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_trimmed_row_is_the_same_for_all_widths(samples: int) -> None:
    stored, used = layout(samples), 27
    rows = rows_of(stored, used)
    widths = sorted({width_for(needed, LONGEST) for needed in range(used, LONGEST + 1)})
    assert len(widths) > 2
    for width in widths:
        packed = narrowed(stored, width)
        trimmer, whole = RowTrimmer(packed), RowTrimmer(stored)
        lengths = torch.full((len(rows),), used).numpy()
        assert trimmer.sizes(lengths).tolist() == whole.sizes(lengths).tolist()


@pytest.mark.parametrize("width", [LONGEST + ALIGNMENT, LONGEST - 1, 0, -5])
def test_another_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        narrowed(layout(), width)


def test_no_width_is_the_layout_itself() -> None:
    stored: Any = layout()
    assert narrowed(stored, None) is narrowed(stored, LONGEST) is stored
