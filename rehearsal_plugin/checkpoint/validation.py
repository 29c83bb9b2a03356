"""Type, shape and range checks of all loaded state that a job acts on.

A checksum detects accidents, and a forged file can have a valid one. No number in such a file may cause more than an
error that names the file. All checks raise ValueError, TypeError or LookupError; `report_contradictions` turns these
into a CheckpointError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import narrowed
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer, TrimmedRows
from rehearsal_plugin.checkpoint.account_checks import (
    LARGEST,
    MOST,
    check_account,
    check_int,
    check_ints,
    check_schedule,
)
from rehearsal_plugin.checkpoint.array_checks import check_array, check_distinct
from rehearsal_plugin.checkpoint.census_checks import check_census
from rehearsal_plugin.config import SamplingConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import NOTES

__all__ = ["LAST_STEP", "ExpectedState", "check_buffer", "check_progress"]

LAST_STEP = 1 << 40
"""Random numbers are keyed by steps of at most 43 bits."""

MOST_DRAWS = 64
"""Draws of a strategy."""


@dataclass(frozen=True, kw_only=True)
class ExpectedState:
    """Sizes that the state of one rank must have.

    Attributes:
        layout: Of the rows.
        ranks: Ranks that exchange rows.
        rank: This rank among them.
        all_ranks: Ranks of the job.
        draws: Independent draws of a step.
        width: Numbers in the score of a row.
    """

    layout: RowLayout
    ranks: int
    rank: int
    all_ranks: int
    draws: int
    width: int


def check_buffer(buffer: Mapping[str, Any], row_bytes: int) -> int:
    """Check the state of a buffer; returns its number of rows."""
    index, count = buffer["index"], _check_rows(buffer["rows"], row_bytes)
    check_array(buffer["written"], np.int64, (count,), 0, LAST_STEP)
    check_array(buffer["origin"], np.int32, (count,), 0, LARGEST)
    check_int(buffer["calls"])
    check_int(index["count"], count, count)
    check_int(index["seen"], count)
    check_int(index.get("capacity", 1), 1)
    if index["partitions"] is not None:
        _check_partitions(index["partitions"], count)
    if index["values"] is not None:
        _check_values(index["values"], count)
    return count


def check_progress(
    progress: Mapping[str, Any], expected: ExpectedState | None, buffer: Mapping[str, Any] | None, step: int
) -> None:
    """Check all other state of a rank; without rows, `expected` and `buffer` are None."""
    coordinator = progress["supply"]
    prefetcher = coordinator["pipeline"]
    check_int(coordinator["first_step"], 0, step)
    check_schedule(coordinator["schedule"])
    check_ints(coordinator["amounts"], MOST)
    if not isinstance(coordinator["words"], list) or len(coordinator["words"]) != NOTES - 1:
        raise ValueError("other notes than there is room for")
    for word in (*coordinator["words"], coordinator["heard"]):
        check_int(word, -LARGEST, LARGEST)
    if coordinator["guard"] is not None:
        _check_guard(coordinator["guard"])
    if "forgetting" in coordinator:
        _check_forgetting(coordinator["forgetting"], coordinator["partitions"])
    in_flight = prefetcher is not None and prefetcher["in_flight"]
    if not isinstance(in_flight, bool) or len(coordinator["asked"]) != 1 + in_flight:
        raise ValueError("another number of requests than there are exchanges on their way")
    for shares in coordinator["asked"]:
        check_ints(shares, LARGEST)
    if coordinator.get("account") is not None:  # earlier releases kept none
        check_account(coordinator["account"], len(coordinator["amounts"]), len(coordinator["asked"]))
    if (prefetcher is None) != (expected is None) or (buffer is None) != (expected is None):
        raise ValueError("rows without progress, or progress without rows")
    if expected is None or buffer is None:
        if coordinator["ready"] is not None or coordinator["spent"] is not None:
            raise ValueError("replayed rows before there were any")
        return
    check_int(expected.draws, 1, MOST_DRAWS)
    stored = len(buffer["rows"])
    values = buffer["index"]["values"]
    if values is not None and values["stored"].shape[1] != expected.width:
        raise ValueError("rows are judged by another number of values")
    for name in ("ready", "spent"):
        if coordinator[name] is not None:
            _check_ready(coordinator[name], expected, stored)
    _check_prefetcher(prefetcher, expected, stored, step)


def _check_prefetcher(prefetcher: Mapping[str, Any], expected: ExpectedState, stored: int, step: int) -> None:
    check_int(prefetcher["step"], step, step)
    check_int(prefetcher["micro_batch"])
    staged = _check_rows(prefetcher["staged"], expected.layout.row_bytes)
    longest = expected.layout.longest or 0
    if "bounds" in prefetcher:  # earlier releases did not keep any
        check_array(prefetcher["bounds"], np.int64, (staged,), 0, longest)
        _check_bounds(prefetcher["staged"], prefetcher["bounds"], expected.layout)
    if "row_width" in prefetcher:
        check_int(prefetcher["row_width"]["waiting"], 0, longest)
        _packing(expected.layout, prefetcher["row_width"]["told"] or None)
    outgoing, arrival = prefetcher["outgoing"], prefetcher["arrival"]
    check_census(prefetcher["census"], expected.ranks, expected.all_ranks, step)
    _packing(expected.layout, prefetcher["census"].get("width") or None)
    for weights in (prefetcher["mixture"]["weights"], prefetcher["mixture"]["proposed"]):
        _check_weights(weights)
    neighbours = prefetcher.get("neighbours")
    if neighbours is not None:
        _check_neighbours(neighbours, expected, stored)
    if outgoing is not None:
        sent, _ = _check_outgoing(outgoing, expected, stored)
        _check_rows(outgoing["rows"], _packing(expected.layout, outgoing.get("width")).row_bytes, sent)
    if arrival is not None:
        _check_arrival(arrival, expected, stored)
    if (arrival is not None or prefetcher["in_flight"]) and (outgoing is None or not prefetcher["in_flight"]):
        raise ValueError("an exchange on its way without what it brings")


def _check_neighbours(neighbours: Mapping[str, Any], expected: ExpectedState, stored: int) -> None:
    check_int(neighbours["largest"])
    counts, answers = neighbours["wanted"], 0
    if counts is not None:
        check_array(counts, np.int64, (expected.ranks,), 0, MOST)
        answers = sum(counts.tolist())
    check_array(neighbours["own"], np.int64, (2, answers))
    check_array(neighbours["own"][1], np.int64, (answers,), -1, stored - 1)


def _check_ready(ready: Mapping[str, Any], expected: ExpectedState, stored: int) -> None:
    received = _check_arrival(ready["arrival"], expected, stored)
    if ready["orders"].keys() != {str(turn) for turn in range(expected.draws)}:
        raise ValueError("another number of draws")
    for order in ready["orders"].values():
        check_array(order, np.int64, (None,), 0, received - 1)
    check_ints(ready["shares"], LARGEST)
    if ready["state"] is not None:
        _check_rows(ready["state"], expected.layout.state_bytes, received)


def _check_arrival(arrival: Mapping[str, Any], expected: ExpectedState, stored: int) -> int:
    _, received = _check_outgoing(arrival["source"], expected, stored)
    row_bytes = _packing(expected.layout, arrival["source"].get("width")).row_bytes
    _check_rows(arrival["source"]["rows"], row_bytes, 0)
    return _check_rows(arrival["rows"], row_bytes, received)


def _check_bounds(rows: Tensor, bounds: IntArray, layout: RowLayout) -> None:
    """Check that each of the staged rows is padding from its bound on."""
    if layout.pads and (RowTrimmer(layout).lengths(rows.cpu().numpy(), np.arange(len(rows))) > bounds).any():
        raise ValueError("rows that are longer than they are said to be")


def _packing(layout: RowLayout, width: Any) -> RowLayout:
    """How rows are packed that travel with a width; None for as they are stored."""
    return layout if width is None else narrowed(layout, check_int(width, 1, layout.longest or 0))


def _check_outgoing(outgoing: Mapping[str, Any], expected: ExpectedState, stored: int) -> tuple[int, int]:
    """Check a plan and its rows; returns the number of rows that it sends and receives."""
    plan = outgoing["plan"]
    sent, received = (check_array(plan[name], np.int64, (None,)) for name in ("partition", "turns"))
    check_array(plan["index"], np.int64, (sent,))
    check_array(plan["turns"], np.int64, (received,), 0, expected.draws - 1)
    for name, rows in (("send_counts", sent), ("recv_counts", received)):
        if check_ints(_listed(plan[name]), rows) != rows or len(plan[name]) != expected.ranks:
            raise ValueError("a plan for other rows or ranks")
    if plan["send_counts"][expected.rank] != plan["recv_counts"][expected.rank]:
        raise ValueError("a rank that does not get what it gives itself")
    check_int(plan["moved"], max(sent, received))
    check_array(outgoing["slots"], np.int64, (sent,), 0, stored - 1)
    check_array(outgoing["written"], np.int64, (sent if expected.layout.state else 0,), 0, LAST_STEP)
    return sent, received


def _check_partitions(partitions: Mapping[str, Any], count: int) -> None:
    number = check_array(partitions["keys"], np.int64, (None,))
    check_distinct(partitions["keys"])
    for name in ("seen", "sizes"):
        check_array(partitions[name], np.int64, (number,), 0, MOST)
    check_array(partitions["members"], np.int64, (count,))
    seen, sizes = partitions["seen"], partitions["sizes"]
    if sum(sizes.tolist()) != count or sum(seen.tolist()) > MOST or (seen < sizes).any():
        raise ValueError("partitions do not share out the rows")
    if not np.array_equal(np.sort(partitions["members"]), np.arange(count)):
        raise ValueError("a row without a partition")


def _check_values(values: Mapping[str, Any], count: int) -> None:
    check_array(values["stored"], np.float32, (count, None))
    number = check_array(values["seen"], np.int64, (None,), 0, MOST)
    check_array(values["sums"], np.float64, (number, values["stored"].shape[1]))
    if not (np.isfinite(values["stored"]).all() and np.isfinite(values["sums"]).all()):
        raise ValueError("values that are no numbers")


def _check_rows(rows: Any, width: int, count: int | None = None) -> int:
    """Check packed rows `[count, width]` uint8; returns their number."""
    if isinstance(rows, TrimmedRows) and rows.shape[1] == width:  # checked when they were read
        return len(rows)
    valid = isinstance(rows, Tensor) and rows.dtype == torch.uint8 and rows.ndim == 2 and rows.shape[1] == width
    if not valid or (count is not None and len(rows) != count):
        raise ValueError(f"no rows of {width} bytes")
    return len(rows)


def _check_guard(guard: Mapping[str, Any]) -> None:
    numbers = [*guard["window"], *([] if guard["best"] is None else [guard["best"]])]
    if not all(type(number) is float for number in numbers) or type(guard["exceeded"]) is not bool:
        raise ValueError("losses that are no numbers")
    if guard["good"] is not None and not isinstance(guard["good"], str):
        raise ValueError(f"{guard['good']!r} is no folder")
    check_int(guard.get("not_finite", 0))
    for step, folder in guard["pending"]:
        check_int(step)
        if not isinstance(folder, str):
            raise ValueError(f"{folder!r} is no folder")


def _check_forgetting(forgetting: Mapping[str, Any], partitions: Mapping[str, Any]) -> None:
    """Check the state of a `Forgetting`, and of the `PartitionLosses` beside it."""
    heard = check_int(forgetting["meter"]["heard"])
    seen = check_int(forgetting["meter"]["rows"])
    for key, mean, rows, reference, new_at, seen_at, best, *new_rows in forgetting["meter"]["levels"]:
        check_int(key, -LARGEST, LARGEST)
        for number in (mean, *new_rows):  # files of earlier releases do not tell how many new rows came
            _check_number(number)
        check_int(rows)
        if reference is not None:
            _check_number(reference)
        if new_at is not None:
            check_int(new_at, 0, heard)
        check_int(seen_at, 0, seen)
        if best is not None:
            _check_number(best)
    budget = forgetting["budget"]
    if budget is not None:
        _check_number(budget["level"])
        if budget["integral"] is not None:
            _check_number(budget["integral"])
        if type(budget["exceeded"]) is not bool:
            raise ValueError("a budget that is neither exceeded nor met")
    _check_weights(forgetting["weights"])
    for words in partitions["waiting"]:
        for word in words:
            check_int(word, -LARGEST, LARGEST)


def _check_number(number: Any) -> None:
    if type(number) is not float or not math.isfinite(number):
        raise ValueError(f"{number!r} is no number")


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{weights!r} are no weights by partition")
    SamplingConfig.model_validate({"weights": weights})


def _listed(counts: Any) -> Any:
    """Counts by rank as the list that earlier releases had."""
    return counts.tolist() if isinstance(counts, np.ndarray) and counts.dtype == np.int64 else counts
