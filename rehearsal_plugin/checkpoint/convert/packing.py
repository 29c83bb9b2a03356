"""Streams of tokens, cut into rows of one length.

Streams [a b c] and [d e f g h] with rows of 4 tokens:  [a b c d] [e f g h]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["cut_rows", "joined_arrays"]


def cut_rows(streams: Iterable[Mapping[str, IntArray]], length: int) -> Iterator[dict[str, IntArray]]:
    """Join streams and cut them into rows; the rest at the end is dropped.

    Args:
        streams: Arrays `[tokens]` of the same length, one a name, with the same names each time.
        length: Tokens of a row.

    Returns:
        Arrays `[rows, length]`, one a name.
    """
    left: dict[str, IntArray] = {}
    for stream in streams:
        whole = {name: np.concatenate([left[name], array]) if left else array for name, array in stream.items()}
        count = len(next(iter(whole.values()))) // length
        if count:
            yield {name: array[: count * length].reshape(count, length) for name, array in whole.items()}
        left = {name: array[count * length :].copy() for name, array in whole.items()}


def joined_arrays(parts: Sequence[Sequence[int] | Any]) -> IntArray:
    """Lists of integers, one behind the other, as int64."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(part, dtype=np.int64) for part in parts)])
