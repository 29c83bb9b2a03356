"""The launchers that people use on several hosts, which log in to them by ssh."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.witness import owner
from tests.hosts.launch import start_by_deepspeed, start_by_horovodrun
from tests.hosts.network import Network

BEFORE, STEPS = 8, 8


@pytest.fixture
def with_ssh(hosts: Callable[[int], Network]) -> Callable[[int], Network]:
    """Makes a network whose hosts log in to each other."""
    missing = [tool for tool in ("/usr/sbin/sshd", "ssh", "pdsh") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the launchers need {', '.join(missing)}: apt-get install openssh-server openssh-client pdsh")

    def make(count: int) -> Network:
        network = hosts(count)
        network.start_ssh()
        return network

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_the_deepspeed_launcher_with_pdsh_and_a_hostfile(
    count: int, with_ssh: Callable[[int], Network], out: Callable[[str], Path]
) -> None:
    """ZeRO-1, saved with `use_node_local_storage` and resumed without a tag, though `latest` is on host 1 alone."""
    network = with_ssh(count)
    options = {"before": BEFORE, "steps": STEPS, "save": str(network.local / "checkpoint")}
    results = start_by_deepspeed(network, out("job"), "zero", options).results(timeout_s=200)
    assert [result["latest"] for result in results] == [True] + [False] * (count - 1)
    for result in results:
        assert result["again"] == result["losses"], "bit for bit"
        assert result["torn"] == 0
        assert {owner(uid) for rows in result["seen"] for uid in rows} == set(range(count))


def test_horovodrun_with_hosts(with_ssh: Callable[[int], Network], out: Callable[[str], Path]) -> None:
    pytest.importorskip("horovod.torch")
    network = with_ssh(2)
    options = {"before": BEFORE, "steps": STEPS, "save": str(network.local / "checkpoint")}
    for result in start_by_horovodrun(network, out("job"), "horovod", options).results(timeout_s=200):
        assert result["whole"] == result["resumed"], "bit for bit"
        assert {row // 1_000_000 for rows in result["whole"] for row in rows} == {0, 1}
