"""A reservoir: every row offered so far is kept with the same chance. Tests of chance have fixed seeds."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from scipy.stats import binomtest

from rehearsal_plugin.buffer.policies.reservoir import algorithm_r, thinned_places
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely
from tests.helpers.policy_runs import BATCHINGS, Simulation, outcomes


@pytest.mark.parametrize("sizes", BATCHINGS.values(), ids=list(BATCHINGS))
def test_reservoir_keeps_every_set_of_rows_with_the_same_chance(sizes: list[int]) -> None:
    """All 20 sets of 3 out of 6 rows: single rows, pairs and triples at once."""
    batches = [[0] * size for size in sizes]
    kept = [simulation.kept() for simulation in outcomes("reservoir", 3, batches, 2500)]
    assert equally_likely(kept, 20) > SIGNIFICANCE


def test_reservoir_of_one_row_keeps_any_row_with_the_same_chance() -> None:
    kept = [simulation.kept() for simulation in outcomes("reservoir", 1, [[0] * 3, [0] * 4, [0]], 2500)]
    assert equally_likely(kept, 8) > SIGNIFICANCE


def test_reservoir_keeps_rows_of_a_long_stream_with_the_same_chance() -> None:
    batches = [[0] * size for size in np.random.default_rng(0).integers(0, 90, 20)]
    simulations = outcomes("reservoir", 50, batches, 600)
    counts = Counter(chain.from_iterable(simulation.kept() for simulation in simulations))
    rows = len(simulations[0].stream)
    assert equally_included([counts[row] for row in range(rows)], len(simulations), 50) > SIGNIFICANCE


def test_reservoir_ignores_partitions() -> None:
    stream = [[0, 1, 1], [2, 0, 0, 1]]
    rows = [Simulation("reservoir", 3, seed=5, partitioned=split).run(stream).rows for split in (True, False)]
    assert rows[0] == rows[1]


def test_a_batch_of_algorithm_r_gives_no_place_twice() -> None:
    for seed in range(50):
        slots = algorithm_r(4, 30, 3, np.random.default_rng(seed))
        kept = slots[slots >= 0].tolist()
        assert len(set(kept)) == len(kept) <= 3


def test_a_reservoir_with_room_that_has_turned_rows_away_takes_new_ones_with_the_chance_of_the_old() -> None:
    """20 of 100 rows are stored, with room for 60."""
    taken = sum(int((thinned_places(100, 20, 30, 60, np.random.default_rng(seed)) >= 0).sum()) for seed in range(400))
    assert binomtest(taken, 30 * 400, 20 / 100).pvalue > SIGNIFICANCE


def test_a_thinned_reservoir_goes_on_by_algorithm_r_once_its_room_is_filled() -> None:
    """The last of 400 rows is kept with the chance 10 / 600, as by a reservoir that was always full."""
    kept = sum(int(thinned_places(200, 5, 400, 10, np.random.default_rng(seed))[-1] >= 0) for seed in range(6000))
    assert binomtest(kept, 6000, 10 / 600).pvalue > SIGNIFICANCE


def test_a_thinned_reservoir_takes_new_places_in_order() -> None:
    for seed in range(50):
        slots = thinned_places(20, 2, 30, 6, np.random.default_rng(seed))
        fresh = sorted(slots[slots >= 2].tolist())
        assert fresh == list(range(2, 2 + len(fresh)))
