"""Real ranks on this machine for benchmarks: processes on gloo, what they send counted where it leaves them.

The kernel counts the bytes of every TCP connection. Between two points of time, at which nothing is under way, the
difference over the connections of the exchange's own group is what the exchange sent, with all that gloo adds.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.header_schedule import LONGEST
from rehearsal_plugin.distributed.transport import TorchDistributedTransport
from scripts.benchmarks.counting import CountsMessages

__all__ = ["Job", "Steps", "connections", "on_ranks", "run_steps"]

T = TypeVar("T")
Connection = tuple[Any, Any]

# In `struct tcp_info` of Linux, linux/tcp.h.
DATA_SEGMENTS_OUT, BYTES_SENT, LENGTH = 156, 200, 208

TIMEOUT_S = 300.0
WARMUP = 128
"""Steps that fill the buffers, and those after which headers are as rare as they become."""


@dataclass(frozen=True)
class Job:
    """Work of every rank: updates with a batch of `batch` rows and nothing in between.

    Attributes:
        row_bytes: Bytes of a row.
        representatives: Rows that every rank asks for in a step.
        steps: Steps that count, behind those that fill the buffer; with `LONGEST`, one of them has headers.
        weights: `uniform`, or `balanced` over ten partitions.
        batch: New rows of a step.
    """

    row_bytes: int
    representatives: int = 8
    steps: int = LONGEST
    weights: str = "uniform"
    batch: int = 8


@dataclass(frozen=True)
class Steps:
    """Counts of one rank in the steps of a job; all but `step_s` are means a step.

    Attributes:
        collectives: Collectives issued.
        messages: See `CountsMessages`.
        segments: TCP segments with data that left the process.
        wire_bytes: Bytes that left the process.
        row_bytes: Bytes of rows among them.
        drawn_ms: Time to draw and to read rows.
        step_s: Seconds of each step.
    """

    collectives: float
    messages: float
    segments: float
    wire_bytes: float
    row_bytes: float
    drawn_ms: float
    step_s: tuple[float, ...]


class CountingTransport(CountsMessages, TorchDistributedTransport):
    """Real ranks whose messages are counted."""


def on_ranks(function: Callable[..., T], size: int, *arguments: object) -> list[T]:
    """Call a module's function in `size` processes, with torch.distributed on gloo initialised.

    Returns:
        The results by rank.

    Raises:
        Exception: A rank raised it, died, or did not end in time.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "rehearsal_plugin.integrations"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=context) as pool:
        place = f"file://{folder}/store"
        futures = [pool.submit(_rank, function, rank, size, place, arguments) for rank in range(size)]
        return [future.result(TIMEOUT_S) for future in futures]


def run_steps(job: Job) -> Steps:
    """Run the job on this rank; all ranks call it."""
    others = set(connections())
    transport = CountingTransport(timeout_s=TIMEOUT_S)
    partitioned = job.weights != "uniform"
    section = {
        "buffer": {"capacity": 64, **({"partition_by": "key"} if partitioned else {})},
        "representatives": job.representatives,
        "sampling": {"weights": job.weights},
        "exchange": {"timeout_s": TIMEOUT_S},
    }
    batch = {"x": torch.zeros(job.batch, job.row_bytes - 16 * partitioned, dtype=torch.uint8)}
    if partitioned:
        batch["key"] = torch.arange(job.batch) % 10
    with Rehearsal(section, transport) as rehearsal:
        before = after = _point(rehearsal, transport, others)
        seconds = []
        for step in range(-WARMUP, job.steps):
            if step == 0:
                before = _point(rehearsal, transport, others)
            started = time.perf_counter()
            rehearsal.update(batch)
            if step >= 0:
                seconds.append(time.perf_counter() - started)
        after = _point(rehearsal, transport, others)
    means = {name: (after[name] - before[name]) / job.steps for name in after}
    return Steps(**means, step_s=tuple(seconds))


def _point(rehearsal: Rehearsal, transport: CountingTransport, others: set[Connection]) -> dict[str, float]:
    """The counters, while nothing is under way on any rank."""
    rehearsal.drain()
    dist.barrier()
    counted = [value for key, value in connections().items() if key not in others]
    metrics = rehearsal.metrics()
    return {
        "collectives": metrics["collectives"],
        "messages": transport.messages,
        "segments": sum(segments for segments, _ in counted),
        "wire_bytes": sum(sent for _, sent in counted),
        "row_bytes": metrics["bytes_sent"],
        "drawn_ms": metrics["drawn_ms"],
    }


def connections() -> dict[Connection, tuple[int, int]]:
    """Segments and bytes sent on every TCP connection of this process, by its two ends."""
    counters = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(path.name))) as one:
                ends = one.getsockname(), one.getpeername()
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # a file, a listening socket, or closed since
            continue
        if len(info) < LENGTH:
            raise RuntimeError("this kernel does not count the bytes of TCP connections; Linux 4.19 or newer does")
        (segments,) = struct.unpack_from("=I", info, DATA_SEGMENTS_OUT)
        (sent,) = struct.unpack_from("=Q", info, BYTES_SENT)
        counters[ends] = segments, sent
    return counters


def _rank(function: Callable[..., T], rank: int, size: int, place: str, arguments: Sequence[object]) -> T:
    torch.set_num_threads(1)
    patience = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=patience)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
