"""Scans that arrive while a network learns from them: a process beside each rank simulates, a bounded queue delivers.

The queue holds a few mini-batches. Whoever trains takes the next one as soon as it is there; whoever simulates rests
while the queue is full. What comes depends on the plan alone, so that all arms of one plan see the same patterns in
the same order.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from scripts.studies.diffraction import Condition, Samples, scan

__all__ = ["DRIFTS", "Plan", "Producer", "conditions"]

Channel: TypeAlias = "Connection[Any, Any]"

AHEAD = 8
"""Mini-batches that the queue holds at most."""

PATIENCE_S = 120.0
"""Longest wait for a mini-batch; the first one of shuffled tasks takes as long as simulating all of them."""

SIDE = 8
"""Windows along each side of a scanned object."""

TRAINED, HELD_OUT = range(2)

DRIFTS: dict[str, dict[str, tuple[float, float]]] = {
    "defocus": {"defocus": (1.5, 6.0)},
    "photons": {"photons": (1e4, 1e3)},
    "texture": {"exponent": (4.0, 1.0)},
}
"""Values of the first task and of the last one; they move in even steps, photons in even ratios."""


def conditions(drift: str, tasks: int) -> list[Condition]:
    """The condition of each task."""
    ((name, (first, last)),) = DRIFTS[drift].items()
    values = (np.geomspace if name == "photons" else np.linspace)(first, last, tasks)
    return [replace(Condition(), **{name: float(value)}) for value in values]


@dataclass(frozen=True)
class Plan:
    """The samples of one rank in one arm.

    Attributes:
        tasks: Their conditions, in order.
        steps: Mini-batches a task.
        batch: Samples that a mini-batch takes from the stream.
        seed: Of objects and noise.
        rank: Ranks see different objects.
    """

    tasks: tuple[Condition, ...]
    steps: int
    batch: int
    seed: int
    rank: int

    def in_order(self) -> Iterator[Samples]:
        """Task by task, scan by scan; every sample once."""
        for task in range(len(self.tasks)):
            scans = self._scans(task, TRAINED)
            rest = next(scans)
            for _ in range(self.steps):
                while len(rest.phase) < self.batch:
                    rest = _join([rest, next(scans)])
                yield _cut(rest, slice(self.batch))
                rest = _cut(rest, slice(self.batch, None))

    def shuffled(self, batch: int) -> Iterator[Samples]:
        """The same samples in as many mini-batches of `batch` samples, all tasks mixed, round by round."""
        samples, rng = _join(list(self.in_order())), np.random.default_rng((TRAINED, self.seed, self.rank))
        total, needed = len(samples.phase), len(self.tasks) * self.steps * batch
        order = np.concatenate([rng.permutation(total) for _ in range(-(-needed // total))])[:needed]
        for rows in order.reshape(-1, batch):
            yield _cut(samples, rows)

    def held_out(self, scans: int) -> list[Samples]:
        """For each task, samples of objects that training does not see."""
        return [_join(list(islice(self._scans(task, HELD_OUT), scans))) for task in range(len(self.tasks))]

    def _scans(self, task: int, purpose: int) -> Iterator[Samples]:
        """One new object after the other, without end."""
        for number in count():
            rng = np.random.default_rng((purpose, self.seed, task, self.rank, number))
            yield scan(self.tasks[task], SIDE, rng)


class Producer:
    """A process that simulates whatever plan it is given; one plan at a time.

    Attributes:
        waited_s: Time that was spent waiting for mini-batches since the start.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_produce, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the channel ends with the process
        self.waited_s = 0.0

    def stream(self, plan: Plan, shuffled: int | None = None) -> Iterator[Samples]:
        """The mini-batches of a plan as they arrive: in order, or all tasks mixed in batches of `shuffled`.

        Raises:
            RuntimeError: The process has ended, or delivers nothing.
        """
        self._channel.send((plan, shuffled))
        for _ in range(len(plan.tasks) * plan.steps):
            start = time.perf_counter()
            samples = self._next()
            self.waited_s += time.perf_counter() - start
            yield samples

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> Samples:
        if not self._channel.poll(PATIENCE_S):
            raise RuntimeError(f"the simulation delivered nothing for {PATIENCE_S:g} s; are the cores overloaded?")
        try:
            samples: Samples = self._channel.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"the simulation ended with exit code {self._process.exitcode}") from None
        return samples


def _produce(channel: Channel) -> None:
    """The process: one thread simulates, this one delivers, until the other side is gone."""
    waiting: queue.Queue[Samples | None] = queue.Queue(AHEAD)
    threading.Thread(target=_simulate, args=(channel, waiting), daemon=True).start()
    with suppress(BrokenPipeError):
        while (samples := waiting.get()) is not None:
            channel.send(samples)


def _simulate(channel: Channel, waiting: queue.Queue[Samples | None]) -> None:
    try:
        while True:
            plan, shuffled = channel.recv()
            for samples in plan.in_order() if shuffled is None else plan.shuffled(shuffled):
                waiting.put(samples)
    except (EOFError, ConnectionResetError):
        pass  # nobody is left to ask for more
    finally:
        waiting.put(None)


def _join(parts: Sequence[Samples]) -> Samples:
    return Samples(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _cut(samples: Samples, rows: Any) -> Samples:
    return Samples(*(field[rows] for field in samples))
