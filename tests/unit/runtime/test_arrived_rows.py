"""Rows that arrive are measured in the background: a high limit on their length costs the training thread nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.buffer.rows.cells import Cell
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing
from rehearsal_plugin.runtime.arrived_rows import ArrivedRows
from tests.helpers.ragged_rows import LAYOUT, packed_rows

CPU = torch.device("cpu")
NONE = np.zeros(0, dtype=np.int64)


def prepared(rows: Tensor, layout: RowLayout) -> Arrival:
    plan = Plan(
        NONE, NONE, np.array([len(rows)]), np.array([len(rows)]), np.zeros(len(rows), dtype=np.int64), len(rows)
    )
    return ArrivedRows(CPU).prepare(Arrival(rows, Outgoing(rows[:0], layout, plan, NONE, NONE)))


@pytest.mark.parametrize("lengths", [[3, 9, 1], [0], [24]])
def test_the_longest_row_is_found(lengths: list[int]) -> None:
    rows = packed_rows(lengths)
    arrival = prepared(rows, LAYOUT)
    assert arrival.longest == max(lengths)
    assert torch.equal(arrival.rows, rows)


def test_rows_of_one_length_are_not_looked_at() -> None:
    layout = RowLayout.infer({"x": torch.zeros(2, 3)})
    assert prepared(torch.zeros((2, layout.row_bytes), dtype=torch.uint8), layout).longest is None


def texts(step: int, rows: int = 4) -> dict[str, Tensor]:
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, 40, rows).tolist()
    ids = torch.zeros(rows, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(rng.integers(1, 99, length))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.parametrize("keys", [{}, {"rows_per_sample": 2}, {"ratio_in": "tokens", "representatives": None}])
def test_a_high_limit_changes_no_batch_and_costs_the_training_thread_no_position(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are counted where the training thread pads, and where it looks for the end of rows."""
    counted: list[int] = []
    fill, original = Cell.fill, Padding._lengths

    def counted_fill(cell: Cell, rows: Tensor, start: int, stop: int) -> None:
        counted[-1] += len(rows) * (stop - start)
        fill(cell, rows, start, stop)

    def counted_lengths(padding: Padding, fields: Any, names: Any) -> Tensor:
        counted[-1] += sum(fields[name].shape[:2].numel() for name in names)
        return original(padding, fields, names)

    monkeypatch.setattr(Cell, "fill", counted_fill)
    monkeypatch.setattr(Padding, "_lengths", counted_lengths)
    batches: list[list[dict[str, Tensor]]] = []
    for length in (64, 4096):
        section = {"buffer": {"capacity": 40}, "representatives": 2, "padding": {"length": length}, **keys}
        if section["representatives"] is None:
            section = {name: value for name, value in section.items() if value is not None} | {"ratio": 0.4}
        batches.append([])
        counted.append(0)
        with Rehearsal(section, LocalTransport()) as rehearsal:
            for step in range(30):
                if step == 5:
                    counted[-1] = 0
                batches[-1].append(rehearsal.update(texts(step)))
    for narrow, wide in zip(*batches, strict=True):
        assert all(torch.equal(narrow[name], wide[name]) for name in narrow)
    assert max(len(batch["labels"]) for batch in batches[0]) > 4
    assert counted[0] == counted[1] > 0
