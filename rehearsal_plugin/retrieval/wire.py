"""The message of a rank before a search: its queries, and how they are to be answered.

It travels as int64 words of one length on all ranks, as an all_gather wants:

    word 0      number of the search, which has to be the same on all ranks
    word 1      size: bytes of JSON and queries together
    word 2      bytes of the JSON
    words 3..   JSON (`k`, `now`, `width`, `layout`, `metric`, `error`, `where`, `n`, `columns`),
                then the queries `[n, columns]` as float32, then zeros

A message longer than the words is cut. All ranks see its size in word 1, and gather again with more words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.core.arrays import Float32Array, IntArray
from rehearsal_plugin.errors import ExchangeError

__all__ = ["Request", "checked_requests", "words_needed"]

HEAD = 3
"""Words before the JSON."""


@dataclass(frozen=True)
class Request:
    """Request of one rank to all ranks.

    Attributes:
        queries: `[n, width]` float32.
        k: Rows for each query.
        where: Filter of the rows.
        now: Step of this rank.
        width: Length of the embeddings of its rows; 0 where it has no rows.
        layout: Fingerprint of the layout of its rows; 0 where it has no rows.
        metric: Metric of its index.
        error: Why it cannot take part; empty if it can.
    """

    queries: Float32Array
    k: int
    where: Where
    now: int
    width: int
    layout: int
    metric: str
    error: str = ""

    def to_words(self, number: int, capacity: int) -> IntArray:
        """The message `[capacity]` int64, cut if it is longer; see `words_needed`."""
        fields = {name: value for name, value in vars(self).items() if name not in ("queries", "where")}
        fields |= {"where": self.where.to_json(), "n": len(self.queries), "columns": self.queries.shape[1]}
        text = json.dumps(fields).encode()
        content = text + self.queries.tobytes()
        words = np.zeros(capacity, dtype=np.int64)
        words[:HEAD] = number, len(content), len(text)
        room = words[HEAD:].view(np.uint8)
        part = np.frombuffer(content, dtype=np.uint8)[: len(room)]
        room[: len(part)] = part
        return words

    @classmethod
    def from_words(cls, words: IntArray) -> Request:
        """The request in a message that is not cut."""
        _, size, length = words[:HEAD].tolist()
        content = words[HEAD:].view(np.uint8)[:size].tobytes()
        fields: dict[str, Any] = json.loads(content[:length])
        shape = fields.pop("n"), fields.pop("columns")
        queries = np.frombuffer(content[length:], dtype=np.float32).reshape(shape)
        return cls(queries=queries, where=Where.from_json(fields.pop("where")), **fields)


def words_needed(gathered: Tensor) -> int:
    """Words of the longest message, out of the gathered ones `[ranks, capacity]`, rounded up to a power of two."""
    most = HEAD + -(-int(gathered[:, 1].max()) // 8)
    return 1 << (most - 1).bit_length()


def _requests_in(gathered: Tensor) -> list[Request]:
    """The requests in gathered messages `[ranks, capacity]`, by rank."""
    return [Request.from_words(words) for words in np.ascontiguousarray(gathered.numpy())]


def checked_requests(gathered: Tensor, rank: int, number: int) -> list[Request]:
    """The requests of all ranks, by rank, checked to fit together.

    Args:
        gathered: Messages of all ranks, `[ranks, capacity]` int64, none of them cut.
        rank: This rank.
        number: Number of this search.

    Raises:
        ExchangeError: They do not fit together, or a rank cannot take part; raised on all ranks.
    """
    where = f"search {number} on rank {rank}"
    numbers = gathered[:, 0].tolist()
    if set(numbers) != {number}:
        raise ExchangeError(
            f"{where}: the ranks are at searches {numbers}; all ranks have to search equally often, with no queries "
            "where they have none"
        )
    requests = _requests_in(gathered)
    for other, request in enumerate(requests):
        if request.error:
            raise ExchangeError(f"{where} was given up, as rank {other} could not take part: {request.error}")
    _check_equal(where, "rows with other fields", [request.layout for request in requests])
    _check_equal(where, "embeddings of other lengths", [request.width for request in requests if request.width])
    _check_equal(where, "another metric", [request.metric for request in requests])
    width = max(request.width for request in requests)
    for other, request in enumerate(requests):
        if len(request.queries) and width and request.queries.shape[1] != width:
            raise ExchangeError(
                f"{where}: the queries of rank {other} have {request.queries.shape[1]} numbers, and the embeddings of "
                f"rows have {width}"
            )
    return requests


def _check_equal(where: str, what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        raise ExchangeError(f"{where}: not all ranks have the same, but {what}: {list(values)}; make them alike")
