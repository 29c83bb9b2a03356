"""A cable with delay, loss and a rate, where the kernel has no netem: packets go from one TAP device to another.

    python -m tests.hosts.relay FIRST SECOND DELAY_MS LOSS MBIT

It makes the devices `FIRST` and `SECOND`, says `ready`, and forwards until it is killed. They may be moved into network
namespaces. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000

LONGEST_QUEUE_S = 0.5
"""What would wait longer for its turn is dropped, as by a switch."""


class Direction:
    """Packets on their way through the cable.

    Args:
        delay_s: From the end of sending to the arrival.
        loss: Share of packets that are lost.
        bytes_per_s: Rate; 0 is unbounded.
        seed: Of the losses.
    """

    def __init__(self, delay_s: float, loss: float, bytes_per_s: float, seed: int) -> None:
        self._delay_s, self._loss, self._rate = delay_s, loss, bytes_per_s
        self._random = random.Random(seed)
        self._free_at = 0.0
        self._queue: deque[tuple[float, bytes]] = deque()  # by the time of arrival

    def accept(self, packet: bytes, now: float) -> None:
        """Take a packet, unless it is lost or the queue is full."""
        start = max(self._free_at, now)
        if self._random.random() < self._loss or start - now > LONGEST_QUEUE_S:
            return
        self._free_at = start + (len(packet) / self._rate if self._rate else 0.0)
        self._queue.append((self._free_at + self._delay_s, packet))

    def arrived(self, now: float) -> list[bytes]:
        """The packets that are through by now."""
        packets = []
        while self._queue and self._queue[0][0] <= now:
            packets.append(self._queue.popleft()[1])
        return packets

    @property
    def next_at(self) -> float:
        """When the next packet arrives."""
        return self._queue[0][0] if self._queue else float("inf")


def open_tap(name: str) -> int:
    """Make a TAP device; it is there as long as its file is open."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def forward(devices: list[int], directions: list[Direction]) -> None:
    """Move packets for ever."""
    while True:
        pause_s = min(1.0, max(0.0, min(direction.next_at for direction in directions) - time.monotonic()))
        ready, _, _ = select.select(devices, [], [], pause_s)
        for side, (device, direction) in enumerate(zip(devices, directions, strict=True)):
            if device in ready:
                direction.accept(os.read(device, 1 << 16), time.monotonic())
            for packet in direction.arrived(time.monotonic()):
                try:
                    os.write(devices[1 - side], packet)
                except OSError:  # its device is down, or full
                    continue


def main(first: str, second: str, delay_ms: float, loss: float, mbit: float) -> None:
    devices = [open_tap(first), open_tap(second)]
    print("ready", flush=True)
    forward(devices, [Direction(delay_ms / 1e3, loss, mbit * 1e6 / 8, seed) for seed in (1, 2)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
