"""Random numbers by address: no state to keep in step between ranks, threads or restarts.

A Philox counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is
made anew for every (seed, purpose, rank, step). The same address always gives the same numbers, so a draw
needs no message and a resumed run repeats none.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "generator"]


class Purpose(IntEnum):
    """What the numbers are for; different purposes never share numbers."""

    CANDIDATES = 1
    ADMISSION = 2
    DRAW = 3
    ORDER = 4
    RESHARD = 5
    CONTENT = 6
    SEEDING = 7


def generator(seed: int, purpose: Purpose, step: int, rank: int = 0) -> np.random.Generator:
    """The generator at this address; leave `rank` at 0 for what all ranks must agree on."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, rank, step]))
