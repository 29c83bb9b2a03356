"""What ranks tell each other before a search: who asks how much, which rows are meant, and the queries themselves."""

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

__all__ = ["Request", "agreed", "needed"]

HEAD = 3
"""Words before the bytes: number of the search, bytes of what follows, bytes of its JSON."""


@dataclass(frozen=True)
class Request:
    """What one rank asks the others.

    Attributes:
        queries: `[n, width]` float32.
        k: Rows wanted for each.
        where: Which rows count.
        now: The step of this rank.
        width: Numbers of the embeddings of this rank's rows; 0 where it has none.
        layout: The fingerprint of its rows; 0 where it has none.
        metric: What makes rows near.
        error: Why it does not take part; empty where it does.
    """

    queries: Float32Array
    k: int
    where: Where
    now: int
    width: int
    layout: int
    metric: str
    error: str = ""

    def words(self, number: int, capacity: int) -> IntArray:
        """All of it as `[capacity]` int64, or as much as there is room for; see `needed`."""
        told = {name: value for name, value in vars(self).items() if name not in ("queries", "where")}
        told |= {"where": self.where.to_json(), "n": len(self.queries), "columns": self.queries.shape[1]}
        text = json.dumps(told).encode()
        content = text + self.queries.tobytes()
        words = np.zeros(capacity, dtype=np.int64)
        words[:HEAD] = number, len(content), len(text)
        room = words[HEAD:].view(np.uint8)
        part = np.frombuffer(content, dtype=np.uint8)[: len(room)]
        room[: len(part)] = part
        return words

    @classmethod
    def of(cls, words: IntArray) -> Request:
        """What `words` gave, with room for all of it."""
        _, size, length = words[:HEAD].tolist()
        content = words[HEAD:].view(np.uint8)[:size].tobytes()
        told: dict[str, Any] = json.loads(content[:length])
        shape = told.pop("n"), told.pop("columns")
        queries = np.frombuffer(content[length:], dtype=np.float32).reshape(shape)
        return cls(queries=queries, where=Where.from_json(told.pop("where")), **told)


def needed(gathered: Tensor) -> int:
    """Words that the largest of gathered requests `[ranks, capacity]` takes, rounded up to a power of two."""
    most = HEAD + -(-int(gathered[:, 1].max()) // 8)
    return 1 << (most - 1).bit_length()


def unpacked(gathered: Tensor) -> list[Request]:
    """The requests in `[ranks, capacity]`, by rank."""
    return [Request.of(words) for words in np.ascontiguousarray(gathered.numpy())]


def agreed(gathered: Tensor, rank: int, number: int) -> list[Request]:
    """The requests of all ranks.

    Args:
        gathered: `[ranks, capacity]` int64, with room for all.
        rank: This one.
        number: Of this search.

    Raises:
        ExchangeError: They cannot be answered together; all ranks raise it.
    """
    where = f"search {number} on rank {rank}"
    numbers = gathered[:, 0].tolist()
    if set(numbers) != {number}:
        raise ExchangeError(
            f"{where}: the ranks are at searches {numbers}; all ranks have to search equally often, with no queries "
            "where they have none"
        )
    requests = unpacked(gathered)
    for other, request in enumerate(requests):
        if request.error:
            raise ExchangeError(f"{where} was given up, as rank {other} could not take part: {request.error}")
    _alike(where, "rows with other fields", [request.layout for request in requests])
    _alike(where, "embeddings of other lengths", [request.width for request in requests if request.width])
    _alike(where, "another metric", [request.metric for request in requests])
    width = max(request.width for request in requests)
    for other, request in enumerate(requests):
        if len(request.queries) and width and request.queries.shape[1] != width:
            raise ExchangeError(
                f"{where}: the queries of rank {other} have {request.queries.shape[1]} numbers, and the embeddings of "
                f"rows have {width}"
            )
    return requests


def _alike(where: str, what: str, told: Sequence[object]) -> None:
    if len(set(told)) > 1:
        raise ExchangeError(f"{where}: not all ranks have the same, but {what}: {list(told)}; make them alike")
