"""Ranks that die, dawdle, leave or fail: the others end with rank, step and cause, or go on; no row is lost."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.change_tracking import TrackedStorage
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport import TorchDistributedTransport
from rehearsal_plugin.distributed.transport.base import Pending
from tests.helpers.exits import run_exits
from tests.helpers.faults import SIZE, WANTED, Make, connect, report, reported, section, train, variant_of
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, rank_of, step_of

pytestmark = pytest.mark.fault

STEPS, FATAL = 14, 6
Record = Callable[[str, object], None]


def exchange(launch: str, on_failure: str, timeout_s: float) -> dict[str, Any]:
    return {"launch": launch, "on_failure": on_failure, "timeout_s": timeout_s}


# --- a rank that is killed -------------------------------------------------------------------------------------------

MOMENTS = ("headers", "rows", "between")
KILLED = list(itertools.product(MOMENTS, ("thread", "inline"), ("raise", "local")))


class Dying(TorchDistributedTransport):
    """Kills its process in the middle of an exchange: as soon as it has issued the rows, or the headers."""

    def __init__(self, group: Any, moment: str, timeout_s: float) -> None:
        super().__init__(group, timeout_s=timeout_s)
        self._moment, self._step = moment, 0

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        pending = super().all_to_all(send, send_counts, recv, recv_counts, channel=channel)
        if (self._moment, self._step) == ("rows", FATAL):
            os.kill(os.getpid(), signal.SIGKILL)
        return pending

    def all_gather(self, send: Tensor) -> Pending:
        pending = super().all_gather(send)
        if (self._moment, self._step) == ("headers", FATAL):
            os.kill(os.getpid(), signal.SIGKILL)
        self._step += 1
        return pending


def lose_a_rank(_: int) -> None:
    (moment, launch, on_failure), group = variant_of(KILLED)
    rank = dist.get_rank(group)
    dying = rank == 1 and moment != "between"
    transport = connect(group, functools.partial(Dying, moment=moment) if dying else TorchDistributedTransport)
    rehearsal = Rehearsal(section(exchange=exchange(launch, on_failure, 3)), transport)
    report(train(rehearsal, rank, range(STEPS), until_killed(moment)))


def until_killed(moment: str) -> Make:
    def make(rank: int, step: int, size: int) -> Batch:
        if (rank, step, moment) == (1, FATAL, "between"):
            os.kill(os.getpid(), signal.SIGKILL)
        return new_batch(rank, step, size)

    return make


@functools.cache
def killed() -> list[dict[str, Any]]:
    return run_exits([lose_a_rank], size=2 * len(KILLED))[lose_a_rank.__name__]


@pytest.mark.parametrize(("moment", "launch", "on_failure"), KILLED)
def test_a_rank_that_is_killed_leaves_the_other_with_an_error_or_its_own_rows(
    moment: str, launch: str, on_failure: str, record_property: Record
) -> None:
    number = 2 * KILLED.index((moment, launch, on_failure))
    survivor, victim = killed()[number : number + 2]
    assert victim["code"] == -signal.SIGKILL, victim["stderr"]
    assert survivor["code"] == 0, survivor["stderr"]
    outcome = reported(survivor)
    record_property("rows_lost", len(outcome["lost"]))
    assert outcome["lost"] == []
    assert outcome["intact"]
    warnings = [line for line in survivor["stderr"].splitlines() if "goes on with the rows of its own" in line]
    if on_failure == "raise":
        failed_at_the_fatal_step(outcome)
        assert not warnings
    else:
        assert re.search(GONE, *warnings), "said once, with the cause"
        goes_on_alone(outcome, rank=0)


GONE = r"the exchange of (headers|rows) on rank \d at step (\d+) (failed: .*by peer|did not end in time)"


def failed_at_the_fatal_step(outcome: dict[str, Any]) -> None:
    failure = re.match(f"Exchange(?:Error|Timeout): {GONE}", outcome["error"])
    assert failure, outcome["error"]
    assert int(failure[2]) == len(outcome["ids"]) - 1
    assert outcome["again"] == [outcome["error"]] * 2, "it stays failed"
    assert abs(len(outcome["ids"]) - 1 - FATAL) <= 1, "what was sent last arrives, or is lost with the connection"


def goes_on_alone(outcome: dict[str, Any], rank: int) -> None:
    assert outcome["error"] == ""
    assert outcome["metrics"]["failures"] == 1
    assert [len(ids) for ids in outcome["ids"][-3:]] == [SIZE + WANTED] * 3
    assert {rank_of(id) for ids in outcome["ids"][-3:] for id in ids} == {rank}


# --- a rank that leaves ----------------------------------------------------------------------------------------------

LEFT = list(itertools.product(("thread", "inline"), ("raise", "local")))


def leave_early() -> dict[str, Any]:
    (launch, on_failure), group = variant_of(LEFT, 3)
    rank = dist.get_rank(group)
    rehearsal = Rehearsal(section(exchange=exchange(launch, on_failure, 3)), connect(group))
    return train(rehearsal, rank, range(FATAL if rank == 1 else STEPS))


@functools.cache
def left() -> list[dict[str, Any]]:
    return run_ranks(leave_early, 3 * len(LEFT), timeout_s=60)


@pytest.mark.parametrize(("launch", "on_failure"), LEFT)
def test_the_middle_one_of_three_ranks_that_ends_its_data_leaves_both_others_with_an_error_or_their_own_rows(
    launch: str, on_failure: str, record_property: Record
) -> None:
    number = 3 * LEFT.index((launch, on_failure))
    first, middle, last = left()[number : number + 3]
    lost = first["lost"] + middle["lost"] + last["lost"]
    record_property("rows_lost", len(lost))
    assert lost == []
    assert middle["error"] == "", "it has done nothing wrong"
    assert len(middle["ids"]) == FATAL
    for rank, outcome in ((0, first), (2, last)):
        assert outcome["intact"]
        if on_failure == "raise":
            failed_at_the_fatal_step(outcome)
            assert f"on rank {rank} " in outcome["error"]
        else:
            assert len(outcome["ids"]) == STEPS
            goes_on_alone(outcome, rank)


# --- a rank that is slow ---------------------------------------------------------------------------------------------


def dawdle(slow: bool, launch: str) -> dict[str, Any]:
    """Rank 1 does ten times the work of rank 0 in each step, or as much."""
    rank, done = dist.get_rank(), 0
    matrix = torch.eye(192)

    def work(rank: int, step: int, size: int) -> Batch:
        nonlocal done
        for _ in range(10 if slow and rank == 1 else 1):
            torch.mm(matrix, matrix)
            done += 1
        return new_batch(rank, step, size)

    outcome = train(Rehearsal(section(exchange=exchange(launch, "raise", 20))), rank, range(40), work)
    return {**outcome, "done": done}


def dawdle_and_not() -> dict[str, Any]:
    return {f"{launch} {slow}": dawdle(slow, launch) for launch in ("thread", "inline") for slow in (False, True)}


@functools.cache
def dawdled() -> list[dict[str, Any]]:
    return run_ranks(dawdle_and_not, 2, timeout_s=60)


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_a_rank_that_is_ten_times_slower_changes_nothing(launch: str, record_property: Record) -> None:
    lost = [row for outcome in dawdled() for row in outcome[f"{launch} True"]["lost"]]
    record_property("rows_lost", len(lost))
    assert lost == []
    assert [outcome[f"{launch} True"]["done"] for outcome in dawdled()] == [40, 400]
    for outcome in dawdled():
        fast, slow = outcome[f"{launch} False"], outcome[f"{launch} True"]
        assert slow["error"] == ""
        assert slow["intact"]
        assert slow["ids"] == fast["ids"], "the same draws"
        assert slow["metrics"]["collectives"] == fast["metrics"]["collectives"] == 2 * 40 - 1


# --- a rank whose background fails -----------------------------------------------------------------------------------

ERRORS: dict[str, BaseException] = {
    "OSError": OSError(errno.EIO, "Input/output error"),
    "MemoryError": MemoryError("no room for the rows"),
    "TimeoutError": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),  # of a disk far away
}
BROKEN = [
    *((kind, "thread", "raise") for kind in ERRORS),
    ("OSError", "inline", "local"),
    ("TimeoutError", "inline", "local"),
]


class Broken(TrackedStorage):
    """Cannot be written to any more."""

    def __init__(self, buffer: RehearsalBuffer, error: BaseException) -> None:
        super().__init__(buffer._storage, buffer.capacity)
        self._error = error

    def write(
        self, slots: IntArray, rows: Tensor, places: IntArray | None = None, bounds: IntArray | None = None
    ) -> None:
        raise self._error


def break_the_background() -> dict[str, Any]:
    (kind, launch, on_failure), group = variant_of(BROKEN)
    rehearsal = Rehearsal(section(exchange=exchange(launch, on_failure, 1)), connect(group))

    def make(rank: int, step: int, size: int) -> Batch:
        if (rank, step) == (1, FATAL):
            rehearsal.commit()  # what was offered before is written
            assert rehearsal.buffer is not None
            rehearsal.buffer._storage = Broken(rehearsal.buffer, ERRORS[kind])
        return new_batch(rank, step, size)

    return train(rehearsal, dist.get_rank(group), range(STEPS), make)


@functools.cache
def broken() -> list[dict[str, Any]]:
    return run_ranks(break_the_background, 2 * len(BROKEN), timeout_s=60)


@pytest.mark.parametrize(("kind", "launch", "on_failure"), BROKEN)
def test_a_rank_whose_background_fails_says_so_again_and_again_and_the_other_hears_of_it_in_time(
    kind: str, launch: str, on_failure: str, record_property: Record
) -> None:
    number = 2 * BROKEN.index((kind, launch, on_failure))
    other, failed = broken()[number : number + 2]
    unreported = [row for row in other["lost"] + failed["lost"] if step_of(row) != FATAL]
    record_property("rows_lost", len(unreported))
    assert unreported == []
    assert failed["error"].startswith(f"RehearsalError: the background job on rank 1 at step {FATAL} failed: {kind}: ")
    assert str(ERRORS[kind]) in failed["error"]
    assert failed["again"] == [failed["error"]] * 2
    assert len(failed["ids"]) == FATAL + 1
    if on_failure == "raise":
        assert re.match(f"Exchange(Error|Timeout): {GONE}", other["error"]), other["error"]
    else:
        goes_on_alone(other, rank=0)
