"""Real processes for tests: a function on every rank of a gloo group, with a deadline."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scripts.common.launch import free_port

# Ranks are forked from one process that has the slow imports behind it and has started no thread. torch.optim imports
# torch._dynamo at its first step.
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = ["torch", "torch._dynamo", "deepspeed", "transformers.trainer", "rehearsal_plugin.integrations"]
CONTEXT.set_forkserver_preload(IMPORTS)


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `size` processes, with torch.distributed on gloo initialised.

    `function` must be importable (at module level) and its result picklable. Environment variables are those
    that torchrun sets.

    Returns:
        The results by rank.

    Raises:
        AssertionError: A rank raised, died or did not end in time; the message holds its traceback.
    """
    port = free_port()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        CONTEXT.Process(target=_rank, args=(function, args, rank, size, port, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        return [_outcome(rank, pipes[rank][0], process, deadline) for rank, process in enumerate(ranks)]
    finally:
        for process in ranks:
            process.join(max(0.1, deadline - time.monotonic()) if process.exitcode is None else None)
            process.kill()


def run_snippet(code: str, timeout_s: float = 120.0) -> str:
    """Run a piece of code as `python -c` would, in a process that has the slow imports behind it; what it printed.

    Raises:
        AssertionError: It raised, died or did not end in time; the message holds what it printed.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        process = CONTEXT.Process(target=_snippet, args=(code, log.name))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        printed = log.read()
    assert process.exitcode == 0, f"exit status {process.exitcode}:\n{printed}"
    return printed


def _snippet(code: str, log: str) -> None:
    with Path(log).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, port: int, sender: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        result = function(*args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        os._exit(1)


def _outcome(rank: int, receiver: Connection, process: Any, deadline: float) -> Any:
    while not receiver.poll(0.05):
        assert time.monotonic() < deadline, f"rank {rank} did not end in time"
        assert process.is_alive() or receiver.poll(), f"rank {rank} died with exit code {process.exitcode}"
    done, result = receiver.recv()
    assert done, f"rank {rank} raised:\n{result}"
    return result
