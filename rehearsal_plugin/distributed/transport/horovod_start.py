"""The words with which ranks of Horovod begin: a rank that failed before it made its transport says so to the others.

Horovod has no store in which a word could be left, so every transport begins with a small gather: no text of a rank
that is here, a message of one that failed. Nobody waits for it; whoever waits for headers looks at it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch

from rehearsal_plugin.errors import ExchangeError

__all__ = ["StartWords"]


class StartWords:
    """The gather that a transport begins with.

    In an elastic job, whose ranks come one by one, there is none.

    Args:
        hvd: The module `horovod.torch`.
        process_set: The ranks of the transport.
        name: Of the transport, the same on all its ranks.
        failure: What this rank failed with; empty where it makes its transport.
    """

    def __init__(self, hvd: Any, process_set: Any, name: str, failure: str = "") -> None:
        self._hvd, self._handle, self._failure = hvd, None, ""
        self._sent = torch.tensor(list(f"{failure}\n".encode()), dtype=torch.uint8, device="cpu")
        # Also for a rank alone in its set: all ranks of the job must issue equally many operations, see `horovod`.
        if hvd.size() > 1 and not int(os.environ.get("HOROVOD_ELASTIC", 0)):
            with suppress(Exception):  # a rank is gone already, which the next operation says
                self._handle = hvd.allgather_async(self._sent, name=f"{name}.start", process_set=process_set)

    @property
    def heard(self) -> bool:
        """Whether all ranks are here, so that there is nothing to look at any more."""
        return self._handle is None and not self._failure

    def ended(self) -> bool:
        """Whether the words of all ranks have come."""
        return self._handle is None or bool(self._hvd.poll(self._handle))

    def check(self) -> None:
        """Do nothing until the words have come.

        Raises:
            ExchangeError: A rank failed; every later call says so.
        """
        if self._handle is not None and self.ended():
            words = bytes(self._hvd.synchronize(self._handle).tolist()).decode(errors="replace")
            self._handle, self._failure = None, words.strip("\n").split("\n")[0]
        if self._failure:
            raise ExchangeError(f"{self._failure}; see its log")
