"""Jobs whose ranks have nothing new to tell: few headers, the same rows whoever posts, and an exact resume."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.header_schedule import LONGEST, STEADY_AFTER
from rehearsal_plugin.distributed.transport import Transport
from tests.helpers.samples import new_batch
from tests.helpers.thread_ranks import ThreadTransport, run_threads

STEPS = 200


def section(**keys: Any) -> dict[str, Any]:
    return {"buffer": {"capacity": 30}, "ratio": 0.25, "exchange": {"timeout_s": 60}, **keys}


def digest_of(batch: Any) -> str:
    parts = [batch[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(batch)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def drive(rehearsal: Rehearsal, rank: int, first: int, stop: int, rows: int = 8) -> list[str]:
    return [digest_of(rehearsal.update(new_batch(rank, step, rows))) for step in range(first, stop)]


def job(transport: Transport, keys: dict[str, Any]) -> tuple[list[str], float]:
    with Rehearsal(section(**keys), transport) as rehearsal:
        batches = drive(rehearsal, transport.rank, 0, STEPS)
        return batches, rehearsal.metrics()["collectives"]


SCOPES = pytest.mark.parametrize("scope", ["global", 2])


def test_headers_are_few_once_buffers_are_full() -> None:
    (_, collectives), *_ = run_threads(job, 4, {})
    headers = collectives - (STEPS - 2)  # rows in every exchange but the first ones
    filling, doubling = 30 // 8 + 1, 6
    assert headers <= filling + STEADY_AFTER + 1 + doubling + (STEPS // LONGEST) + 2


def test_rows_by_partition_have_headers_in_every_exchange() -> None:
    keys = {"buffer": {"capacity": 30, "partition_by": "label"}, "sampling": {"weights": "balanced"}}
    (_, collectives), *_ = run_threads(job, 2, keys)
    assert collectives >= 2 * STEPS - 3


@SCOPES
def test_who_posts_the_exchange_changes_nothing(scope: Any) -> None:
    ranks = run_threads(job, 4, {"sampling": {"scope": scope}})
    inline = run_threads(job, 4, {"sampling": {"scope": scope}, "exchange": {"timeout_s": 60, "launch": "inline"}})
    assert [rank[0] for rank in ranks] == [rank[0] for rank in inline]


def resumed(transport: Transport, folder: Path, scope: Any, at: int) -> bool:
    keys = section(sampling={"scope": scope})
    with Rehearsal(keys, transport) as rehearsal:
        drive(rehearsal, transport.rank, 0, at)
        rehearsal.save(folder)
        straight = drive(rehearsal, transport.rank, at, at + 80)
    with Rehearsal(keys, transport) as rehearsal:
        rehearsal.load(folder)
        return drive(rehearsal, transport.rank, at, at + 80) == straight


@SCOPES
@pytest.mark.parametrize("at", [20, 70])
def test_a_job_resumes_bit_for_bit_between_two_headers(tmp_path: Path, scope: Any, at: int) -> None:
    assert run_threads(resumed, 4, tmp_path, scope, at) == [True] * 4


def with_smaller_batches(transport: Transport) -> tuple[int, int]:
    """Rows seen and replayed rows; batches become smaller in the middle of a time without headers."""
    seen = replayed = 0
    with Rehearsal(section(), transport) as rehearsal:
        for step in range(900):
            rows = 8 if step < 100 else 5
            batch = rehearsal.update(new_batch(transport.rank, step, rows))
            if step >= 3:
                seen, replayed = seen + len(batch["id"]), replayed + len(batch["id"]) - rows
    return seen, replayed


def test_the_ratio_is_met_though_a_change_is_told_late() -> None:
    for seen, replayed in run_threads(with_smaller_batches, 2):
        assert abs(replayed - 0.25 * seen) < 4


def with_batches_at_random(transport: Transport, mode: str) -> tuple[float, float, int]:
    """Rows too many at most, rows too few at the end, and exchanges without headers; batches change at any moment."""
    draw, changes, owed, most = random.Random(transport.rank), [8] * 100, 0.0, 0.0
    for _ in range(8):
        changes += [draw.choice((1, 3, 5, 8, 13))] * draw.choice((1, 2, 30, 100))
    changes = (changes + [8] * 1000)[:1000]
    with Rehearsal(section(mode=mode), transport) as rehearsal:
        for step, rows in enumerate(changes):
            new = new_batch(transport.rank, step, rows)
            seen = rehearsal.update(new)["id"]
            if step >= 3:
                owed += 0.25 * len(seen) - int((~torch.isin(seen, new["id"])).sum())
                most = max(most, -owed)
        return most, owed, int(2 * len(changes) - rehearsal.metrics()["collectives"])


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_the_ratio_is_met_by_the_row_whenever_batches_change(mode: str) -> None:
    for too_many, too_few, quiet in run_threads(with_batches_at_random, 3, mode):
        assert too_many < 1
        assert abs(too_few) <= 2
        assert quiet > 100


def with_few_rows(transport: Transport) -> list[int]:
    """Replayed rows of each step, of 4 that all ranks hold; batches that shrink need no more than these."""
    replayed = []
    with Rehearsal(section(buffer={"capacity": 2}, ratio=0.5), transport) as rehearsal:
        for step in range(200):
            rows = 8 if step < 120 else 3
            replayed.append(len(rehearsal.update(new_batch(transport.rank, step, rows))["id"]) - rows)
    return replayed


def test_rows_promised_and_not_due_are_not_missed_where_buffers_are_tiny() -> None:
    for replayed in run_threads(with_few_rows, 2):
        assert replayed[100:120] == [4] * 20
        assert replayed[124:] == [3] * 76


class NumberedTransport(ThreadTransport):
    """Ranks must issue as many operations, as with Horovod."""

    numbered = True

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.issued, self.groups = 0, list[Any]()

    def all_gather(self, send: torch.Tensor) -> Any:
        self.issued += 1
        return super().all_gather(send)

    def all_to_all(self, *args: Any, **keys: Any) -> Any:
        self.issued += 1
        return super().all_to_all(*args, **keys)

    def split(self, groups: Any) -> ThreadTransport:
        group = super().split(groups)
        self.groups.append(group)
        return group


def operations_of_groups(transport: NumberedTransport) -> list[int]:
    """Operations that a rank has issued after each step; the buffers of group 1 are full later."""
    is_late, issued = transport.rank % 2, []
    keys = section(sampling={"scope": 2}, exchange={"timeout_s": 60, "launch": "inline"})
    with Rehearsal(keys, transport) as rehearsal:
        for step in range(90):
            rehearsal.update(new_batch(transport.rank, step, 1 if is_late else 8))
            issued.append(transport.issued + sum(group.issued for group in transport.groups))
    return issued


def test_ranks_of_all_groups_issue_as_many_operations_where_the_library_numbers_them() -> None:
    ranks = run_threads(operations_of_groups, 4, kind=NumberedTransport)
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
