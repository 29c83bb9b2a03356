"""How fast rows get into a buffer and out of it, against bare copies of the same bytes over the same link.

    python -m scripts.gpu.copies --out copies.json

Shares of 1 are the link's limit: a copy between the batch's device and pinned memory, or within the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rehearsal_plugin import RehearsalBuffer, RowLayout
from rehearsal_plugin.config import BufferConfig
from scripts.benchmarks.measure import measure
from scripts.common.report import write_text

ROUNDS = 31


def main(argv: Sequence[str]) -> int:
    """Measures all storages that this machine has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the figures")
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    rows, width = (256, 1 << 18) if on_gpu else (64, 1 << 12)
    storages = ("pinned", "cuda") if on_gpu else ("memory",)
    figures = {name: value for storage in storages for name, value in shares(storage, rows, width).items()}
    print(figures)
    write_text(arguments.out, json.dumps(figures))
    return 0


def shares(storage: str, rows: int, width: int) -> dict[str, float]:
    """GB/s of writing and reading rows `[rows, width]` float32, and how much of a bare copy that is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {"x": torch.randn(rows, width, device=device)}
    layout = RowLayout.infer(batch)
    buffer = RehearsalBuffer(BufferConfig(capacity=2 * rows, storage=storage), layout)
    packed = torch.empty(rows, layout.row_bytes, dtype=torch.uint8, device=device)
    layout.pack(layout.columns(batch), packed)
    bare, out = (torch.empty(packed.shape, dtype=torch.uint8, device=buffer.device) for _ in range(2))
    if storage == "pinned":
        bare, out = bare.pin_memory(), out.pin_memory()
    slots = buffer.admit(packed, 0)

    def write() -> None:
        buffer.write(slots, packed)

    def read() -> Tensor:
        buffer.read(slots, out)
        return out.to(device, non_blocking=True)

    sides: dict[str, Callable[[], object]] = {
        "write": lambda: finished(write),
        "read": lambda: finished(read),
        "bare_write": lambda: finished(lambda: bare.copy_(packed, non_blocking=True)),
        "bare_read": lambda: finished(lambda: bare.to(device, non_blocking=True)),
    }
    timings = measure(sides, ROUNDS)
    gigabytes = packed.numel() / 1e9
    seconds = {name: statistics.median(timing.wall_s) for name, timing in timings.items()}
    figures = {f"{storage}_{name}_gb_s": gigabytes / seconds[name] for name in sides}
    of_bare = {f"{storage}_{name}_share": seconds[f"bare_{name}"] / seconds[name] for name in ("write", "read")}
    return {**figures, **of_bare}


def finished(copy: Callable[[], object]) -> None:
    """Makes a copy, and waits for the GPU."""
    copy()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
