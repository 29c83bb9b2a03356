"""One exchange after the other, alone and by hand: what is posted, drawn, received and sent back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, RehearsalBuffer, RehearsalConfig, RowLayout
from rehearsal_plugin.buffer.rows.fields import ALIGNMENT
from rehearsal_plugin.buffer.rows.staging import BoundedRows
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.distributed.exchange import Exchange
from rehearsal_plugin.distributed.groups import RankGroup
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing, Refresh
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ClosedError, ExchangeTimeout
from tests.helpers.samples import Batch, new_batch

NOTHING = BoundedRows(torch.empty(0, dtype=torch.uint8), np.empty(0, dtype=np.int64))


class Alone:
    """The exchange of one rank with rows in its buffer."""

    def __init__(self, stopped: bool = False, **keys: Any) -> None:
        config = RehearsalConfig.load({"buffer": {"capacity": 50}, "exchange": {"timeout_s": 0.2}, **keys})
        batch = new_batch(0, 0, 20)
        self.buffer = RehearsalBuffer(config.buffer, RowLayout.infer(batch).with_state({"old": torch.zeros(20)}))
        self.admit(batch, step=0)
        self.exchange = Exchange(
            self.buffer,
            RankGroup.of_all(LocalTransport()),
            config,
            rank=0,
            draws=1,
            metrics=Metrics(),
            stopped=lambda: stopped,
        )

    def admit(self, batch: Batch, step: int) -> list[int]:
        """Offer a batch; the slots that it got."""
        columns = self.buffer.layout.columns(batch)
        rows = torch.zeros((len(columns[0]), self.buffer.layout.row_bytes), dtype=torch.uint8)
        self.buffer.layout.pack([*columns, torch.zeros(len(rows))], rows)
        slots = self.buffer.admit(rows, step)
        self.buffer.write(slots, rows)
        return list(slots.tolist())

    def step(self, number: int, request: int, outgoing: Outgoing | None = None) -> tuple[Outgoing, Arrival | None]:
        posted = self.exchange.post(number, Request(request), outgoing, NOTHING)
        return self.exchange.prepare(posted), self.exchange.receive(posted)

    def ids(self, rows: Tensor) -> list[int]:
        return list(self.buffer.layout.unpack(rows)["id"].tolist())


def test_rows_arrive_in_the_exchange_after_the_one_that_asked() -> None:
    alone = Alone()
    outgoing, arrival = alone.step(0, 5)
    assert arrival is None
    assert len(outgoing.rows) == 5
    _, arrival = alone.step(1, 0, outgoing)
    assert arrival is not None
    assert alone.ids(arrival.rows) == alone.ids(outgoing.rows)
    assert len(set(alone.ids(arrival.rows))) == 5


def test_no_rows_asked_for_is_no_exchange_of_rows() -> None:
    alone = Alone()
    outgoing, _ = alone.step(0, 0)
    assert alone.step(1, 0, outgoing)[1] is None


def test_notes_of_all_ranks_are_kept_from_the_last_headers() -> None:
    alone = Alone()
    alone.exchange.prepare(
        alone.exchange.post(0, Request(0), None, NOTHING, notes=Notes(loss_sum=3, losses_measured=2))
    )
    assert alone.exchange.census.notes[0, Word.LOSS_SUM - Word.MIXTURE] == 3
    assert alone.exchange.census.notes[0, Word.LOSSES_MEASURED - Word.MIXTURE] == 2


def test_new_state_reaches_the_rows_that_are_still_there() -> None:
    alone = Alone(buffer={"capacity": 20, "policy": "fifo"})
    outgoing, _ = alone.step(0, 20)
    _, arrival = alone.step(1, 0, outgoing)
    assert arrival is not None
    replaced = alone.admit(new_batch(0, 1, 1), step=1)
    packed = torch.zeros((20, alone.buffer.layout.state_bytes + ALIGNMENT), dtype=torch.uint8)
    alone.buffer.layout.state_of(packed)["old"][:] = 7.0
    packed[:, -1] = 1
    alone.exchange.apply(alone.exchange.post(2, Request(0), None, NOTHING, Refresh(packed, arrival.source)))
    rows = torch.zeros((20, alone.buffer.layout.row_bytes), dtype=torch.uint8)
    alone.buffer.read(np.arange(20), rows)
    wanted = [0.0 if slot in replaced else 7.0 for slot in range(20)]
    assert alone.buffer.layout.unpack_state(rows)["old"].tolist() == wanted


def test_an_outgoing_comes_back_from_its_state() -> None:
    alone = Alone()
    outgoing, _ = alone.step(0, 3)
    state = outgoing.state_dict()
    assert "turns" in state["plan"], "the name in checkpoints"
    loaded = Outgoing.load(state, alone.buffer.layout, torch.device("cpu"))
    assert torch.equal(loaded.rows, outgoing.rows)
    assert np.array_equal(loaded.plan.draw_numbers, outgoing.plan.draw_numbers)


class Never:
    """A collective that no peer takes part in."""

    def done(self, within_s: float = 0.0) -> bool:
        return False

    def result(self) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize(("stopped", "error"), [(False, ExchangeTimeout), (True, ClosedError)])
def test_a_wait_ends_with_an_error_that_names_rank_and_step(stopped: bool, error: type[Exception]) -> None:
    alone = Alone(stopped)
    with pytest.raises(error, match="headers on rank 0 at step 4"):
        alone.exchange._wait(Never(), 4, "headers")
