"""Chi-square tests: how likely are these counts, if every outcome had the same chance?

Every test that uses these has fixed seeds, so that it gives the same answer at every run, and fails below
`SIGNIFICANCE`: of ten thousand right programs one would be refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from scipy.stats import chi2, chisquare

SIGNIFICANCE = 1e-4


def equally_likely(outcomes: Iterable[Hashable], possible: int) -> float:
    """The p-value of independent outcomes, each of which should be one of `possible` equally likely ones."""
    counts = list(Counter(outcomes).values())
    if len(counts) > possible:
        return 0.0
    return float(chisquare(counts + [0] * (possible - len(counts))).pvalue)


def equally_included(counts: Sequence[int], trials: int, taken: int) -> float:
    """The p-value of how often each item was among `taken` different ones, in `trials` independent draws.

    Items exclude each other, so that Pearson's statistic of the counts has to be scaled by (n - 1) / (n - taken).
    """
    items = len(counts)
    expected = trials * taken / items
    statistic = float(np.sum((np.asarray(counts) - expected) ** 2)) / expected * (items - 1) / (items - taken)
    return float(chi2.sf(statistic, items - 1))
