"""Rows and state on their way: what a checkpoint holds of them, and what comes back."""

from __future__ import annotations

import numpy as np
import torch

from rehearsal_plugin import RowLayout
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing

CPU = torch.device("cpu")
LAYOUT = RowLayout.infer({"x": torch.zeros(1)})


def outgoing() -> Outgoing:
    plan = Plan(np.array([0, 1]), np.array([5, 6]), np.array([1, 1]), np.array([2, 0]), np.array([0, 0]), 4)
    return Outgoing(torch.arange(32, dtype=torch.uint8).view(2, 16), LAYOUT, plan, np.array([5, 9]), np.array([3, 4]))


def test_outgoing_rows_come_back_from_their_state() -> None:
    loaded = Outgoing.load(outgoing().state_dict(), LAYOUT, CPU)
    assert torch.equal(loaded.rows, outgoing().rows)
    assert (loaded.plan.send_counts.tolist(), loaded.plan.recv_counts.tolist()) == ([1, 1], [2, 0])
    assert loaded.plan.moved == 4
    assert (loaded.slots.tolist(), loaded.written.tolist()) == ([5, 9], [3, 4])


def test_a_plan_keeps_the_names_that_checkpoints_have() -> None:
    names = {"partition", "index", "send_counts", "recv_counts", "turns", "moved"}
    assert outgoing().state_dict()["plan"].keys() == names


def test_an_arrival_keeps_its_rows_and_leaves_out_those_that_were_sent() -> None:
    arrival = Arrival(torch.ones(2, 16, dtype=torch.uint8), outgoing())
    loaded = Arrival.load(arrival.state_dict(), LAYOUT, CPU)
    assert torch.equal(loaded.rows, arrival.rows)
    assert loaded.source.rows.shape == (0, 16)
    assert loaded.source.plan.draw_numbers.tolist() == [0, 0]
