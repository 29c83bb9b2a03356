"""Checks of what a rank knew of the others in loaded state; see `validation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.checkpoint.account_checks import LARGEST, MOST, check_int, check_ints
from rehearsal_plugin.checkpoint.array_checks import check_array, check_distinct
from rehearsal_plugin.distributed.header import NOTES, PartitionWord
from rehearsal_plugin.distributed.header_schedule import LONGEST
from rehearsal_plugin.distributed.request import LARGEST_TOLD

__all__ = ["check_census", "place_in_group"]

MOST_PAIRS = 1 << 24


def place_in_group(scope: Any, rank: int, size: int, pipeline: Mapping[str, Any]) -> tuple[int, int]:
    """The place of one of `size` ranks among those that it drew from, and how many these were.

    Args:
        scope: `sampling.scope` of the job.
        rank: The rank.
        size: How many saved.
        pipeline: State of its prefetcher.
    """
    if scope == "local":
        return 0, 1
    groups = pipeline["census"].get("groups")
    if groups is None:
        return rank, size
    check_array(groups, np.int64, (size,), 0, size - 1)
    return int(np.count_nonzero(groups[:rank] == groups[rank])), int(np.count_nonzero(groups == groups[rank]))


def check_census(census: Mapping[str, Any], ranks: int, all_ranks: int, step: int) -> None:
    """Check the state of a `Census` before the exchange `step`: of so many ranks that drew from each other, of all."""
    _check_round(census, ranks, step)
    if "of_all" in census:
        _check_round(census["of_all"], all_ranks, step)


def _check_round(known: Mapping[str, Any], ranks: int, step: int) -> None:
    columns = check_array(known["keys"], np.int64, (None,))
    check_distinct(known["keys"])
    check_array(known["counts"], np.int64, (ranks, columns), 0, MOST)
    if "offers" in known:
        check_array(known["offers"], np.int64, (ranks, columns), 0, MOST)
    check_array(known["notes"], np.int64, (ranks, NOTES))
    if "losses" in known:
        check_array(known["losses"], np.int64, (ranks, None, len(PartitionWord)))
    for name in ("pairs", "least"):
        pairs = check_int(known[name], 1, MOST_PAIRS)
        if pairs & (pairs - 1):
            raise ValueError("headers of no possible length")
    if "schedule" in known:  # earlier releases had headers in every exchange
        check_array(known["requests"], np.int64, (ranks,), 0, MOST)
        check_array(known["rates"], np.int64, (3, ranks), 0, LARGEST_TOLD - 1)
        _check_schedule(known["schedule"], check_int(known["heard_at"], 0, step))


def _check_schedule(schedule: Mapping[str, Any], heard_at: int) -> None:
    """Check the state of a `HeaderSchedule`, of which the last headers were those of the exchange `heard_at`."""
    check_int(schedule["unchanged"])
    if schedule["first"] is None:
        check_int(schedule["next"], 0, 0)
    else:
        check_int(schedule["first"], 0, heard_at)
        check_int(schedule["next"], heard_at + 1, heard_at + LONGEST)
    check_ints([abs(word) for word in schedule["told"]], LARGEST)
