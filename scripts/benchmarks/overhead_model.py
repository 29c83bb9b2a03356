"""The model that the benchmark of a step trains, and a gauge of the speed of the core meanwhile."""

from __future__ import annotations

import statistics
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from scripts.benchmarks.measure import measure

__all__ = ["RESNET_OPERATIONS", "Gauge", "Model", "batch_of", "calibrate", "engine_of", "operations_of", "passes_of"]

WIDTH, POSITIONS, LAYERS = 512, 64, 4
OF_PASS = 3 * 2 * POSITIONS * LAYERS * WIDTH**2
"""Multiplications and additions of a row in a pass, forwards and twice as many backwards."""

RESNET_OPERATIONS = 18_000
"""Multiplications and additions of a ResNet-18 for each byte of an image of 3 x 224 x 224 float32.

1.8e9 multiply-adds (He et al., "Deep residual learning for image recognition", CVPR 2016, table 1), two operations
each, forwards and twice as many backwards.
"""


class Gauge:
    """Tells how fast a core is: times a small product of matrices whenever it is called.

    Args:
        measures: False where the model computes elsewhere: the unit is then a second.
    """

    def __init__(self, measures: bool = True) -> None:
        self._factors = torch.randn(128, WIDTH), torch.randn(WIDTH, WIDTH)
        self._measures, self._seconds = measures, list[float]()

    def __call__(self, *_: object) -> None:
        """Time the product, in CPU time of the thread."""
        if not self._measures:
            return
        start = time.thread_time()
        torch.mm(*self._factors)
        self._seconds.append(time.thread_time() - start)

    def take(self) -> float:
        """Seconds of the product since the last call.

        A median: what takes part of the core for a small part of a step, as rehearsal does, is not to slow the gauge.
        """
        seconds = statistics.median(self._seconds) if self._measures else 1.0
        self._seconds.clear()
        return seconds


class Model(nn.Module):
    """Reads all of a row, then goes through the same layers a number of times.

    Args:
        passes: Number of passes.
        gauge: Called in every pass, forwards and backwards.
    """

    def __init__(self, passes: int, gauge: Gauge) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 10)
        self._passes, self._gauge = passes, gauge

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The mean loss of rows `x` `[b, n]` float32 with labels `[b]` int64."""
        hidden = x.view(len(x), -1, WIDTH).mean(1, keepdim=True).expand(-1, POSITIONS, -1)
        for _ in range(self._passes):
            hidden = hidden + self.layers(hidden)
            self._gauge()
            hidden.register_hook(self._gauge)
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), label)


def passes_of(row_bytes: int, operations: int) -> int:
    """Passes through the layers that take so many operations a byte of a row; at least one."""
    return max(1, round(row_bytes * operations / OF_PASS))


def operations_of(row_bytes: int, passes: int) -> float:
    """Operations a byte of a row."""
    return passes * OF_PASS / row_bytes


def calibrate(step_ms: float, batch: tuple[Tensor, Tensor], gauge: Gauge) -> int:
    """Passes of a step of `step_ms` on a core of its own, alike on all ranks."""
    model = Model(8, gauge).to(batch[0].device)

    def step() -> None:
        model(*batch).backward()
        get_accelerator().synchronize()

    timing = measure({"step": step}, 5)["step"]
    seconds = timing.cpu_median_s if batch[0].is_cpu else timing.median_s
    passes = torch.tensor([max(1.0, 8e-3 * step_ms / seconds)], device=batch[0].device)
    dist.all_reduce(passes)
    return max(1, round(float(passes) / dist.get_world_size()))


def batch_of(rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
    """Random rows `[rows, row_bytes / 4]` float32 and labels `[rows]` int64, on this rank's device."""
    device = get_accelerator().current_device_name()
    return torch.randn(rows, row_bytes // 4, device=device), torch.randint(0, 10, (rows,), device=device)


def engine_of(model: nn.Module, rows: int) -> Any:
    """A DeepSpeed engine without a `rehearsal` block, for batches of `rows`: ZeRO-1 and AdamW."""
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
