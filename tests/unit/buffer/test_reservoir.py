"""A reservoir: every row offered so far is kept with the same chance. Tests of chance have fixed seeds."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

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
