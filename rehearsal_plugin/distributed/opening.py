"""What ranks tell each other once, in the first header of an exchange: their run, and digests of their configs."""

from __future__ import annotations

import reprlib

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.differences import key_digests, value_at
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import OpeningWord
from rehearsal_plugin.errors import ExchangeError

__all__ = ["Opening"]


class Opening:
    """The words behind the first header of a rank.

    Args:
        config: The `rehearsal` section.
        run: This rank's number for the run; all take that of rank 0.

    Attributes:
        words: `[n]` int64, `n` the same on all ranks with this version of the package.
    """

    def __init__(self, config: RehearsalConfig, run: int) -> None:
        digests = key_digests(config)
        self._config, self._keys = config, list(digests)
        self.words: IntArray = np.array([run, *digests.values()], dtype=np.int64)
        assert len(self.words) == len(OpeningWord) - 1 + len(digests)

    def agree(self, words: IntArray, rank: int) -> int:
        """Compare the sections of all ranks; returns the run of rank 0.

        Args:
            words: `[ranks, n]` int64, those of every rank.
            rank: This rank.

        Raises:
            ExchangeError: A rank has another section; the message names the keys.
        """
        different = words[:, OpeningWord.KEYS :] != words[rank, OpeningWord.KEYS :]
        others = np.flatnonzero(different.any(axis=1))
        if len(others):
            other = int(others[0])
            keys = [self._keys[key] for key in np.flatnonzero(different[other]).tolist()]
            shown = ", ".join(f"{key} (here {reprlib.repr(value_at(self._config, key))})" for key in keys)
            raise ExchangeError(
                f"rank {rank} and rank {other} have different rehearsal sections: they differ in {shown}; give every "
                "rank the same config"
            )
        return int(words[0, OpeningWord.RUN])
