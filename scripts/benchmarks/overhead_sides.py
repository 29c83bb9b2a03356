"""Sides of the benchmark of a step: one DeepSpeed engine, as it is or with rehearsal, taking turns with itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

import rehearsal_plugin
from scripts.benchmarks.overhead_model import Gauge

__all__ = [
    "BACKGROUND",
    "CLOCKS",
    "COUNTS",
    "PHASES",
    "TRAINING",
    "UNIT",
    "Batch",
    "CopyingSide",
    "RehearsedSide",
    "Side",
]

CLOCKS = ("wall_s", "cpu_s")
"""Seconds of a turn: by the clock, and of all threads of the process together."""

UNIT = "unit_s"
"""Seconds of the gauge meanwhile."""

TRAINING = ("paid_ms", "augmented_ms", "waited_ms")
"""Phases of a step on the training thread; the first is its CPU time inside of rehearsal, hooks left out."""

BACKGROUND = ("written_ms", "drawn_ms", "exchanged_ms")
PHASES = (*TRAINING, *BACKGROUND)
COUNTS = ("collectives", "rows_replayed")

Batch: TypeAlias = tuple[Tensor, Tensor]


class Side:
    """An engine with the methods that it has now, whatever it is given later.

    Args:
        engine: The same for all sides; whoever's turn it is puts its own methods in place.
        gauge: Of its model.
        batches: Its training data, used by turns.
        steps: Of a turn, that are timed.

    Attributes:
        turns: By clock, and of the gauge: one value a turn.
    """

    def __init__(self, engine: Any, gauge: Gauge, batches: Sequence[Batch], steps: int) -> None:
        self._engine, self._gauge, self._batches = engine, gauge, batches
        self._methods = engine.forward, engine.step
        self._timed, self._count = steps, 0
        self.turns: dict[str, list[float]] = {name: [] for name in (*CLOCKS, UNIT)}

    def settle(self) -> None:
        """Go through what happens only once, before the first turn."""
        self._train(1)
        self._count = 0

    def turn(self) -> None:
        """A step that is not timed, so that its background runs behind the next one as in a job; and a few that are."""
        dist.barrier()
        self._train(1)
        self._time()

    def figures(self) -> dict[str, Any]:
        """All turns."""
        return dict(self.turns)

    def close(self) -> None:
        """After the last turn."""

    def _time(self) -> None:
        self._gauge.take()
        clock, cpu = time.perf_counter(), time.process_time()
        self._train(self._timed)
        taken = time.perf_counter() - clock, time.process_time() - cpu, self._gauge.take()
        for turns, seconds in zip(self.turns.values(), taken, strict=True):
            turns.append(seconds)

    def _train(self, steps: int) -> None:
        self._engine.forward, self._engine.step = self._methods
        for _ in range(steps):
            x, label = self._batches[self._count % len(self._batches)]
            self._engine.backward(self._engine(x, label))
            self._engine.step()
            self._count += 1
        if x.is_cuda:  # the background has streams of its own, and goes on
            torch.cuda.current_stream().synchronize()


class CopyingSide(Side):
    """The engine as it is; behind each turn, the two copies that nothing can do without, of the bytes of a step.

    Args:
        engine: As for `Side`.
        gauge: As for `Side`.
        batches: As for `Side`.
        steps: As for `Side`.
        new: Rows of a batch that are candidates; the others stand for replayed ones.
    """

    def __init__(self, engine: Any, gauge: Gauge, batches: Sequence[Batch], steps: int, new: int) -> None:
        super().__init__(engine, gauge, batches, steps)
        whole = batches[0][0]
        self._new, self._copied_s = new, 0.0
        self._staged, self._joined = torch.empty_like(whole[:new]), torch.empty_like(whole)

    def turn(self) -> None:
        """The same; the copies come when the clock has stopped, as many times as there were steps."""
        super().turn()
        for step in range(self._timed):
            x = self._batches[(self._count + step) % len(self._batches)][0]
            start = time.thread_time()
            self._staged.copy_(x[: self._new])
            torch.cat((x[: self._new], x[self._new :]), out=self._joined)
            self._copied_s += time.thread_time() - start

    def figures(self) -> dict[str, Any]:
        """All turns, and milliseconds of CPU time of both copies of a step."""
        return {**super().figures(), "copies_ms": 1e3 * self._copied_s / (self._timed * len(self.turns[UNIT]))}


class RehearsedSide(Side):
    """The same engine with rehearsal.

    Args:
        engine: As for `Side`, with the methods of DeepSpeed in place, where `forward` and `step` stay.
        gauge: As for `Side`.
        batches: As for `Side`; rows are replayed beside theirs.
        steps: As for `Side`.
        section: The `rehearsal` section.
    """

    def __init__(
        self, engine: Any, gauge: Gauge, batches: Sequence[Batch], steps: int, section: Mapping[str, Any]
    ) -> None:
        bare = engine.forward, engine.step
        self._handle = rehearsal_plugin.attach(engine, section)
        super().__init__(engine, gauge, batches, steps)
        engine.forward, engine.step = bare
        engine.rehearsal = None  # which `attach` would not replace
        assert self._handle.rehearsal is not None
        self._rehearsal, self._paid_s = self._handle.rehearsal, 0.0
        for name in ("augment", "step"):
            setattr(self._rehearsal, name, self._metered(getattr(self._rehearsal, name)))
        self._before: dict[str, float] = {}
        self._on_thread = dict.fromkeys(TRAINING, 0.0)

    def settle(self) -> None:
        """Fill the buffer."""
        while self._rehearsal.buffer is None or len(self._rehearsal.buffer) < self._rehearsal.buffer.capacity:
            self._train(1)
        self._rehearsal.drain()
        self._before, self._count = self._totals(), 0

    def turn(self) -> None:
        """The same; the background of the last step is waited for when the clock has stopped."""
        super().turn()
        self._rehearsal.drain()

    def figures(self) -> dict[str, Any]:
        """All turns; milliseconds of each phase and what is counted, a step: on the training thread, of timed ones."""
        timed, totals = self._timed * len(self.turns[UNIT]), self._totals()
        return {
            **super().figures(),
            **{name: value / timed for name, value in self._on_thread.items()},
            **{name: (totals[name] - self._before[name]) / self._count for name in (*BACKGROUND, *COUNTS)},
        }

    def close(self) -> None:
        """Stop the background."""
        self._handle.close()

    def _time(self) -> None:
        before = self._totals()
        super()._time()
        after = self._totals()
        for name in TRAINING:
            self._on_thread[name] += after[name] - before[name]

    def _totals(self) -> dict[str, float]:
        return {**self._handle.metrics(), TRAINING[0]: 1e3 * self._paid_s}

    def _metered(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._paid_s += time.thread_time() - start

        return metered
