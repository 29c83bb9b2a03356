"""What waits to be told of the losses by partition, and what all ranks told together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import PARTITION_WORDS, PARTITIONS, PartitionWord
from rehearsal_plugin.runtime.partition_losses import FIXED_POINT, LARGEST_LOSS, PartitionLosses, Tally, totals


def told(*ranks: PartitionLosses) -> IntArray:
    """`[ranks, places, 5]`."""
    return np.array([rank.words for rank in ranks]).reshape(len(ranks), PARTITIONS, len(PartitionWord))


def tally(rows: int, loss: float = 2.0, new_rows: int = 0) -> Tally:
    return Tally.measured(loss * rows, rows, rows, new_rows)


def test_ranks_tell_sums_that_add_up() -> None:
    first, second = PartitionLosses(), PartitionLosses()
    first.add({7: tally(3, 2.0), -1: tally(0, new_rows=5)})
    second.add({7: tally(1, 4.0)})
    together = totals(told(first, second))
    assert together[7].mean == 2.5
    assert together[7].rows == 4
    assert together[-1] == Tally(new_rows=5)


def test_words_are_as_many_whatever_there_is_to_tell() -> None:
    waiting = PartitionLosses()
    assert waiting.words == (0,) * PARTITION_WORDS
    waiting.add({key: tally(1) for key in range(50)})
    assert len(waiting.words) == PARTITION_WORDS
    assert totals(told(PartitionLosses())) == {}


def test_partitions_that_find_no_place_are_told_of_later() -> None:
    waiting = PartitionLosses()
    heard: dict[int, Tally] = {}
    waiting.add({key: tally(100 - key) for key in range(20)})
    for _ in range(3):
        words = told(waiting)
        heard |= totals(words)
        waiting.take_off(words[0])
    assert {key: one.rows for key, one in heard.items()} == {key: 100 - key for key in range(20)}
    assert waiting.words == (0,) * PARTITION_WORDS


def test_what_is_measured_while_words_are_on_their_way_is_told_next() -> None:
    waiting = PartitionLosses()
    waiting.add({7: tally(3)})
    on_their_way = told(waiting)
    waiting.add({7: tally(2, 5.0)})
    waiting.take_off(on_their_way[0])
    assert totals(told(waiting)) == {7: tally(2, 5.0)}


@pytest.mark.parametrize("total", [math.nan, math.inf, 2 * LARGEST_LOSS])
def test_a_sum_that_is_no_number_tells_of_new_rows_alone(total: float) -> None:
    assert Tally.measured(total, 3.0, 3, 4) == Tally(new_rows=4)


def test_a_partition_with_few_rows_is_left_out_where_there_are_too_many() -> None:
    waiting = PartitionLosses()
    waiting.add({key: tally(1 + (key == 4000)) for key in range(5000)})
    assert len(waiting.state_dict()["waiting"]) == 1024
    assert waiting.words[0] == 4000


def test_what_waits_is_in_the_state() -> None:
    waiting, loaded = PartitionLosses(), PartitionLosses()
    waiting.add({7: tally(3, 1 / 3, 9)})
    loaded.load_state_dict(waiting.state_dict())
    assert loaded.words == waiting.words
    assert loaded.words[PartitionWord.SUM] == FIXED_POINT
