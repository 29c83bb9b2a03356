"""Which ranks do not answer once a deadline has passed, by the store through which torch.distributed was made.

A library says that a collective did not end, and not whose part is missing. So a rank whose deadline has passed leaves
a word in the store, and looks for those of the others a little later: the same collective has failed on them, too::

    ranks 0 1 2, the host of rank 2 is cut off      words in the store: 0 1      silent: 2

The store has a connection of its own here, so that a dead link to it holds up nobody else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

__all__ = ["describe_silent"]

CONNECT_S = 5.0
PATIENCE_S = 3.0
"""How much later than this rank's the deadline of another may pass."""


def describe_silent(ranks: Sequence[int], rank: int, step: int) -> str | None:
    """Who does not answer, in words; empty if all ranks of a group do, and None where nobody can tell.

    Call it on a thread that has time: it takes up to `PATIENCE_S` and `CONNECT_S` seconds.

    Args:
        ranks: The group, by the numbers in the job.
        rank: Place of this rank in it.
        step: Number of the exchange that failed.
    """
    store: Any = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    words = [f"rehearsal/late/{'-'.join(map(str, ranks))}/{step}/{place}" for place in range(len(ranks))]
    try:
        own = TCPStore(store.host, store.port, None, False, timedelta(seconds=CONNECT_S), wait_for_workers=False)
        own.set(words[rank], "")
        time.sleep(PATIENCE_S)
        silent = [str(place) for place, word in enumerate(words) if not own.check([word])]
    except RuntimeError:
        return f"no answer from the store of the job at {store.host}:{store.port}"
    return f"no answer from rank{'s' * (len(silent) > 1)} {', '.join(silent)}" if silent else ""
