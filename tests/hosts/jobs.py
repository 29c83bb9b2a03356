"""What a rank does on a host: `python -m tests.hosts.jobs JOB OUT OPTIONS`, under any launcher.

Its result goes to `OUT/<rank>.json`, what the package logs to `OUT/<rank>.log`. Times are no part of a result.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from rehearsal_plugin import Rehearsal, attach
from rehearsal_plugin.distributed.transport import late_ranks
from rehearsal_plugin.errors import CheckpointError, ExchangeError
from rehearsal_plugin.runtime import failure_watch
from tests.helpers.samples import ids_of, new_batch

SIZE, WANTED = 8, 6
PATIENCE_S = 60.0

Options = Mapping[str, Any]


def section(options: Options) -> dict[str, Any]:
    exchange = {"timeout_s": options.get("timeout_s", 30), "on_failure": options.get("on_failure", "raise")}
    sampling = {"scope": options.get("scope", "global")}
    return {"buffer": {"capacity": 60}, "representatives": WANTED, "exchange": exchange, "sampling": sampling}


def pause(out: Path, rank: int) -> None:
    """Say that this rank is in mid-training, and go on when the test says so."""
    (out / f"paused{rank}").touch()
    deadline = time.monotonic() + PATIENCE_S
    while not (out / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def train(rehearsal: Rehearsal, rank: int, steps: int, out: Path, options: Options) -> list[list[int]]:
    """The replayed rows of each step, by their ids."""
    replayed = []
    first = rehearsal.steps
    for step in range(first, first + steps):
        if step == options.get("pause_at"):
            pause(out, rank)
        replayed.append(ids_of(rehearsal.update(new_batch(rank, step, SIZE)), SIZE))
        time.sleep(options.get("step_s", 0.0))
    return replayed


def plain(out: Path, options: Options) -> dict[str, Any]:
    """Train in a loop of its own; load from each of some folders and train on; save on the way."""
    rank, results = dist.get_rank(), dict[str, Any]()
    for name in options.get("load", [""]):
        with Rehearsal(section(options)) as rehearsal:
            try:
                if name:
                    rehearsal.load(name)
                    results["resumed_at"] = rehearsal.steps
                train(rehearsal, rank, options.get("before", 0), out, options)
                for folder in options.get("save", []):
                    rehearsal.save(folder)
                results[name] = train(rehearsal, rank, options["steps"], out, options)
            except (CheckpointError, ExchangeError) as error:
                results["error"] = f"{type(error).__name__}: {error}"
            results["metrics"] = rehearsal.metrics()
    return results


def ddp(out: Path, options: Options) -> dict[str, Any]:
    """Train a model under DDP, with steps that take some time."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    with Rehearsal(section(options)) as rehearsal:
        for step in range(options["steps"]):
            batch = rehearsal.update(new_batch(dist.get_rank(), step, SIZE))
            time.sleep(options["step_s"])  # the forward
            model((batch["x"] % 97).float()).mean().backward()
        return {"metrics": rehearsal.metrics()}


def zero(out: Path, options: Options) -> dict[str, Any]:
    """Train under ZeRO-1 with DeepSpeed's checkpoints on the disk of the host, resumed without a tag."""
    from tests.helpers.witness import config_of, engine_of
    from tests.helpers.witness import train as train_engine

    config = {**config_of(section(options), stage=1), "checkpoint": {"use_node_local_storage": True}}
    engine = engine_of(config)
    if "framework_s" in options:  # the group is DeepSpeed's own, and has the default of PyTorch
        _set_pg_timeout(timedelta(seconds=options["framework_s"]), engine.data_parallel_group)
    train_engine(engine, options["before"])
    if "pause_at" in options:
        pause(out, dist.get_rank())
    if "save" in options:
        engine.save_checkpoint(options["save"])
    results: dict[str, Any] = {"latest": "save" in options and Path(options["save"], "latest").exists()}
    try:
        results["losses"] = train_engine(engine, options["steps"], first=options["before"])
    except RuntimeError as error:  # of the framework, or the exchange's
        return {"error": f"{type(error).__name__}: {error}", "metrics": engine.rehearsal.metrics()}
    results["seen"], results["torn"] = engine.module.seen, engine.module.torn
    results["metrics"] = engine.rehearsal.metrics()
    engine.destroy()
    if "save" in options:
        engine = engine_of(config)
        engine.load_checkpoint(options["save"])
        results["again"] = train_engine(engine, options["steps"], first=options["before"])
        results["resumed_at"] = options["before"]
        engine.destroy()
    return results


def horovod(out: Path, options: Options) -> dict[str, Any]:
    """Train with Horovod's optimizer, save on the disk of the host, and load it again."""
    import horovod.torch as hvd
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.replayed = nn.Linear(3, 1), list[list[int]]()

        def forward(self, x: torch.Tensor, id: torch.Tensor) -> torch.Tensor:
            self.replayed.append(id[SIZE:].tolist())
            result: torch.Tensor = self.linear((x % 97).float()).mean()
            return result

    results: dict[str, Any] = {}
    for name in ("whole", "resumed"):
        model = Model()
        named = model.named_parameters()
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=named)
        handle = attach(optimizer, model=model, config=section(options))
        if name == "resumed":
            assert handle.load(options["save"])
        for step in range(0 if name == "whole" else options["before"], options["before"] + options["steps"]):
            if name == "whole" and step == options["before"]:
                handle.save(options["save"])
            batch = new_batch(hvd.rank(), step, SIZE)
            optimizer.zero_grad()
            model(batch["x"], batch["id"]).backward()
            optimizer.step()
        results[name] = model.replayed[-options["steps"] :]
        handle.close()
    return results


JOBS: dict[str, Callable[[Path, Options], dict[str, Any]]] = {
    "plain": plain,
    "ddp": ddp,
    "zero": zero,
    "horovod": horovod,
}


def begin(name: str, options: Options) -> int:
    """Initialise the job's library; the rank."""
    if name == "horovod":
        import horovod.torch as hvd

        hvd.init()
        return int(hvd.rank())
    timeout = timedelta(seconds=options.get("framework_s", 120))
    if name == "zero":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
        deepspeed.init_distributed("gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    return dist.get_rank()


def main(name: str, out: Path, options: Options) -> None:
    torch.set_num_threads(1)
    failure_watch.FIRST_S, failure_watch.EVERY_S, late_ranks.PATIENCE_S = 1.0, 3.0, 2.0
    rank = begin(name, options)
    log = logging.getLogger("rehearsal_plugin")
    log.addHandler(logging.FileHandler(out / f"{rank}.log"))
    log.setLevel(logging.INFO)
    result = JOBS[name](out, options)
    (out / f"{rank}.part").write_text(json.dumps(result))
    (out / f"{rank}.part").rename(out / f"{rank}.json")
    if dist.is_initialized() and options.get("ends_together", True):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    if not options.get("ends_together", True):
        os._exit(0)  # a group whose link is dead cannot be left in order


if __name__ == "__main__":
    # A launcher of DeepSpeed adds its argument `--local_rank`.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(arguments[0], Path(arguments[1]), json.loads(arguments[2]))
