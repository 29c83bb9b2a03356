"""Real ranks on gloo that draw in groups: who gets whose rows, an exact resume, and another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from tests.helpers.ranks import run_ranks

SECTION: dict[str, Any] = {
    "buffer": {"capacity": 40},
    "ratio": 0.5,
    "sampling": {"scope": 2},
    "exchange": {"timeout_s": 30},
}


def drive(rehearsal: Rehearsal, first: int, stop: int) -> torch.Tensor:
    """Owner and number of all rows that this rank replays, `[rows, 2]`."""
    rank, found = dist.get_rank(), []
    for step in range(first, stop):
        number = 8 * step + torch.arange(8)
        batch = rehearsal.update({"rank": torch.full((8,), rank), "number": number})
        found.append(torch.stack((batch["rank"][8:], batch["number"][8:]), 1))
    return torch.cat(found)


def groups() -> list[int]:
    with Rehearsal(SECTION) as rehearsal:
        return sorted(set(drive(rehearsal, 0, 30)[:, 0].tolist()))


def test_ranks_get_rows_of_their_group_alone() -> None:
    assert run_ranks(groups, 4) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def resumed(folder: Path) -> bool:
    with Rehearsal(SECTION) as rehearsal:
        drive(rehearsal, 0, 50)
        rehearsal.save(folder)
        straight = drive(rehearsal, 50, 120)
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(folder)
        return torch.equal(drive(rehearsal, 50, 120), straight)


def on_fewer(folder: Path, scope: Any) -> tuple[int, list[int]]:
    with Rehearsal({**SECTION, "sampling": {"scope": scope}}) as rehearsal:
        rehearsal.load(folder)
        found = drive(rehearsal, 50, 90)
        return len(found), sorted(set(found[:, 0].tolist()))


def test_a_job_in_groups_resumes_bit_for_bit_and_on_other_ranks_with_all_rows(tmp_path: Path) -> None:
    assert run_ranks(resumed, 4, tmp_path) == [True] * 4
    for scope in (2, "global"):
        for rows, owners in run_ranks(on_fewer, 2, tmp_path, scope):
            assert rows > 0
            assert owners == [0, 1, 2, 3], "rows of all four ranks were shared out"


def test_another_scope_shares_the_rows_out(tmp_path: Path) -> None:
    assert run_ranks(resumed, 4, tmp_path) == [True] * 4
    for _, owners in run_ranks(on_fewer, 4, tmp_path, "global"):
        assert len(owners) == 4
