"""Uniform samples without replacement. Statistics are tested at the significance of `tests.helpers.chance`."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.distributed.without_replacement import choose
from tests.helpers.chance import SIGNIFICANCE, equally_likely


@pytest.mark.parametrize("wanted", [0, 1, 4, 5, 9, 10])
def test_choosing_never_repeats(wanted: int) -> None:
    segment, item = choose(np.array([10, 10]), np.array([wanted, 10 - wanted]), np.random.default_rng(0))
    pairs = list(zip(segment.tolist(), item.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 10


def test_choosing_from_many_ranges_keeps_them_apart() -> None:
    """Every combination of a single and a pair out of ranges of 3 and 4: 3 x 6."""
    sizes, wanted = np.array([3, 4]), np.array([1, 2])
    drawn = []
    for seed in range(4000):
        segment, item = choose(sizes, wanted, np.random.default_rng(seed))
        drawn.append(frozenset(zip(segment.tolist(), item.tolist(), strict=True)))
    assert equally_likely(drawn, 18) > SIGNIFICANCE


def test_choosing_nothing_from_nothing() -> None:
    segment, item = choose(np.array([0]), np.array([0]), np.random.default_rng(0))
    assert (len(segment), len(item)) == (0, 0)


@pytest.mark.parametrize("size", [40, 1 << 50])
def test_no_item_stands_twice_in_a_segment_however_large_the_numbers(size: int) -> None:
    wanted = np.random.default_rng(0).integers(3, 20, 1 << 14)
    segment, item = choose(np.full(len(wanted), size), wanted, np.random.default_rng(1))
    assert np.array_equal(np.bincount(segment), wanted)
    assert len(np.unique(np.stack((segment, item)), axis=1)[0]) == wanted.sum()
    assert 0 <= item.min() <= item.max() < size
