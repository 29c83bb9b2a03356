"""Whether what a file says holds together: type, shape and range of everything that a job would act on.

A checksum keeps accidents out. Who writes a file on purpose can give it a right one; still, no number in it may lead
to more than an error that names the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.config import SamplingConfig
from rehearsal_plugin.distributed.header import NOTES

__all__ = ["LAST_STEP", "Form", "check_buffer", "check_progress"]

LAST_STEP = 1 << 40
"""Random numbers are keyed by steps of at most 43 bits."""

MOST = 1 << 50
"""Rows offered: sums over many files stay an int64."""

MOST_PAIRS = 1 << 24
"""Partitions of a header."""

MOST_DRAWS = 64
"""Of a strategy."""

LARGEST = (1 << 63) - 1
LARGEST_TERM = 1 << 128  # of a fraction: a ratio of 17 digits carries fractions with terms of twice as many


class Form:
    """What the state of one rank has to look like.

    Args:
        row_bytes: Bytes of a row.
        state_bytes: Of those, bytes of what a strategy recorded.
        ranks: Ranks that exchange rows.
        rank: This one among them.
        draws: Independent draws of a step.
        width: Numbers that a row is judged by.
    """

    def __init__(self, *, row_bytes: int, state_bytes: int, ranks: int, rank: int, draws: int, width: int) -> None:
        self.row_bytes, self.state_bytes = row_bytes, state_bytes
        self.ranks, self.rank, self.draws, self.width = ranks, rank, draws, width


def check_buffer(buffer: Mapping[str, Any], row_bytes: int) -> int:
    """The rows in a buffer's state; ValueError and the like if there is anything wrong with it."""
    index, count = buffer["index"], _packed(buffer["rows"], row_bytes)
    _array(buffer["written"], np.int64, (count,), 0, LAST_STEP)
    _array(buffer["origin"], np.int32, (count,), 0, LARGEST)
    _whole(buffer["calls"])
    _whole(index["count"], count, count)
    _whole(index["seen"], count)
    if index["partitions"] is not None:
        _check_partitions(index["partitions"], count)
    if index["values"] is not None:
        _check_values(index["values"], count)
    return count


def check_progress(progress: Mapping[str, Any], form: Form | None, buffer: Mapping[str, Any] | None, step: int) -> None:
    """ValueError and the like if there is anything wrong; without rows there is no form and no buffer."""
    coordinator = progress["supply"]
    prefetcher = coordinator["pipeline"]
    _whole(coordinator["first_step"], 0, step)
    _check_schedule(coordinator["schedule"])
    _wholes(coordinator["amounts"], MOST)
    if not isinstance(coordinator["words"], list) or len(coordinator["words"]) != NOTES - 1:
        raise ValueError("other notes than there is room for")
    for word in (*coordinator["words"], coordinator["heard"]):
        _whole(word, -LARGEST, LARGEST)
    if coordinator["guard"] is not None:
        _check_guard(coordinator["guard"])
    in_flight = prefetcher is not None and prefetcher["in_flight"]
    if not isinstance(in_flight, bool) or len(coordinator["asked"]) != 1 + in_flight:
        raise ValueError("another number of requests than there are exchanges on their way")
    for shares in coordinator["asked"]:
        _wholes(shares, LARGEST)
    if (prefetcher is None) != (form is None) or (buffer is None) != (form is None):
        raise ValueError("rows without progress, or progress without rows")
    if form is None or buffer is None:
        if coordinator["ready"] is not None or coordinator["spent"] is not None:
            raise ValueError("replayed rows before there were any")
        return
    _whole(form.draws, 1, MOST_DRAWS)
    stored = len(buffer["rows"])
    values = buffer["index"]["values"]
    if values is not None and values["stored"].shape[1] != form.width:
        raise ValueError("rows are judged by another number of values")
    for name in ("ready", "spent"):
        if coordinator[name] is not None:
            _check_ready(coordinator[name], form, stored)
    _check_pipeline(prefetcher, form, stored, step)


def _check_pipeline(prefetcher: Mapping[str, Any], form: Form, stored: int, step: int) -> None:
    _whole(prefetcher["step"], step, step)
    _whole(prefetcher["micro_batch"])
    _packed(prefetcher["staged"], form.row_bytes)
    global_counts, outgoing, arrival = prefetcher["census"], prefetcher["outgoing"], prefetcher["arrival"]
    columns = _array(global_counts["keys"], np.int64, (None,))
    _different(global_counts["keys"])
    _array(global_counts["counts"], np.int64, (form.ranks, columns), 0, MOST)
    _array(global_counts["notes"], np.int64, (form.ranks, NOTES))
    for weights in (prefetcher["mixture"]["weights"], prefetcher["mixture"]["proposed"]):
        _check_weights(weights)
    neighbours = prefetcher.get("neighbours")
    if neighbours is not None:
        _check_neighbours(neighbours, form, stored)
    for name in ("pairs", "least"):
        pairs = _whole(global_counts[name], 1, MOST_PAIRS)
        if pairs & (pairs - 1):
            raise ValueError("headers of no possible length")
    if outgoing is not None:
        sent, _ = _check_outgoing(outgoing, form, stored)
        _packed(outgoing["rows"], form.row_bytes, sent)
    if arrival is not None:
        _check_arrival(arrival, form, stored)
    if (arrival is not None or prefetcher["in_flight"]) and (outgoing is None or not prefetcher["in_flight"]):
        raise ValueError("an exchange on its way without what it brings")


def _check_neighbours(neighbours: Mapping[str, Any], form: Form, stored: int) -> None:
    _whole(neighbours["largest"])
    wanted, answers = neighbours["wanted"], 0
    if wanted is not None:
        _array(wanted, np.int64, (form.ranks,), 0, MOST)
        answers = sum(wanted.tolist())
    _array(neighbours["own"], np.int64, (2, answers))
    _array(neighbours["own"][1], np.int64, (answers,), -1, stored - 1)


def _check_ready(ready: Mapping[str, Any], form: Form, stored: int) -> None:
    received = _check_arrival(ready["arrival"], form, stored)
    if ready["orders"].keys() != {str(turn) for turn in range(form.draws)}:
        raise ValueError("another number of draws")
    for order in ready["orders"].values():
        _array(order, np.int64, (None,), 0, received - 1)
    _wholes(ready["shares"], LARGEST)
    if ready["state"] is not None:
        _packed(ready["state"], form.state_bytes, received)


def _check_arrival(arrival: Mapping[str, Any], form: Form, stored: int) -> int:
    _, received = _check_outgoing(arrival["source"], form, stored)
    _packed(arrival["source"]["rows"], form.row_bytes, 0)
    return _packed(arrival["rows"], form.row_bytes, received)


def _check_outgoing(outgoing: Mapping[str, Any], form: Form, stored: int) -> tuple[int, int]:
    """Rows that the plan sends, and that it receives."""
    plan = outgoing["plan"]
    sent, received = (_array(plan[name], np.int64, (None,)) for name in ("partition", "turns"))
    _array(plan["index"], np.int64, (sent,))
    _array(plan["turns"], np.int64, (received,), 0, form.draws - 1)
    for name, rows in (("send_counts", sent), ("recv_counts", received)):
        if _wholes(plan[name], rows) != rows or len(plan[name]) != form.ranks:
            raise ValueError("a plan for other rows or ranks")
    if plan["send_counts"][form.rank] != plan["recv_counts"][form.rank]:
        raise ValueError("a rank that does not get what it gives itself")
    _whole(plan["moved"], max(sent, received))
    _array(outgoing["slots"], np.int64, (sent,), 0, stored - 1)
    _array(outgoing["written"], np.int64, (sent if form.state_bytes else 0,), 0, LAST_STEP)
    return sent, received


def _check_partitions(partitions: Mapping[str, Any], count: int) -> None:
    number = _array(partitions["keys"], np.int64, (None,))
    _different(partitions["keys"])
    for name in ("seen", "sizes"):
        _array(partitions[name], np.int64, (number,), 0, MOST)
    _array(partitions["members"], np.int64, (count,))
    seen, sizes = partitions["seen"], partitions["sizes"]
    if sum(sizes.tolist()) != count or sum(seen.tolist()) > MOST or (seen < sizes).any():
        raise ValueError("partitions do not share out the rows")
    if not np.array_equal(np.sort(partitions["members"]), np.arange(count)):
        raise ValueError("a row without a partition")


def _check_values(values: Mapping[str, Any], count: int) -> None:
    _array(values["stored"], np.float32, (count, None))
    number = _array(values["seen"], np.int64, (None,), 0, MOST)
    _array(values["sums"], np.float64, (number, values["stored"].shape[1]))
    if not (np.isfinite(values["stored"]).all() and np.isfinite(values["sums"]).all()):
        raise ValueError("values that are no numbers")


def _packed(rows: Any, width: int, count: int | None = None) -> int:
    """How many rows of `width` bytes they are."""
    right = isinstance(rows, Tensor) and rows.dtype == torch.uint8 and rows.ndim == 2 and rows.shape[1] == width
    if not right or (count is not None and len(rows) != count):
        raise ValueError(f"no rows of {width} bytes")
    return len(rows)


def _array(value: Any, dtype: Any, shape: Sequence[int | None], least: int | None = None, most: int = LARGEST) -> int:
    """The length of an array of numbers from `least` to `most`; None stands for any length."""
    right = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == len(shape)
    if not right or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
        raise ValueError(f"no {np.dtype(dtype)} of shape {tuple(shape)}")
    if least is not None and value.size and not (least <= int(value.min()) and int(value.max()) <= most):
        raise ValueError(f"numbers that are not from {least} to {most}")
    return len(value)


def _check_guard(guard: Mapping[str, Any]) -> None:
    numbers = [*guard["window"], *([] if guard["best"] is None else [guard["best"]])]
    if not all(type(number) is float for number in numbers) or type(guard["exceeded"]) is not bool:
        raise ValueError("losses that are no numbers")
    if guard["good"] is not None and not isinstance(guard["good"], str):
        raise ValueError(f"{guard['good']!r} is no folder")
    for step, folder in guard["pending"]:
        _whole(step)
        if not isinstance(folder, str):
            raise ValueError(f"{folder!r} is no folder")


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{weights!r} are no weights by partition")
    SamplingConfig.model_validate({"weights": weights})


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    _whole(schedule["numerator"], -LARGEST_TERM, LARGEST_TERM)
    _whole(schedule["denominator"], 0, LARGEST_TERM)
    for name in ("rows", "tokens"):
        _whole(schedule[name])
    if not isinstance(schedule["known"], bool):
        raise ValueError("rows that are neither known nor unknown")
    for name, least, most in (("boost", 1.0, 1e6), ("most", 0.0, 1.0)):
        if type(schedule[name]) is not float or not least <= schedule[name] <= most:
            raise ValueError(f"{schedule[name]!r} is no number from {least} to {most}")


def _whole(value: Any, least: int = 0, most: int = MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def _wholes(values: Any, most: int) -> int:
    """The sum of a list of whole numbers."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is no list")
    return sum(_whole(value, 0, most) for value in values)


def _different(keys: Any) -> None:
    if len(np.unique(keys)) != len(keys):
        raise ValueError("a partition that stands twice")
