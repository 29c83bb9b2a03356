"""A running sum of fractions is exact."""

from __future__ import annotations

import random
from fractions import Fraction

from rehearsal_plugin.core.exact_sum import ExactSum


def test_it_is_the_sum_of_the_fractions() -> None:
    draw, total, exact = random.Random(0), ExactSum(), Fraction(0)
    for _ in range(200):
        numerator, denominator, times = draw.randint(-9, 9), draw.randint(1, 12), draw.choice((-1, 1))
        total.add((numerator, denominator), times)
        exact += times * Fraction(numerator, denominator)
        assert Fraction(*total.ratio) == exact
        assert total.reduced == [exact.numerator, exact.denominator]
        assert total.floor() == exact // 1
        assert total.floor(7) == exact // 7


def test_terms_of_one_denominator_keep_it() -> None:
    total = ExactSum((1, 6))
    for _ in range(3):
        total.add((1, 6))
        total.add((1, 3))
    assert total.ratio == (10, 6)
