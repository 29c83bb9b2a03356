"""Ranks exchange rows over NCCL, or over gloo where they share a GPU, and each row arrives as it was sent.

torchrun --nproc_per_node 2 -m scripts.gpu.ranks --backend gloo --out ranks.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from scripts.common.process_group import leave_together
from scripts.common.report import write_text

STEPS, ROWS, WIDTH = 200, 16, 4096


def main(argv: Sequence[str]) -> int:
    """One rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("nccl", "gloo"), required=True, help="of the exchange")
    parser.add_argument("--out", type=Path, required=True, help="file of the figures, written by rank 0")
    arguments = parser.parse_args(argv)
    dist.init_process_group(arguments.backend)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    figures = exchange(device, arguments.backend)
    print(dist.get_rank(), device, figures)
    if dist.get_rank() == 0:
        write_text(arguments.out, json.dumps(figures))
    leave_together()
    return 0


def exchange(device: torch.device, backend: str) -> dict[str, float]:
    """A short job; raises where a row is not what its owner stored."""
    section = {"buffer": {"capacity": 2000}, "ratio": 0.25, "exchange": {"backend": backend}}
    rank, owners, began = dist.get_rank(), set[int](), time.perf_counter()
    with Rehearsal(section) as rehearsal:
        for step in range(STEPS):
            number = torch.arange(ROWS, device=device) + ROWS * step + 1_000_000 * rank
            batch = rehearsal.update({"number": number, "x": number[:, None].float().expand(-1, WIDTH).contiguous()})
            replayed, rows = batch["number"][ROWS:], batch["x"][ROWS:]
            if not torch.equal(rows, replayed[:, None].float().expand(-1, WIDTH)):
                raise AssertionError(f"rank {rank}: rows of step {step} are not what was stored")
            owners |= set((replayed // 1_000_000).tolist())
        metrics = rehearsal.metrics()
    if owners != set(range(dist.get_world_size())):
        raise AssertionError(f"rank {rank}: rows came from ranks {sorted(owners)} of {dist.get_world_size()}")
    step_ms = 1e3 * (time.perf_counter() - began) / STEPS
    return {"rows_replayed": metrics["rows_replayed"], "rows_received": metrics["rows_received"], "step_ms": step_ms}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
