"""What ranks ask for, told once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from rehearsal_plugin.distributed.request import Request, requests_after


@pytest.mark.parametrize(
    ("numerator", "denominator", "carry"), [(8, 3, 0), (8, 3, 2), (7, 1, 0), (1, 19, 18), (0, 1, 0)]
)
def test_the_sum_of_what_is_asked_for_follows_the_rate(numerator: int, denominator: int, carry: int) -> None:
    rates, exact, total = np.array([[numerator], [denominator], [carry]]), Fraction(carry, denominator), 0
    for exchanges in range(1, 200):
        exact += Fraction(numerator, denominator)
        total += int(requests_after(rates, exchanges)[0])
        assert total == exact.numerator // exact.denominator


def test_a_rank_that_tells_nothing_asks_for_nothing_later() -> None:
    assert not Request(5).is_steady
    assert requests_after(np.array([[0], [0], [0]]), 3).tolist() == [0]


def test_largest_terms_fit() -> None:
    most = (1 << 31) - 1
    assert requests_after(np.array([[most], [1], [0]]), 1 << 31).tolist() == [most]
