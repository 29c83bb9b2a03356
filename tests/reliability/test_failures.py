"""Failures that a job survives where its section says so: of an exchange, of a forward, and data that is no number."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ExchangeError
from tests.helpers.exits import run_exits
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, ids_of, intact, new_batch, rank_of

pytestmark = pytest.mark.fault

SIZE, WANTED, STEPS = 8, 6, 14
LOCAL: dict[str, Any] = {
    "buffer": {"capacity": 64},
    "representatives": WANTED,
    "exchange": {"on_failure": "local", "timeout_s": 1.0},
}


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# --- exchange.on_failure: local --------------------------------------------------------------------------------------


def left_alone(launch: str) -> dict[str, Any]:
    """Rank 1 ends its data early; what rank 0 sees then, and says."""
    rank, log = dist.get_rank(), Log()
    logging.getLogger("rehearsal_plugin").addHandler(log)
    exchange = {**LOCAL["exchange"], "launch": launch}
    with Rehearsal({**LOCAL, "exchange": exchange}) as rehearsal:
        batches = [rehearsal.update(new_batch(rank, step, SIZE)) for step in range(STEPS if rank == 0 else 6)]
        dist.barrier()  # rank 1 is there, and silent
        return {
            "intact": all(map(intact, batches)),
            "owners": [{rank_of(id) for id in ids_of(batch, SIZE)} for batch in batches],
            "sizes": [len(batch["id"]) for batch in batches],
            "log": log.lines,
            "metrics": rehearsal.metrics(),
        }


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_a_rank_whose_peer_is_silent_goes_on_with_its_own_rows_and_says_so_once(launch: str) -> None:
    alone, _ = run_ranks(left_alone, 2, launch, timeout_s=60)
    assert alone["intact"]
    assert {0, 1} in alone["owners"], "before, rows came from both"
    assert alone["owners"][-3:] == [{0}] * 3
    assert alone["sizes"][-3:] == [SIZE + WANTED] * 3
    (line,) = alone["log"]
    assert "rank 0 goes on with the rows of its own buffer" in line
    assert "did not end in time" in line
    assert alone["metrics"]["failures"] == 1


def survive_a_killed_peer(rank: int) -> None:
    rehearsal = Rehearsal(LOCAL)
    for step in range(STEPS):
        if rank == 1 and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = rehearsal.update(new_batch(rank, step, SIZE))
    print(f"rank {rank} replayed {len(ids_of(batch, SIZE))} of its own", flush=True)
    rehearsal.close()


def test_a_rank_whose_peer_was_killed_trains_on() -> None:
    ends = run_exits([survive_a_killed_peer])["survive_a_killed_peer"]
    assert ends[0]["code"] == 0, ends[0]["stderr"]
    assert f"rank 0 replayed {WANTED} of its own" in ends[0]["stderr"]
    assert ends[1]["code"] == -signal.SIGKILL


def test_without_being_told_to_a_failed_exchange_is_an_error() -> None:
    assert Rehearsal({"exchange": {}}).config.exchange.on_failure == "raise"


class Failing(LocalTransport):
    """Refuses from the fifth exchange on."""

    calls = 0

    def all_gather(self, send: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls > 4:
            raise ExchangeError("the network is gone")
        return super().all_gather(send)


def test_the_rows_of_a_rank_that_went_on_alone_can_be_taken_over(tmp_path: Path) -> None:
    with Rehearsal(LOCAL, Failing()) as rehearsal:
        for step in range(STEPS):
            rehearsal.update(new_batch(0, step, SIZE))
        rehearsal.save(tmp_path)
        kept = rehearsal.metrics()["rows_stored"]
    with Rehearsal(LOCAL, LocalTransport()) as restored:
        restored.load(tmp_path)
        assert restored.buffer is not None
        assert len(restored.buffer) == kept == 64
        batches = [restored.update(new_batch(0, step, SIZE)) for step in range(STEPS, STEPS + 5)]
    assert all(map(intact, batches))
    assert len(batches[-1]["id"]) == SIZE + WANTED


# --- candidates that are no numbers ----------------------------------------------------------------------------------


def spoilt(step: int) -> Batch:
    batch = new_batch(0, step, SIZE)
    batch["x"][2, 1] = float("nan")
    batch["half"][5] = float("inf")
    return batch


def stored(setting: str) -> list[int]:
    """Places in their batch of the rows that a buffer with room for all has stored."""
    section = {"buffer": {"capacity": 100}, "ratio": 0.0, "non_finite": setting}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        rehearsal.update(spoilt(0))
        rehearsal.update(new_batch(0, 1, SIZE))
        rehearsal.commit()
        assert rehearsal.buffer is not None
        return sorted(rehearsal.buffer.sample(100)["id"].tolist())


def test_rows_with_nan_are_kept_unless_told_otherwise() -> None:
    assert stored("keep") == [*range(8), *range(100, 108)]


def test_rows_with_nan_can_be_left_out_of_the_buffer() -> None:
    assert stored("skip") == [0, 1, 3, 4, 6, 7, *range(100, 108)]


def test_the_model_sees_skipped_rows_all_the_same() -> None:
    with Rehearsal({"non_finite": "skip"}, LocalTransport()) as rehearsal:
        assert rehearsal.update(spoilt(0))["x"].isnan().sum() == 1


def test_rows_with_nan_can_be_refused() -> None:
    words = r"2 of 8 candidates on rank 0 at step 0 hold NaN or infinity in \['x', 'half'\]"
    with pytest.raises(BatchError, match=words):
        stored("refuse")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2fnuz])
def test_rows_with_nan_in_eight_bits_can_be_left_out(dtype: torch.dtype) -> None:
    rows = torch.ones(4, 2)
    rows[1, 0] = float("nan")
    with Rehearsal({"ratio": 0.0, "non_finite": "skip"}, LocalTransport()) as rehearsal:
        rehearsal.update({"x": rows.to(dtype)})
        assert rehearsal.metrics()["rows_offered"] == 3


def test_candidates_are_drawn_before_rows_are_left_out() -> None:
    section = {"buffer": {"capacity": 100}, "ratio": 0.0, "candidates": 4}
    kept = []
    for setting in ("keep", "skip"):
        with Rehearsal({**section, "non_finite": setting}, LocalTransport()) as rehearsal:
            for step in range(10):
                rehearsal.update(spoilt(step))
            rehearsal.commit()
            assert rehearsal.buffer is not None
            kept.append(set(rehearsal.buffer.sample(100)["id"].tolist()))
    assert kept[1] == {id for id in kept[0] if id % 100 not in (2, 5)}
    assert len(kept[1]) < len(kept[0]) == 40
