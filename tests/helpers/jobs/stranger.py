"""A process that belongs to no job: finds the TCP ports that processes listen on, and sends them noise.

python -m tests.helpers.jobs.stranger PROCESS [PROCESS ...]
"""

from __future__ import annotations

import random
import socket
import sys
from contextlib import suppress
from pathlib import Path

LISTENS = "0A"
ROUNDS, SECONDS = 12, 2.0


def ports(process: int) -> set[tuple[str, int]]:
    """Addresses that a process listens on, IPv4 and IPv6."""
    sockets_of_process = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            sockets_of_process.add(str(descriptor.readlink()))
    listening = set()
    for table, host in (("tcp", "127.0.0.1"), ("tcp6", "::1")):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets_of_process:
                listening.add((host, int(fields[1].rpartition(":")[2], 16)))
    return listening


def disturb(host: str, port: int, noise: random.Random) -> int:
    """Connect, send some noise, and hang up or leave the connection open; how many bytes were taken."""
    sent = 0
    with suppress(OSError):
        connection = socket.create_connection((host, port), timeout=SECONDS)
        held.append(connection)
        size = noise.choice((1, 7, 8, 9, 64, 4096, 1 << 18))
        sent = connection.send(noise.randbytes(size))
        if noise.random() < 0.5:
            connection.close()
    return sent


held: list[socket.socket] = []

if __name__ == "__main__":
    noise = random.Random(0)
    targets = sorted({address for process in sys.argv[1:] for address in ports(int(process))})
    taken = [disturb(host, port, noise) for _ in range(ROUNDS) for host, port in targets]
    print(len(targets), sum(sent > 0 for sent in taken), flush=True)
