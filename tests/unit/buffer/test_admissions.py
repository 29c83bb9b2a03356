"""Step and rank of admission of every row."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.buffer.admissions import Admissions

EVERY = slice(None)


def test_a_row_has_the_step_and_the_rank_of_its_admission() -> None:
    admissions = Admissions(4, rank=2)
    admissions.note_admission(np.array([0, 3]), step=7)
    assert admissions.steps(np.array([3, 0])).tolist() == [7, 7]
    assert admissions.ranks(np.array([3, 0])).tolist() == [2, 2]


def test_a_slot_without_a_row_has_no_step() -> None:
    assert Admissions(2, rank=0).steps(EVERY).tolist() == [-1, -1]


def test_a_row_that_replaces_another_has_its_own_step() -> None:
    admissions = Admissions(3, rank=0)
    admissions.note_admission(np.array([0, 1]), step=1)
    admissions.note_admission(np.array([1]), step=5)
    assert admissions.steps(EVERY).tolist() == [1, 5, -1]


def test_rows_of_other_ranks_keep_their_rank_until_they_are_replaced() -> None:
    admissions = Admissions(4, rank=0)
    admissions.take_over(np.array([3, 4, 5]), np.array([1, 0, 2], dtype=np.int32))
    admissions.note_admission(np.array([0, 3]), step=9)
    assert admissions.ranks(EVERY).tolist() == [0, 0, 2, 0]
    assert admissions.steps(EVERY).tolist() == [9, 4, 5, 9]


@pytest.mark.parametrize("ranks", [[0, 0], [0, 1]], ids=["its own", "others"])
def test_ranks_are_32_bit_numbers(ranks: list[int]) -> None:
    admissions = Admissions(2, rank=0)
    admissions.take_over(np.array([1, 1]), np.array(ranks, dtype=np.int32))
    assert admissions.ranks(EVERY).dtype == np.int32
    assert admissions.ranks(EVERY).tolist() == ranks


def test_rows_of_this_rank_alone_take_no_memory_for_ranks() -> None:
    admissions = Admissions(2, rank=3)
    admissions.take_over(np.array([1, 1]), np.array([3, 3], dtype=np.int32))
    assert admissions._ranks is None


def test_steps_and_ranks_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 steps and 1 ranks"):
        Admissions(4, rank=0).take_over(np.array([1, 2]), np.array([0], dtype=np.int32))
