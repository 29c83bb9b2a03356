"""Links between hosts that are slow, lossy, or cut in mid-training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.launch import Job, start_by_environment
from tests.hosts.network import Network

pytestmark = pytest.mark.fault

STEPS, PAUSE_AT = 24, 8
BROKEN_S = 5.0


@pytest.fixture
def network(hosts: Callable[[int], Network]) -> Network:
    """Two hosts."""
    return hosts(2)


# --- slow links ------------------------------------------------------------------------------------------------------


def test_a_delay_is_hidden_behind_the_step(network: Network, out: Callable[[str], Path]) -> None:
    """20 ms each way: the exchange takes at least two of them, and the training thread waits for none of it."""
    options = {"steps": 30, "step_s": 0.3}
    with network.slow_link(delay_ms=20):
        results = start_by_environment(network, out("job"), "ddp", options, device="slow0").results()
    for result in results:
        metrics = result["metrics"]
        assert metrics["exchanged_ms"] > 28 * 40
        assert metrics["waited_ms"] < 0.02 * metrics["exchanged_ms"]
        assert metrics["failures"] == 0


@pytest.mark.parametrize(("kind", "value"), [("mbit", 10.0), ("loss", 0.01), ("delay_ms", 20.0)])
def test_a_slow_or_lossy_link_changes_no_row(
    kind: str, value: float, network: Network, out: Callable[[str], Path]
) -> None:
    expected = start_by_environment(network, out("fast"), "plain", {"steps": STEPS}).results()
    network.end_jobs()
    with network.slow_link(**{kind: value}):
        slow = start_by_environment(network, out("slow"), "plain", {"steps": STEPS}, device="slow0").results()
    assert [result[""] for result in slow] == [result[""] for result in expected]
    assert all(any(result[""]) for result in slow)
    assert all(result["metrics"]["failures"] == 0 for result in slow)


# --- links that are cut ----------------------------------------------------------------------------------------------


def cut_in_training(network: Network, out: Path, job: str, options: dict[str, Any], mended_after_s: float = 0.0) -> Job:
    """Start a job, cut host 2 off in its middle, and connect it again after so many seconds; 0 is never."""
    options = {"steps": STEPS, "pause_at": PAUSE_AT, "before": 0, "ends_together": mended_after_s > 0, **options}
    started = start_by_environment(network, out, job, options)
    started.wait_until_paused()
    network.cut_off(2)
    started.go_on()
    if mended_after_s:
        time.sleep(mended_after_s)
        network.mend(2)
    return started


def test_a_loop_whose_link_is_down_for_a_while_goes_on(network: Network, out: Callable[[str], Path]) -> None:
    job = cut_in_training(network, out("job"), "plain", {"timeout_s": 60}, BROKEN_S)
    for result in job.results():
        assert [len(rows) for rows in result[""]] == [0, 0] + [6] * (STEPS - 2)
        assert result["metrics"]["failures"] == 0


def test_a_loop_whose_link_is_down_for_good_gets_an_error(network: Network, out: Callable[[str], Path]) -> None:
    job = cut_in_training(network, out("job"), "plain", {"timeout_s": 5, "on_failure": "raise"})
    for rank, result in enumerate(job.results()):
        assert result["error"].startswith("ExchangeTimeout: the exchange of")
        assert f"on rank {rank} at step" in result["error"]
        assert "did not end in time" in result["error"]
        assert not [line for line in job.log(rank) if "has not come back" in line], "the error says it"


def test_or_goes_on_with_its_own_rows(network: Network, out: Callable[[str], Path]) -> None:
    job = cut_in_training(network, out("job"), "plain", {"timeout_s": 5, "on_failure": "local"})
    for rank, result in enumerate(job.results()):
        assert len(result[""]) == STEPS
        assert result["metrics"]["failures"] == 1
        assert {row // 1_000_000 for rows in result[""][-3:] for row in rows} == {rank}
        assert sum("goes on with the rows of its own buffer" in line for line in job.log(rank)) == 1


def test_zero_whose_link_is_down_for_a_while_goes_on(network: Network, out: Callable[[str], Path]) -> None:
    options = {"timeout_s": 60, "before": PAUSE_AT}
    for result in cut_in_training(network, out("job"), "zero", options, BROKEN_S).results():
        assert len(result["losses"]) == STEPS
        assert result["torn"] == result["metrics"]["failures"] == 0


@pytest.mark.parametrize("on_failure", ["raise", "local"])
def test_zero_whose_link_is_down_for_good_says_which_rank_and_ends_by_the_timeout_of_the_framework(
    on_failure: str, network: Network, out: Callable[[str], Path]
) -> None:
    options = {"timeout_s": 4, "on_failure": on_failure, "framework_s": 20, "before": PAUSE_AT}
    job = cut_in_training(network, out("job"), "zero", options)
    for rank, result in enumerate(job.results()):
        lines = [line for line in job.log(rank) if "has not come back" in line]
        assert len(lines) >= 2, "again and again"
        for line in lines:
            assert line.startswith(f"rank {rank}: the ")
            assert f"exchange of step {PAUSE_AT - 1}" in line
            assert "no answer from rank 1" in line if rank == 0 else "no answer from the store of the job" in line
        assert "error" in result
        assert "Exchange" not in result["error"], "the framework's own collective gave up"
