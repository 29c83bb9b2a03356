"""Time of rehearsal in the classification study: steps of er against plain steps with as many rows, in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from scripts.studies.arms import ER, INCREMENTAL, Arm, Row
from scripts.studies.classification_train import Course, new_learner
from scripts.studies.knobs import Knobs
from scripts.studies.learner import Batch, Learner

__all__ = ["SEGMENT", "summarise_times", "time_in_turns"]

SEGMENT = 20
"""Steps that one side makes before it is the other's turn."""

PLAIN = "plain"


def time_in_turns(course: Course, knobs: Knobs, pairs: int, progress: tqdm[Any]) -> list[Row]:
    """Milliseconds a step of both sides, a line for each pair of segments.

    The sides swap places every time, so that a busy moment of the machine hits both alike. The buffer holds 30 % of
    the images; plain training takes b + r new images a step.
    """
    arm, rows = Arm(ER, 30.0, 0, course.representatives, table="time"), course.batch + course.representatives
    steps = SEGMENT * (pairs + 1)
    sides = {
        ER: (new_learner(arm, knobs, course.capacity(arm)), course.shuffled(steps, course.batch, 0)),
        PLAIN: (new_learner(replace(arm, method=INCREMENTAL), knobs, 0), course.shuffled(steps, rows, 0)),
    }
    lines: list[Row] = []
    for pair in range(pairs + 1):
        order = [ER, PLAIN] if pair % 2 else [PLAIN, ER]
        lines.append(
            {"table": "time", "pair": pair} | {f"{side}_ms": _segment(*sides[side], progress) for side in order}
        )
    sides[ER][0].close()
    return lines[1:]  # the first pair warms up, and puts rows into the buffer


def summarise_times(lines: Sequence[Row]) -> dict[str, float]:
    """The median of the pairs' ratios with its quartiles, and the median steps."""
    er, plain = (np.array([line[f"{side}_ms"] for line in lines]) for side in (ER, PLAIN))
    low, middle, high = np.quantile(er / plain, [0.25, 0.5, 0.75]).tolist()
    return {
        "er_time_ratio": middle,
        "er_time_ratio_q1": low,
        "er_time_ratio_q3": high,
        "er_step_ms": float(np.median(er)),
        "plain_step_ms": float(np.median(plain)),
    }


def _segment(learner: Learner, batches: Iterator[Batch], progress: tqdm[Any]) -> float:
    """Mean milliseconds of a step.

    The first step does not count: what the other side left running in the background would be charged to it.
    """
    dist.barrier()
    for step in range(SEGMENT):
        if step == 1:
            start = time.perf_counter()
        learner.step(next(batches))
        progress.update()
    return 1e3 * (time.perf_counter() - start) / (SEGMENT - 1)
