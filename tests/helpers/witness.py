"""A model that checks every row of its batches, samples for it, and DeepSpeed engines around it."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rehearsal_plugin.integrations.deepspeed import engine as integration

__all__ = ["BLOCK", "Failure", "Witness", "config_of", "engine_of", "perform", "samples", "sockets", "threads", "train"]

BATCH = 8
MOST_BATCHES = 1000  # of a rank
RANK_STRIDE = BATCH * MOST_BATCHES
MADE: list[Any] = []  # engines of the scenario that runs
BLOCK = {"buffer": {"capacity": 500, "partition_by": "labels"}, "ratio": 0.25}


def samples(
    batch: int, *, rank: int | None = None, size: int = BATCH, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Batch number `batch` of a rank: fields of four dtypes, all of which follow from the samples' `uid`."""
    start = (dist.get_rank() if rank is None else rank) * RANK_STRIDE + batch * BATCH
    return payload(torch.arange(start, start + size), dtype)


def payload(uid: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x = (uid[:, None] * torch.arange(1, 7) % 97).to(dtype)  # below 256: exact in bfloat16
    return {"x": x, "labels": uid % 10, "uid": uid, "even": uid % 2 == 0}


def owner(uid: int) -> int:
    """The rank whose sample it is."""
    return uid // RANK_STRIDE


class Witness(nn.Module):
    """A classifier that compares every row with what its `uid` says it must be.

    Attributes:
        seen: The `uid` of the rows of every forward.
        torn: Rows whose fields do not belong together.
        spoilt: Forwards whose first rows were not bit for bit those of `expected`.
        expected: This rank's batch; set it before a forward.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10)
        self.seen: list[list[int]] = []
        self.torn = self.spoilt = 0
        self.expected: Mapping[str, Tensor] = {}

    def forward(self, x: Tensor, labels: Tensor, uid: Tensor, even: Tensor) -> Tensor:
        batch = {"x": x, "labels": labels, "uid": uid, "even": even}
        self.note(batch)
        return self.loss(x, labels)

    def note(self, batch: Mapping[str, Tensor]) -> None:
        self.seen.append(batch["uid"].tolist())
        right = payload(batch["uid"], batch["x"].dtype)
        whole = torch.stack([(batch[name] == right[name]).reshape(len(right["uid"]), -1).all(1) for name in right])
        self.torn += int((~whole.all(0)).sum())
        self.spoilt += any(not torch.equal(batch[name][: len(rows)], rows) for name, rows in self.expected.items())

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.linear(x.to(self.linear.weight.dtype) / 97).float(), labels)


def config_of(
    block: Mapping[str, Any] | None = None, *, stage: int = 0, gas: int = 1, bf16: bool = False, **more: Any
) -> dict[str, Any]:
    """A DeepSpeed config for `Witness`, with or without a `rehearsal` block."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        **more,
    }
    return config if block is None else {**config, "rehearsal": dict(block)}


def engine_of(config: Mapping[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine by `rehearsal_plugin.initialize`."""
    model = Witness() if model is None else model
    arguments |= {"config": deepcopy(dict(config))}  # DeepSpeed 0.17 takes `torch_adam` out of the caller's dict
    engine = integration.initialize(model=model, model_parameters=model.parameters(), **arguments)[0]
    MADE.append(engine)
    return engine


def train(engine: Any, steps: int, *, first: int = 0, dtype: torch.dtype = torch.float32) -> list[float]:
    """Train a `Witness`; returns the loss of every micro-batch."""
    losses = []
    micro_batches = steps * engine.gradient_accumulation_steps()
    for number in range(first, first + micro_batches):
        batch = samples(number, dtype=dtype)
        engine.module.expected = batch
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def threads() -> int:
    """Rehearsal threads that run in this process."""
    return sum(thread.name.startswith("rehearsal") for thread in threading.enumerate())


def sockets() -> int:
    """Sockets that this process has open, those of its process groups among them."""
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sum("socket:" in target for target in links)


@dataclass(frozen=True)
class Failure:
    """A scenario that raised."""

    trace: str


def perform(scenarios: Mapping[str, Callable[[Path], Any]], folder: Path) -> dict[str, Any]:
    """On a rank: run scenarios one after another, so that a launch and DeepSpeed's slow imports are paid once."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
    return {name: _attempt(scenario, folder / name) for name, scenario in scenarios.items()}


def _attempt(scenario: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return scenario(folder)
    except Exception:
        return Failure(traceback.format_exc())
    finally:
        while MADE:
            MADE.pop().destroy()
