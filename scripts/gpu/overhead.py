"""What rehearsal costs in a training step on a GPU: a GPT of 125 M parameters in bfloat16, steps of 50 and 200 ms.

    python -m scripts.gpu.overhead --out overhead.json

Both sides train the same model on batches of the same size, in turns of a few steps: as it is, and with one row in
eight replayed (`mode: replace`). A ratio is told within a round, by the clock, and by events on the GPU. `nvidia-smi
dmon` runs beside it, and its lines are printed. Without a GPU a tiny model shows that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from scripts.benchmarks.measure import quartiles
from scripts.common.report import write_text
from scripts.gpu.model import GPT, Size

ON_GPU = torch.cuda.is_available()
SIZE = Size(50304, 768, 12, 12, 1024) if ON_GPU else Size(256, 64, 2, 2, 32)
STEPS_MS = (50, 200) if ON_GPU else (20,)
ROUNDS, STEPS, RATIO = (24, 5, 0.125) if ON_GPU else (4, 2, 0.125)


def main(argv: Sequence[str]) -> int:
    """Measures every length of a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the figures")
    arguments = parser.parse_args(argv)
    figures: dict[str, float] = {}
    with device_monitor():
        for step_ms in STEPS_MS:
            figures |= {f"{name}_{step_ms}ms": value for name, value in measured(step_ms).items()}
    if ON_GPU:
        figures["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(figures)
    write_text(arguments.out, json.dumps(figures))
    return 0


def measured(step_ms: float) -> dict[str, float]:
    """Ratio of the steps with rehearsal to those without, in turns."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    model = GPT(SIZE).to(device, torch.bfloat16 if ON_GPU else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ON_GPU)
    rows = rows_for(model, optimizer, step_ms, device)
    batches = [torch.randint(SIZE.vocabulary, (rows, SIZE.length), device=device) for _ in range(4)]
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    section = {"buffer": {"capacity": 4096}, "ratio": RATIO, "mode": "replace"}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "plain": lambda ids: ids,
            "rehearsed": lambda ids: rehearsal.update({"ids": ids})["ids"],
        }
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(-1, ROUNDS):
            for name in sorted(sides, reverse=turn % 2 == 0):
                taken = timed(lambda name=name: train(model, optimizer, batches, sides[name]))  # type: ignore[misc]
                if turn >= 0:
                    turns[name].append(taken)
        metrics = rehearsal.metrics()
    held = (torch.cuda.memory_allocated() - before) / 1e6 if ON_GPU else 0.0
    figures = {"rows": float(rows), "step_ms": statistics.median(s for s, _ in turns["plain"]) * 1e3 / STEPS}
    for clock, kind in ((0, "wall"), (1, "gpu")):
        pairs = zip(turns["rehearsed"], turns["plain"], strict=True)
        low, middle, high = quartiles([mine[clock] / plain[clock] for mine, plain in pairs if plain[clock]] or [0.0])
        figures |= {f"ratio_{kind}": middle, f"ratio_{kind}_low": low, f"ratio_{kind}_high": high}
    waited = {name: metrics[name] / metrics["steps"] for name in ("waited_ms", "augmented_ms")}
    return {**figures, **waited, "held_mb": held}


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[torch.Tensor],
    augmented: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """A turn of steps."""
    for number in range(STEPS):
        model(augmented(batches[number % len(batches)])).backward()
        optimizer.step()
        optimizer.zero_grad()


def timed(turn: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a turn by the clock, and between events on the GPU (0 without one)."""
    if not ON_GPU:
        began = time.perf_counter()
        turn()
        return time.perf_counter() - began, 0.0
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began = time.perf_counter()
    first.record()
    turn()
    last.record()
    torch.cuda.current_stream().synchronize()
    return time.perf_counter() - began, first.elapsed_time(last) / 1e3


def rows_for(model: GPT, optimizer: torch.optim.Optimizer, step_ms: float, device: torch.device) -> int:
    """A batch size, a multiple of 8, at which a step takes about so long."""
    batches = [torch.randint(SIZE.vocabulary, (8, SIZE.length), device=device)]
    timed(lambda: train(model, optimizer, batches, lambda ids: ids))
    seconds, _ = timed(lambda: train(model, optimizer, batches, lambda ids: ids))
    return max(8, 8 * round(step_ms / (1e3 * seconds / STEPS)))


@contextlib.contextmanager
def device_monitor() -> Iterator[None]:
    """Runs `nvidia-smi dmon` beside, where there is one, and prints what it saw."""
    if not ON_GPU or shutil.which("nvidia-smi") is None:
        yield
        return
    command = ["nvidia-smi", "dmon", "-s", "put", "-d", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        try:
            yield
        finally:
            monitor.terminate()
            print(monitor.communicate()[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
