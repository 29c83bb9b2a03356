"""Hosts on one machine: network namespaces on a switch, each with an address, a name and a disk of its own.

    host1 10.77.0.1 --+
    host2 10.77.0.2 --+-- switch       eth0 on each host
    host3 10.77.0.3 --+
    host1 10.78.0.1 ---- relay ---- 10.78.0.2 host2       slow0, with delay, loss and rate

Every host sees its own disk at `<folder>/local`, and all of them the rest of the file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.paths import ROOT

__all__ = ["Network", "refusal"]

ENTER = """
host=$0; folder=$1; shift
hostname "host$host"
mount --bind "$folder/disk$host" "$folder/local"
mount --bind "$folder/hosts" /etc/hosts
[ -f /etc/ssh/ssh_config ] && [ -f "$folder/ssh_config" ] && mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
exec "$@"
"""

SSH_CONFIG = """Host *
  IdentityFile {key}
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def refusal() -> str | None:
    """Why this machine cannot make hosts; None where it can."""
    if os.geteuid() != 0:
        return "hosts need root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"hosts need {' and '.join(missing)}, as in the packages iproute2 and util-linux"
    name = f"rp{os.getpid()}try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this machine allows no network namespaces"
    _ip("netns", "del", name)
    if subprocess.run(["unshare", "-u", "-m", "true"], capture_output=True, check=False).returncode:
        return "this machine allows no mount namespaces"
    return None


class Network:
    """Some hosts; leaving the context ends all that runs on them.

    Args:
        folder: Folder for their disks and files.
        count: Number of hosts, from 1.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.hosts, self.local = folder, range(1, count + 1), folder / "local"
        self._name = f"rp{os.getpid()}"
        self._switch = f"{self._name}sw"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._relay: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Network:
        _ip("netns", "add", self._switch)
        self._on_switch("link", "add", "br0", "type", "bridge")
        self._on_switch("link", "set", "br0", "up")
        self.local.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address(host)} host{host}" for host in self.hosts)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for host in self.hosts:
            self._add_host(host)
        return self

    def __exit__(self, *_: object) -> None:
        self.end_jobs()
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in (*map(self._space, self.hosts), self._switch):
            for pid in _ip("netns", "pids", name).split():  # what ssh started
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)

    def end_jobs(self) -> None:
        """Kill all that was started."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def start(
        self, host: int, command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; what it prints goes to `log`."""
        inside = ["ip", "netns", "exec", self._space(host), "unshare", "-u", "-m", "bash", "-c", ENTER]
        line = [*inside, str(host), str(self.folder), *map(str, command)]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        variables |= environment or {}
        with log.open("ab") as file:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables, cwd=ROOT
            )
        self._processes.append(process)
        return process

    def cut_off(self, host: int) -> None:
        """Let nothing through between a host and the others; its own device stays up."""
        self._on_switch("link", "set", f"p{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Connect a host again."""
        self._on_switch("link", "set", f"p{host}", "master", "br0")

    @contextmanager
    def slow_link(self, *, delay_ms: float = 0.0, loss: float = 0.0, mbit: float = 0.0) -> Iterator[None]:
        """Join hosts 1 and 2 by `slow0` at 10.78.0.1 and 10.78.0.2, for the time of the context.

        Args:
            delay_ms: One way.
            loss: Share of the packets that are lost.
            mbit: Rate in Mbit/s; 0 is unbounded.
        """
        taps = [f"{self._name}t{host}" for host in (1, 2)]
        line = [sys.executable, "-m", "tests.hosts.relay", *taps, str(delay_ms), str(loss), str(mbit)]
        self._relay = relay = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE)
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"ready\n"
        for host, tap in zip((1, 2), taps, strict=True):
            _ip("link", "set", tap, "netns", self._space(host), "name", "slow0")
            _ip("-n", self._space(host), "addr", "add", f"10.78.0.{host}/24", "dev", "slow0")
            _ip("-n", self._space(host), "link", "set", "slow0", "up")
        try:
            yield
        finally:
            relay.kill()
            relay.wait()

    def start_ssh(self) -> None:
        """Let hosts log in to each other by ssh, as root and with a key that is made here."""
        keys = [self.folder / name for name in ("key", "host_key")]
        for key in keys:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(key=keys[0]))
        Path("/run/sshd").mkdir(exist_ok=True)
        settings = {
            "AuthorizedKeysFile": f"{keys[0]}.pub",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
            "PidFile": "none",
        }
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        for host in self.hosts:
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", keys[1], *options]
            self.start(host, command, self.folder / f"sshd{host}.log")
        time.sleep(1)

    def _add_host(self, host: int) -> None:
        space = self._space(host)
        (self.folder / f"disk{host}").mkdir()
        _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", f"p{host}", "netns", self._switch)
        self.mend(host)
        self._on_switch("link", "set", f"p{host}", "up")
        _ip("-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")

    def _space(self, host: int) -> str:
        return f"{self._name}h{host}"

    def _on_switch(self, *words: str) -> None:
        _ip("-n", self._switch, *words)


def address(host: int) -> str:
    """The address of a host on the switch."""
    return f"10.77.0.{host}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
