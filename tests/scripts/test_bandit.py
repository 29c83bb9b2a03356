"""The bandit that mixes old languages in the recipe."""

from __future__ import annotations

import math

import pytest

from scripts.llm.bandit import Exp3


def test_arms_are_alike_at_first() -> None:
    assert Exp3([0, 1, 2], 3000).probabilities == pytest.approx(dict.fromkeys(range(3), 1 / 3))


def test_the_rate_is_that_of_the_bound_on_the_regret() -> None:
    assert Exp3([0, 1], 3000).rate == pytest.approx(math.sqrt(2 * math.log(2) / ((math.e - 1) * 3000)))


def test_an_arm_is_drawn_by_what_it_gained_for_each_row() -> None:
    bandit = Exp3([0, 1], 50)
    bandit.learn({0: 0.3, 1: 0.1}, {0: 3, 1: 1})
    estimates = [0.3 * (3 / 4) / 0.5, 0.1 * (1 / 4) / 0.5]
    weights = [math.exp(bandit.rate * estimate / 2) for estimate in estimates]
    expected = (1 - bandit.rate) * weights[0] / sum(weights) + bandit.rate / 2
    assert bandit.probabilities[0] == pytest.approx(expected)
    assert sum(bandit.probabilities.values()) == pytest.approx(1)


def test_none_is_lost_sight_of() -> None:
    bandit = Exp3([0, 1], 50)
    for _ in range(10_000):
        bandit.learn({0: 1.0, 1: 0.0}, {0: 4, 1: 0})
    assert bandit.probabilities[1] == pytest.approx(bandit.rate / 2)


def test_a_step_without_rows_teaches_nothing() -> None:
    bandit = Exp3([0, 1], 50)
    bandit.learn({0: 1.0, 1: 0.0}, {0: 0, 1: 0})
    assert bandit.probabilities == {0: 0.5, 1: 0.5}
