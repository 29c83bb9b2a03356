"""The start of a group of torch.distributed: ranks wait for each other, and hear of one that failed before.

A rank whose config cannot be read never makes its transport. The others would wait for it until their timeout, so it
leaves a word in the store through which the group is made.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from rehearsal_plugin.errors import ExchangeError

__all__ = ["announcing_failure", "next_store", "ranks_of", "wait_for_ranks"]

HERE, FAILED = "here", "failed"
SHORTEST_POLL_S, LONGEST_POLL_S = 0.005, 0.25

_groups_made: Counter[tuple[int, ...]] = Counter()  # by ranks; numbers every group anew, alike on all its ranks


def ranks_of(group: dist.ProcessGroup | Sequence[int] | None) -> tuple[int, ...]:
    """The ranks of a group, or of all."""
    return tuple(group if isinstance(group, Sequence) else dist.get_process_group_ranks(group or dist.group.WORLD))


def next_store(ranks: tuple[int, ...]) -> Any:
    """The store of the next group of `ranks`, the same on each of them."""
    _groups_made[ranks] += 1
    name = f"rehearsal/{hashlib.sha256(repr(ranks).encode()).hexdigest()}/{_groups_made[ranks]}"
    return PrefixStore(name, _get_default_store())


def wait_for_ranks(store: Any, size: int, timeout: timedelta) -> None:
    """Return once all ranks of a group are here.

    Raises:
        ExchangeError: One failed.
        RuntimeError: One did not come in time.
    """
    deadline, pause_s = time.monotonic() + timeout.total_seconds(), SHORTEST_POLL_S
    store.add(HERE, 1)
    while True:
        if store.check([FAILED]):
            raise ExchangeError(f"{store.get(FAILED).decode()}; see its log")
        if (here := store.add(HERE, 0)) >= size:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{here} of {size} ranks came")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_POLL_S)


@contextmanager
def announcing_failure(group: dist.ProcessGroup | Sequence[int] | None = None) -> Iterator[None]:
    """Tell the ranks that wait for this one to make its transport of an error inside of the context."""
    try:
        yield
    except Exception as error:
        if dist.is_available() and dist.is_initialized():
            with suppress(RuntimeError):  # a store that is gone
                word = f"rank {dist.get_rank()} failed before its first exchange with {type(error).__name__}: {error}"
                next_store(ranks_of(group)).set(FAILED, word)
        raise
