"""Jobs whose steps and micro-batches differ in size, and the share of replayed rows or tokens that they meet."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin import Rehearsal, RehearsalConfig, RowLayout
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing
from rehearsal_plugin.distributed.transport import Transport
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.replay_queue import ReplayQueue

__all__ = ["AMOUNTS", "NEAR", "PATTERNS", "RATIO", "STEPS", "QueueJob", "batch", "share_of_job"]

STEPS, WARM_UP, RATIO, NEAR = 600, 10, 0.25, 0.01

LONGEST = 12
PADDING = {"length": LONGEST, "values": {"tokens": 0}}

PATTERNS: dict[str, tuple[tuple[int, ...], ...]] = {
    "alike": ((8,) * 4,),
    "4 4 1 micro-batches": ((8,) * 4, (8,) * 4, (8,)),
    "4 4 4 4 1": (*(((8,) * 4,) * 4), (8,)),
    "2 1": ((8,) * 2, (8,)),
    "8 8 8 3": ((8,) * 8, (8,) * 8, (8,) * 8, (8,) * 3),
    "1 4": ((8,), (8,) * 4),
    "1 2 3": tuple((8,) * count for count in (1, 2, 3)),
    "1 2 3 4 5": tuple((8,) * count for count in (1, 2, 3, 4, 5)),
    "1 and 4, two steps each": ((8,), (8,), (8,) * 4, (8,) * 4),
    "rows of 8 8 3": ((8,), (8,), (3,)),
    "rows of 32 and 1": ((32,), (1,)),
    "rows of 63 and 1": ((63,), (1,)),
    "rows of 16 1 1": ((16,), (1,), (1,)),
    "rows of 1 and 64": ((1,), (1,), (64,)),
    "64 among 50 single rows": (*((1,),) * 50, (64,)),
    "32 and 1 beside each other": ((32, 1), (1, 32)),
    "sizes and numbers": ((8, 8, 3), (5,), (8, 8, 8, 1)),
    "steps without a batch": ((8, 8), (), (8,), (), ()),
    "batches without a row": ((8, 0), (0,), (8, 8)),
    "single rows": ((1,),),
    "a long step now and then": (*((8,) for _ in range(19)), (8,) * 12),
}
"""Rows of the micro-batches of each step, over and over."""

AMOUNTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "tokens": {"ratio_in": "tokens", "padding": PADDING},
    "replaced rows": {"mode": "replace"},
    "replaced tokens": {"mode": "replace", "ratio_in": "tokens", "padding": PADDING},
}


def batch(rows: int, draw: random.Random) -> Tensor:
    """Rows of 2 to `LONGEST` tokens."""
    lengths = torch.tensor([draw.randint(2, LONGEST) for _ in range(rows)]).reshape(-1, 1)
    return (torch.arange(LONGEST) < lengths).long()[:, : int(lengths.max()) if rows else 1]


def share_of_job(
    pattern: Sequence[Sequence[int]], transport: Transport | None = None, steps: int = STEPS, **keys: Any
) -> float:
    """The share of replayed rows or tokens in what the model sees, after the first steps."""
    amounts = {False: 0, True: 0}
    draw, in_tokens = random.Random(0), keys.get("ratio_in") == "tokens"
    section = {"buffer": {"capacity": 1000}, "padding": PADDING, "ratio": RATIO, **keys}
    with Rehearsal(section, transport) as rehearsal:
        for step, sizes in zip(range(steps), itertools.cycle(pattern), strict=False):
            for size in sizes:
                rows = {"tokens": batch(size, draw), "step": torch.full((size,), step)}
                seen = rehearsal.augment(rows)
                counts = seen["tokens"].sum(1) if in_tokens else torch.ones(len(seen["step"]))
                for is_replayed in amounts if step >= WARM_UP else ():
                    amounts[is_replayed] += int(counts[(seen["step"] != step) == is_replayed].sum())
            rehearsal.step()
    return amounts[True] / max(1, sum(amounts.values()))


class QueueJob:
    """The replay queue of one rank, whose requests are always met: the ratio without batches and ranks.

    Args:
        collects_first: Whether rows that came are ready in the same step, as in a loop of `update`.
        keys: Of the section.

    Attributes:
        seen: For each size of a micro-batch, the new and the replayed rows or tokens, after the first steps.
    """

    layout = RowLayout.infer({"tokens": torch.zeros(1, 1, dtype=torch.int64)})
    lengths = np.random.default_rng(0).integers(2, LONGEST + 1, 1 << 16).cumsum()

    def __init__(self, collects_first: bool = False, **keys: Any) -> None:
        self._config = RehearsalConfig.load({"ratio": RATIO, **keys})
        self._queue = ReplayQueue(self._config, 1, 0)
        self._collects_first, self._on_the_way = collects_first, deque([0])
        self._step = self._place = 0
        self.seen: dict[int, list[int]] = {}

    def run(self, pattern: Sequence[Sequence[int]], steps: int = STEPS) -> float:
        """The share that is met."""
        for sizes in itertools.islice(itertools.cycle(pattern), steps):
            if self._collects_first:
                self._collect()
            for size in sizes:
                self._micro_batch(size)
            if not self._collects_first:
                self._collect()
            self._on_the_way.append(self._queue.request(self._step).rows)
            self._step += 1
        new, replayed = (sum(column) for column in zip(*self.seen.values(), strict=True))
        return float(replayed / max(1, new + replayed))

    def _collect(self) -> None:
        if self._step:
            self._queue.receive(self._arrival(self._on_the_way.popleft()), self._step)

    def share(self, size: int) -> float:
        """The share in micro-batches of a size."""
        new, replayed = self.seen[size]
        return replayed / max(1, new + replayed)

    def _micro_batch(self, size: int) -> None:
        replacing, turn = self._config.mode == "replace", Turn(size)
        share = self._queue.take(self._step, turn, size if replacing else None)
        replayed = 0 if share is None else share.count
        rows = size - replayed if replacing else size, replayed
        amounts = [self._tokens(count) for count in rows] if self._config.ratio_in == "tokens" else list(rows)
        for count, amount, is_replayed in zip(rows, amounts, (False, True), strict=True):
            self._queue.ratio.learn_tokens(count, amount, replayed=is_replayed)
        seen, amount = (sum(rows), sum(amounts)) if replacing else (rows[0], amounts[0])
        self._queue.count_micro_batch(turn, seen, amount, amounts[1])
        if self._step >= WARM_UP:
            before = self.seen.setdefault(size, [0, 0])
            before[:] = before[0] + amounts[0], before[1] + amounts[1]

    def _tokens(self, rows: int) -> int:
        first, self._place = self._place, (self._place + rows) % 60_000
        return int(self.lengths[first + rows] - self.lengths[first])

    def _arrival(self, rows: int) -> Arrival | None:
        if not rows:
            return None
        packed, none = torch.zeros((rows, self.layout.row_bytes), dtype=torch.uint8), np.empty(0, dtype=np.int64)
        plan = Plan(none, none, np.array([0]), np.array([rows]), np.zeros(rows, dtype=np.int64), rows)
        return Arrival(packed, Outgoing(packed[:0], self.layout, plan, none, none))
