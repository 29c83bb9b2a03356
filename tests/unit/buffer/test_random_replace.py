"""Every row is kept, in the place of a random one. Tests of chance have fixed seeds."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from tests.helpers.chance import SIGNIFICANCE
from tests.helpers.policy_runs import Simulation, outcomes


def test_random_replace_keeps_every_row_until_the_buffer_is_full() -> None:
    assert Simulation("random_replace", 10).run([[0] * 4, [0] * 6]).kept() == frozenset(range(10))


def test_random_replace_always_keeps_the_last_row() -> None:
    assert all(19 in simulation.kept() for simulation in outcomes("random_replace", 4, [[0] * 7, [0] * 13], 200))


@pytest.mark.parametrize("row", [0, 7, 8, 20, 30], ids=lambda row: f"row {row}")
@pytest.mark.parametrize("size", [1, 8, 40], ids=lambda size: f"batches of {size}")
def test_random_replace_decays_geometrically(row: int, size: int) -> None:
    """A row survives each later one with probability 1 - 1/capacity, once the buffer is full."""
    capacity, stream, trials = 8, 40, 600
    simulations = outcomes("random_replace", capacity, [[0] * size] * (stream // size), trials)
    survived = sum(row in simulation.kept() for simulation in simulations)
    chance = (1 - 1 / capacity) ** (stream - max(row + 1, capacity))
    assert binomtest(survived, trials, chance).pvalue > SIGNIFICANCE
