"""Which stored rows of all ranks are nearest to what each rank has just seen, found without a collective more.

In step t the header of every rank tells the others the embeddings of its new rows, its queries. While the step
computes, each finds the nearest of its own rows for the queries of all, and its next header tells them, beside its next
queries. From that every rank knows the nearest rows of all ranks for every reader, alike and without another word. So
nobody waits for an answer within a step, and whoever issues collectives (the training thread or the background) changes
nothing.

A row that is replaced between the search and the draw is represented by the one that took its place. Rows that were
admitted in the step of a query are not found, so that a batch does not find itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.vector_index.faiss_library import import_faiss
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.index import RowIndex
from rehearsal_plugin.buffer.vector_index.similarity import normalized
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.draw import Draws

__all__ = ["NearestDraw"]

HEAD = 2
"""Words before the queries: how many there are, and how many rows this rank wants to know of."""

EARLIER = Where(min_age=1)


class NearestDraw:
    """Finds the rows that `sampling.weights: retrieved` replays.

    Args:
        buffer: This rank's rows.
        config: The `rehearsal` section, with what makes rows near (`retrieval`), the share of the nearest rows, and how
            many queries a rank has (`sampling`).
        rank: This rank.
        size: Ranks.
        turns: Independent draws of a step; the nearest rows are dealt out to them in turn.

    Raises:
        BatchError: Rows have no such embedding.
        MissingDependencyError: faiss is not installed.
    """

    def __init__(
        self,
        buffer: RehearsalBuffer,
        config: RehearsalConfig,
        rank: int,
        size: int,
        turns: int,
    ) -> None:
        import_faiss()
        assert config.retrieval is not None  # by the rules of the section
        self._index, self._cosine = RowIndex(buffer, config.retrieval), config.retrieval.metric == "cosine"
        self._share, self._queries = config.sampling.retrieved_share, config.sampling.queries
        self._rank, self._size, self._turns = rank, size, turns
        self._numbers = RandomStream(config.seed, Purpose.QUERIES)
        self._largest = 0
        self._wanted: IntArray | None = None  # rows by the queries that were heard last; None before all ranks agreed
        self._own = np.empty((2, 0), dtype=np.int64)  # this rank's answers to these: scores (their bits) and slots

    def tell(self, staged: Tensor, request: int, step: int) -> IntArray:
        """What this rank tells the others: queries, and its answers to those that it heard last; at first nothing.

        Args:
            staged: `[n, row_bytes]` uint8, new rows.
            request: Rows that this rank asks for in each turn.
            step: Number of the exchange.

        Returns:
            `[words]` int64, as many on all ranks.
        """
        if self._wanted is None:
            return np.empty(0, dtype=np.int64)  # a rank with another config can say so in headers of one length
        self._largest = max(self._largest, request)
        queries = self._queries_of(staged, step)
        words = np.zeros(self._answers_at + self._own.size, dtype=np.int64)
        words[:HEAD] = len(queries), math.ceil(self._share * self._largest) * self._turns
        words[HEAD : self._answers_at].view(np.float32)[: queries.size] = queries.ravel()
        words[self._answers_at :] = self._own.ravel()
        return words

    def hear(
        self, told: IntArray, counts: IntArray, requests: IntArray, step: int, rng: np.random.Generator
    ) -> tuple[Draws, IntArray]:
        """Take in what all ranks told, and find this rank's answers to it.

        Args:
            told: `[ranks, words]` int64, what `tell` gave on all ranks.
            counts: `[ranks, 1]` int64, rows stored.
            requests: `[ranks]` int64, rows that each asks for in each turn.
            step: Number of the exchange.
            rng: The same state on every rank.

        Returns:
            The nearest rows as draws, and how many `[ranks, turns]` int64 are still to be drawn by other means.
        """
        if self._wanted is None:
            self._wanted, none = np.zeros(self._size, dtype=np.int64), np.empty(0, dtype=np.int64)
            return Draws(none, none, none, none, counts), requests
        reader, owner, slot = self._merged(told[:, self._answers_at :].reshape(self._size, 2, -1), self._wanted)
        # Whole numbers that are the share of the request in the mean.
        most = np.floor(self._share * requests + rng.random(self._size)).astype(np.int64) * self._turns
        place = _places(reader)
        taken = place < most[reader]
        reader, owner, slot, turn = reader[taken], owner[taken], slot[taken], place[taken] % self._turns
        given = np.bincount(reader * self._turns + turn, minlength=self._size * self._turns)
        before = np.cumsum(counts[:, 0]) - counts[:, 0]
        self._wanted, self._own = told[:, 1].copy(), self._answers(told, step)
        near = Draws(reader, turn, np.zeros_like(reader), before[owner] + slot, counts)
        return near, requests[:, None] - given.reshape(self._size, self._turns)

    def close(self) -> None:
        """Stop following the buffer."""
        self._index.close()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as arrays and numbers."""
        return {"wanted": self._wanted, "own": self._own, "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank of as many.

        Raises:
            ValueError: It contradicts itself, or is that of other ranks.
        """
        wanted, own = state["wanted"], state["own"]
        if wanted is not None and (wanted.shape != (self._size,) or own.shape != (2, int(wanted.sum()))):
            raise ValueError(f"answers of shape {own.shape} to {wanted.tolist()} questions of {self._size} ranks")
        self._wanted, self._own, self._largest = wanted, own, int(state["largest"])

    @property
    def _answers_at(self) -> int:
        """The word of a message behind the queries, of which two numbers share a word."""
        return HEAD + -(-self._queries * self._index.width // 2)

    def _queries_of(self, staged: Tensor, step: int) -> Float32Array:
        """The embeddings of new rows, `[n, width]` float32, prepared for the metric."""
        vectors = self._index.embeddings(staged)
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        if len(vectors) > self._queries:
            rng = self._numbers.at(step, self._rank)
            vectors = vectors[np.sort(rng.choice(len(vectors), self._queries, replace=False))]
        return normalized(vectors) if self._cosine else vectors

    def _merged(self, answers: IntArray, wanted: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Reader, owner and slot of the nearest rows `[n]`: reader by reader, from the nearest on.

        Args:
            answers: `[ranks, 2, sum(wanted)]` int64, what each rank found for the queries of the step before.
            wanted: `[ranks]` int64, how many of these columns each reader has.
        """
        scores, slots = np.ascontiguousarray(answers[:, 0]).view(np.float64), answers[:, 1]
        owner, column = np.nonzero(slots >= 0)
        reader = np.repeat(np.arange(self._size), wanted)[column]
        scores, slots = scores[owner, column], slots[owner, column]
        order = np.lexsort((slots, owner, -scores, reader))
        return reader[order], owner[order], slots[order]

    def _answers(self, told: IntArray, step: int) -> IntArray:
        """The nearest of this rank's rows for the queries of all ranks, `[2, sum(wanted)]` int64; slots -1 for none."""
        self._index.sync(step)
        counts, wanted = told[:, 0], told[:, 1]
        begin, most = np.cumsum(wanted) - wanted, int(wanted.max())
        own = np.full((2, int(wanted.sum())), -1, dtype=np.int64)
        if not most or not counts.any():
            return own
        width = self._index.width
        numbers = np.ascontiguousarray(told[:, HEAD : self._answers_at]).view(np.float32)
        queries = numbers[:, : self._queries * width].reshape(self._size, self._queries, width)
        asked = np.arange(self._queries) < counts[:, None]
        found = self._index.search(queries[asked], most, EARLIER, step)
        reader, slot, score = _distinct(np.repeat(np.arange(self._size), counts), found.slots, found.scores)
        place = _places(reader)
        taken = place < wanted[reader]
        own[:, begin[reader[taken]] + place[taken]] = score[taken].view(np.int64), slot[taken]
        return own


def _distinct(reader: IntArray, slots: IntArray, scores: Float64Array) -> tuple[IntArray, IntArray, Float64Array]:
    """Rows found for any query of a reader, each once and with its best score: reader by reader, the nearest first.

    Args:
        reader: `[q]` int64, whose query each is.
        slots: `[q, k]` int64, -1 for none.
        scores: `[q, k]` float64.

    Returns:
        Reader, slot and score, three arrays `[n]`.
    """
    query, place = np.nonzero(slots >= 0)
    reader, slot, score = reader[query], slots[query, place], scores[query, place]
    best = np.lexsort((-score, slot, reader))
    reader, slot, score = reader[best], slot[best], score[best]
    first = np.ones(len(slot), dtype=bool)
    first[1:] = (reader[1:] != reader[:-1]) | (slot[1:] != slot[:-1])
    reader, slot, score = reader[first], slot[first], score[first]
    order = np.lexsort((slot, -score, reader))
    return reader[order], slot[order], score[order]


def _places(group: IntArray) -> IntArray:
    """The place of each entry in its group, from 0, where `group` `[n]` is in ascending order."""
    return np.arange(len(group)) - np.searchsorted(group, group)
