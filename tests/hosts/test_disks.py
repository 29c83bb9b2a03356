"""Hosts with a disk each: jobs that are stopped and resumed on as many ranks, fewer and more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.launch import start_by_torchrun
from tests.hosts.network import Network

BEFORE, STEPS = 12, 8
RESUMED: list[tuple[list[int], int]] = [([1, 2], 2), ([2, 1], 2), ([1, 2], 1), ([1, 2], 3), ([2, 3, 1], 1)]
"""Hosts and ranks on each of a later job; the first has two ranks on hosts 1 and 2."""


def test_a_job_goes_on_from_the_disks_of_its_hosts_on_as_many_ranks_fewer_and_more(
    hosts: Callable[[int], Network], out: Callable[[str], Path], tmp_path: Path
) -> None:
    network, shared = hosts(3), str(tmp_path / "shared")
    folders = {"save": [str(network.local / "checkpoint"), shared]}
    options: dict[str, Any] = {"before": BEFORE, "steps": STEPS}
    first = start_by_torchrun(network, out("first"), "plain", {**options, **folders}, hosts=[1, 2], ranks=2)
    whole = [result[""] for result in first.results()]
    assert sum("does not see the files of rank 0" in line for rank in range(4) for line in first.log(rank)) == 1
    network.end_jobs()
    for number, (on, ranks) in enumerate(RESUMED):
        private = str(network.local / "checkpoint")
        load = {"load": [shared, private], "steps": STEPS}
        later = start_by_torchrun(network, out(f"later{number}"), "plain", load, hosts=on, ranks=ranks)
        for rank, result in enumerate(later.results()):
            assert result["resumed_at"] == BEFORE
            assert result[private] == result[shared], "as from a shared folder"
            assert any(result[shared])
            assert ranks * len(on) != 4 or result[shared] == whole[rank], "bit for bit"
        network.end_jobs()
    assert not list(network.folder.rglob("*.fetched")), "no copy is left"


def test_a_host_that_is_missing_is_said_by_all_ranks_alike(
    hosts: Callable[[int], Network], out: Callable[[str], Path]
) -> None:
    network = hosts(3)
    folder = str(network.local / "checkpoint")
    save = {"before": BEFORE, "steps": 0, "save": [folder]}
    start_by_torchrun(network, out("first"), "plain", save).results()
    network.end_jobs()
    later = start_by_torchrun(network, out("later"), "plain", {"load": [folder], "steps": 1}, hosts=[1, 3])
    first, second = (result["error"] for result in later.results())
    assert first == second
    assert "of step 12, 2 of 3 files are there, and rehearsal-step12-rank1-of-3.safetensors is missing" in first
    assert f"rank 0 on host1 ({folder}) has those of ranks 0; rank 1 on host3 ({folder}) has those of ranks 2" in first


@pytest.mark.parametrize("count", [2, 3])
def test_every_host_gets_rows_of_every_other(
    count: int, hosts: Callable[[int], Network], out: Callable[[str], Path]
) -> None:
    job = start_by_torchrun(hosts(count), out("job"), "plain", {"steps": 30})
    for result in job.results():
        owners = {row // 1_000_000 for rows in result[""] for row in rows}
        assert owners == set(range(count))
        assert [len(rows) for rows in result[""]] == [0, 0] + [6] * 28
        assert result["metrics"]["failures"] == 0


@pytest.mark.parametrize(("scope", "groups"), [("node", [{0, 1}, {0, 1}, {2, 3}, {2, 3}]), (2, [{0, 2}, {1, 3}] * 2)])
def test_ranks_draw_in_groups_of_a_host_or_over_all_hosts(
    scope: str | int, groups: list[set[int]], hosts: Callable[[int], Network], out: Callable[[str], Path]
) -> None:
    job = start_by_torchrun(hosts(2), out("job"), "plain", {"steps": 30, "scope": scope}, ranks=2)
    owners = [{row // 1_000_000 for rows in result[""] for row in rows} for result in job.results()]
    assert owners == groups
