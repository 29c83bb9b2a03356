"""A running sum of fractions: exact, and in the steady state no more than an addition of two whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeAlias

__all__ = ["ExactSum", "Ratio"]

Ratio: TypeAlias = tuple[int, int]
"""Numerator and denominator, which may have a common divisor; the denominator is above 0."""


class ExactSum:
    """A sum over one denominator, of which that of every term so far is a divisor.

    `Fraction` reduces each result, which takes ten times as long. Here a new denominator is rare, and the terms of the
    next steps have it too. For example::

        terms        1/4    1/4    1/6    1/4
        numerator    1      2      8      11
        denominator  4      4      12     12

    Args:
        value: Where it begins.
    """

    __slots__ = ("denominator", "numerator")

    def __init__(self, value: Ratio = (0, 1)) -> None:
        self.numerator, self.denominator = value

    def add(self, term: Ratio, times: int = 1) -> None:
        """Add a term; -1 times subtracts it."""
        numerator, denominator = term
        if denominator != self.denominator:
            common = math.lcm(self.denominator, denominator)
            self.numerator *= common // self.denominator
            numerator *= common // denominator
            self.denominator = common
        self.numerator += times * numerator

    def floor(self, unit: int = 1) -> int:
        """How many whole `unit` there are in it."""
        return self.numerator // (self.denominator * unit)

    @property
    def ratio(self) -> Ratio:
        """Its present value."""
        return self.numerator, self.denominator

    @property
    def reduced(self) -> list[int]:
        """Its present value in lowest terms, as checkpoints have it."""
        value = Fraction(self.numerator, self.denominator)
        return [value.numerator, value.denominator]
