"""The words that ranks tell each other: where each stands, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed import header
from rehearsal_plugin.distributed.header import (
    FIXED,
    NOTES,
    PARTITION_WORDS,
    PARTITIONS,
    Headers,
    Notes,
    PartitionWord,
    Word,
    compose,
)
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ExchangeError

PAIRS = np.array([[7, 2], [-3, 5]])
ALL_NOTES = Notes(mixture=11, loss_sum=12, loss_weight=13, losses_measured=14)


def headers_of(*ranks: tuple[int, int], nearest: IntArray | None = None) -> Headers:
    """Headers of ranks by fingerprint and step."""
    words = [
        compose(mark, step, Request(6, 7, 8, 9), 2, 10, ALL_NOTES, PAIRS, 4, nearest, width=15) for mark, step in ranks
    ]
    return Headers(np.stack(words), 4)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (Word.FINGERPRINT, 99),
        (Word.STEP, 3),
        (Word.REQUEST, 6),
        (Word.NUMERATOR, 7),
        (Word.DENOMINATOR, 8),
        (Word.CARRY, 9),
        (Word.CHANGES, 2),
        (Word.PROMISE, 10),
        (Word.WIDTH, 15),
        (Word.MIXTURE, 11),
        (Word.LOSS_SUM, 12),
        (Word.LOSS_WEIGHT, 13),
        (Word.LOSSES_MEASURED, 14),
    ],
)
def test_a_word_is_read_where_it_was_written(word: Word, value: int) -> None:
    assert headers_of((99, 3), (99, 3)).of(word).tolist() == [value, value]


def test_pairs_come_back_by_rank() -> None:
    pairs = headers_of((99, 3), (99, 3)).pairs
    assert pairs.shape == (2, 4, 2)
    assert pairs[1, :2].tolist() == PAIRS.tolist()
    assert not pairs[:, 2:].any()


def test_words_of_the_nearest_draw_stand_behind_the_pairs() -> None:
    assert headers_of((99, 3), nearest=np.array([8, 9])).nearest.tolist() == [[8, 9]]
    assert headers_of((99, 3)).nearest.shape == (1, 0)


def test_notes_are_the_words_of_the_layers_above_and_a_copy() -> None:
    headers = headers_of((99, 3))
    notes = headers.notes
    assert notes.tolist() == [[11, 12, 13, 14]]
    notes[:] = 0
    assert headers.of(Word.MIXTURE).tolist() == [11]
    assert notes.shape[1] == NOTES


def test_a_header_has_the_width_of_its_room_whatever_it_says() -> None:
    for pairs in (PAIRS[:0], PAIRS):
        assert len(compose(1, 2, Request(3), len(pairs), 0, Notes(), pairs, 4)) == FIXED + 8


def test_ranks_that_agree_are_taken() -> None:
    headers_of((99, 3), (99, 3)).check(0)


def test_a_rank_at_another_step_is_named_with_both_steps() -> None:
    with pytest.raises(ExchangeError, match=r"rank 0 is at step 3; rank 1, at step 4, has another step; call update"):
        headers_of((99, 3), (99, 4)).check(0)


def test_a_rank_with_other_rows_is_named_before_its_step() -> None:
    with pytest.raises(ExchangeError, match=r"rank 1 is at step 4; rank 0, at step 3, has rows of other fields"):
        headers_of((99, 3), (98, 4)).check(1)


def test_every_word_stands_in_the_table() -> None:
    assert header.__doc__ is not None
    assert all(f"`{word.name}`" in header.__doc__ for kind in (Word, header.NearestWord) for word in kind)


def test_losses_by_partition_stand_before_the_nearest_draw() -> None:
    losses = tuple(range(100, 100 + PARTITION_WORDS))
    words = compose(1, 2, Request(0), 0, 0, Notes(losses=losses), PAIRS, 4, np.array([7, 8]))
    headers = Headers(np.stack([words, words]), 4, losses=PARTITION_WORDS)
    assert headers.losses.shape == (2, PARTITIONS, len(PartitionWord))
    assert tuple(headers.losses[1].ravel()) == losses
    assert headers.nearest.tolist() == [[7, 8]] * 2


def test_the_opening_is_equally_wide_with_and_without_losses() -> None:
    """So that a rank with another section can say so."""
    opening = np.arange(5)
    without = compose(1, 2, Request(0), 0, 0, Notes(), PAIRS, 4, None, opening)
    losses = compose(1, 2, Request(0), 0, 0, Notes(losses=(9,) * PARTITION_WORDS), PAIRS, 4, None, opening)
    headers = Headers(np.stack([without, losses]), 4, len(opening), PARTITION_WORDS)
    assert headers.opening.tolist() == [opening.tolist()] * 2
    assert headers.losses[0].tolist() == [[0] * len(PartitionWord)] * PARTITIONS


def test_headers_of_jobs_that_follow_no_losses_have_none() -> None:
    assert headers_of((1, 2)).losses.shape == (1, 0, len(PartitionWord))
