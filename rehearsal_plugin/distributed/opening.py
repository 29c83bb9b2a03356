"""What ranks tell each other once, in the first header of an exchange: their run, and digests of their configs.

Where every rank draws from itself alone (`sampling.scope: local`) there is no header, and `SectionCheck` compares the
configs instead.
"""

from __future__ import annotations

import logging
import reprlib

import numpy as np
import torch

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.differences import key_digests, value_at
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import OpeningWord
from rehearsal_plugin.distributed.transport import Pending, Transport
from rehearsal_plugin.errors import ExchangeError

__all__ = ["Opening", "SectionCheck"]

LOG = logging.getLogger(__name__)

HARMLESS = ["rehearsal.buffer.capacity"]
"""Keys that ranks are told of and may differ in, as on hosts with less memory."""


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
            ExchangeError: A rank has another section; the message names the keys. Another capacity is a warning.
        """
        different = words[:, OpeningWord.KEYS :] != words[rank, OpeningWord.KEYS :]
        harmless = np.isin(self._keys, HARMLESS)
        for keys, refused in ((~harmless, True), (harmless, False)):
            others = np.flatnonzero((different & keys).any(axis=1))
            if not len(others):
                continue
            other = int(others[0])
            message = self._difference(np.flatnonzero(different[other] & keys).tolist(), rank, other)
            if refused:
                raise ExchangeError(
                    f"{message}; give every rank the same config (another rehearsal.seed or sampling.weights alone "
                    "would draw other rows for each other)"
                )
            if rank < other:
                LOG.warning("%s; that works, and rows stay longer on the rank with more room", message)
        return int(words[0, OpeningWord.RUN])

    def _difference(self, places: list[int], rank: int, other: int) -> str:
        keys = [self._keys[place] for place in places]
        shown = ", ".join(f"{key} (here {reprlib.repr(value_at(self._config, key))})" for key in keys)
        return f"rank {rank} and rank {other} have different rehearsal sections: they differ in {shown}"


class SectionCheck:
    """Compares the sections of ranks that exchange nothing else, without waiting for any of them.

    Args:
        config: The `rehearsal` section.
        transport: The ranks; all of them make their check as the first use of it.
    """

    def __init__(self, config: RehearsalConfig, transport: Transport) -> None:
        self._opening, self._rank = Opening(config, run=0), transport.rank
        self._pending: Pending | None = None
        self._difference: ExchangeError | None = None
        if transport.size > 1:
            self._pending = transport.all_gather(torch.from_numpy(self._opening.words))

    def hear(self) -> None:
        """Compare the sections once those of all ranks have come; until then, do nothing.

        Raises:
            ExchangeError: As for `Opening.agree`; every later call raises it again.
        """
        if self._pending is not None:
            self._compare(self._pending)
        if self._difference is not None:
            raise self._difference

    def _compare(self, pending: Pending) -> None:
        try:
            if not pending.done():
                return
            words = pending.result().numpy()
        except Exception as error:  # a rank is gone, which these ranks need not mind
            LOG.warning("the rehearsal sections of rank %d and others were not compared: %s", self._rank, error)
        else:
            try:
                self._opening.agree(words, self._rank)
            except ExchangeError as difference:
                self._difference = difference
        self._pending = None
