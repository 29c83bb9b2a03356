"""Launchers: they start a job of `tests.hosts.jobs` on the hosts of a network, and collect its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.launch import free_port
from tests.helpers.paths import ROOT
from tests.hosts.network import Network, address

__all__ = ["Job", "Options", "start_by_deepspeed", "start_by_environment", "start_by_horovodrun", "start_by_torchrun"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A job that was started.

    Attributes:
        out: Folder of its results, logs and signs.
        ranks: Number of ranks.
        processes: The launchers.
    """

    out: Path
    ranks: int
    processes: list[subprocess.Popen[bytes]]

    def results(self, timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """The results of all ranks, by rank.

        Raises:
            AssertionError: A launcher failed, or a rank gave no result in time; the message has what was printed.
        """
        paths = [self.out / f"{rank}.json" for rank in range(self.ranks)]
        deadline = time.monotonic() + timeout_s
        while not all(path.exists() for path in paths):
            failed = [process for process in self.processes if process.poll()]
            assert not failed, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.1)
        return [json.loads(path.read_text()) for path in paths]

    def wait_until_paused(self, timeout_s: float = 120.0) -> None:
        """Wait until all ranks are in mid-training."""
        deadline = time.monotonic() + timeout_s
        while len(list(self.out.glob("paused*"))) < self.ranks:
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def go_on(self) -> None:
        """Let the ranks go on."""
        (self.out / "go").touch()

    def log(self, rank: int) -> list[str]:
        """What the package logged on a rank."""
        return (self.out / f"{rank}.log").read_text().splitlines()

    def printed(self) -> str:
        """The end of what the job printed."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.out.glob("host*.txt")))


def start_by_environment(
    network: Network, out: Path, job: str, options: Options, *, hosts: Sequence[int] | None = None, device: str = "eth0"
) -> Job:
    """Start one rank on each host, with the variables that torchrun sets."""
    hosts, port = list(network.hosts if hosts is None else hosts), free_port()
    master = address(hosts[0]) if device == "eth0" else f"10.78.0.{hosts[0]}"
    processes = []
    for rank, host in enumerate(hosts):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": master,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": device,
        }
        line = [sys.executable, *_arguments(job, out, options)]
        processes.append(network.start(host, line, out / f"host{host}.txt", variables))
    return Job(out, len(hosts), processes)


def start_by_torchrun(
    network: Network, out: Path, job: str, options: Options, *, hosts: Sequence[int] | None = None, ranks: int = 1
) -> Job:
    """Start torchrun on each host, with so many ranks a host."""
    hosts, port = list(network.hosts if hosts is None else hosts), free_port()
    processes = []
    for number, host in enumerate(hosts):
        line = [sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes", str(len(hosts)), "--nproc_per_node", str(ranks), "--node_rank", str(number)]
        line += ["--master_addr", address(hosts[0]), "--master_port", str(port), *_arguments(job, out, options)]
        variables = {"GLOO_SOCKET_IFNAME": "eth0"}
        processes.append(network.start(host, line, out / f"host{host}.txt", variables))
    return Job(out, ranks * len(hosts), processes)


def start_by_deepspeed(network: Network, out: Path, job: str, options: Options) -> Job:
    """Start the `deepspeed` launcher on host 1, with pdsh and a hostfile."""
    hostfile, variables = out / "hostfile", out / "environment"
    hostfile.write_text("".join(f"host{host} slots=1\n" for host in network.hosts))
    names = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}
    variables.write_text("".join(f"{name}={value}\n" for name, value in names.items()))
    line = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile, "--launcher", "pdsh"]
    line += ["--master_addr", address(1), "--master_port", str(free_port()), "--force_multi"]
    line += ["--module", *_arguments(job, out, options)[1:]]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = network.start(1, line, out / "host1.txt", {"DS_ENV_FILE": str(variables), "PATH": path})
    return Job(out, len(network.hosts), [process])


def start_by_horovodrun(network: Network, out: Path, job: str, options: Options) -> Job:
    """Start `horovodrun -H` on host 1; it reaches the others by ssh."""
    hosts = ",".join(f"host{host}:1" for host in network.hosts)
    line = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "--network-interfaces", "eth0"]
    line += ["-np", str(len(network.hosts)), "-H", hosts, sys.executable, *_arguments(job, out, options)]
    return Job(out, len(network.hosts), [network.start(1, line, out / "host1.txt", {"GLOO_SOCKET_IFNAME": "eth0"})])


def _arguments(job: str, out: Path, options: Options) -> list[str]:
    return ["-m", "tests.hosts.jobs", job, str(out), json.dumps(dict(options))]
