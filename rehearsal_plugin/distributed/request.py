"""Rows that ranks ask for, told once for many exchanges.

A rank whose steps are alike asks for whole numbers of rows whose sum follows a rate. For 8 new rows a step at a ratio
of 0.25 that is 8 / 3 rows, and with nothing carried over::

    exchanges after the header     1   2   3   4   5   6
    rows asked for                 2   3   3   2   3   3      8 n // 3 - 8 (n - 1) // 3

So all ranks know what each asks for as long as its steps stay alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["LARGEST_TOLD", "Request", "requests_after"]

LARGEST_TOLD = 1 << 31
"""The terms of a rate are below it, so that their products stay within an int64."""


@dataclass(frozen=True)
class Request:
    """Rows that a rank asks for in each draw; the terms of a rate are below `LARGEST_TOLD`.

    Attributes:
        rows: In this exchange.
        numerator: Of the rows a step, if those that follow are like this one.
        denominator: Of the same; 0 where the steps that follow are not known.
        carry: What is carried over to the next exchange, over the same denominator.
    """

    rows: int
    numerator: int = 0
    denominator: int = 0
    carry: int = 0

    @property
    def is_steady(self) -> bool:
        """Whether it tells the exchanges that follow."""
        return self.denominator > 0


def requests_after(rates: IntArray, exchanges: int) -> IntArray:
    """Rows that ranks ask for so many exchanges after their headers, `[ranks]` int64.

    Args:
        rates: `[3, ranks]` int64, numerator, denominator and carry of the `Request` of each.
        exchanges: At least 1.

    >>> rates = np.array([[8, 2], [3, 1], [0, 0]])
    >>> [requests_after(rates, n).tolist() for n in range(1, 5)]
    [[2, 2], [3, 2], [3, 2], [2, 2]]
    """
    numerator, denominator, carry = rates
    denominator = np.maximum(denominator, 1)
    before = (carry + (exchanges - 1) * numerator) // denominator
    return np.asarray((carry + exchanges * numerator) // denominator - before)
