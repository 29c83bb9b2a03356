"""Which stored rows of all ranks are nearest to what each rank has just seen, found without a collective more.

Questions and answers travel in the headers of two steps (see `header` for the words):

| step | this rank's header says | while the step computes |
|---|---|---|
| t | embeddings of its new rows (queries), rows it wants | every rank searches its own rows for all queries |
| t + 1 | its answers: similarity and slot of each row found | every rank merges the answers of all ranks, alike |

So nobody waits for an answer within a step, no collective is added, and it does not matter which thread issues them.
For example, two ranks want two rows each. The columns of `WANTED` rows belong to the readers in turn::

    answers of rank 0   0.9@4  0.2@1 | 0.5@4  -          similarity@slot, - for none
    answers of rank 1   0.7@8  0.1@3 | 0.8@8  0.6@2
    reader              0      0     | 1      1
    merged              rank 0 gets (0, 4), (1, 8)       (owner, slot), the nearest first
                        rank 1 gets (1, 8), (1, 2)

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
from rehearsal_plugin.distributed.draw import Moves
from rehearsal_plugin.distributed.header import NearestWord

__all__ = ["NearestDraw"]

HEAD = len(NearestWord)
"""Words before the queries."""

EARLIER = Where(min_age=1)


class NearestDraw:
    """Finds the rows that `sampling.weights: retrieved` replays.

    Args:
        buffer: This rank's rows.
        config: The `rehearsal` section, with what makes rows near (`retrieval`), the share of the nearest rows, and how
            many queries a rank has (`sampling`).
        rank: This rank.
        size: Ranks.
        draws: Independent draws of a step; the nearest rows are dealt out to them in turn.

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
        draws: int,
    ) -> None:
        import_faiss()
        assert config.retrieval is not None  # by the rules of the section
        self._index, self._cosine = RowIndex(buffer, config.retrieval), config.retrieval.metric == "cosine"
        self._share, self._queries = config.sampling.retrieved_share, config.sampling.queries
        self._rank, self._size, self._draws = rank, size, draws
        self._numbers = RandomStream(config.seed, Purpose.QUERIES)
        self._largest = 0
        self._wanted: IntArray | None = None  # rows, by the last queries of all ranks; None before all ranks agreed
        self._answers = np.empty((2, 0), dtype=np.int64)  # this rank's to these: similarities (their bits) and slots

    def ask(self, staged: Tensor, request: int, step: int) -> IntArray | None:
        """This rank's words in the header of a step: queries, and answers to those of the step before.

        Args:
            staged: `[n, row_bytes]` uint8, new rows.
            request: Rows that this rank asks for in each draw.
            step: Number of the exchange.

        Returns:
            `[words]` int64, as many on all ranks; None at first, so that a rank with another config can say so in
            headers of one length.
        """
        if self._wanted is None:
            return None
        self._largest = max(self._largest, request)
        queries = self._queries_of(staged, step)
        words = np.zeros(self._answers_at + self._answers.size, dtype=np.int64)
        words[NearestWord.QUERIES] = len(queries)
        words[NearestWord.WANTED] = math.ceil(self._share * self._largest) * self._draws
        words[HEAD : self._answers_at].view(np.float32)[: queries.size] = queries.ravel()
        words[self._answers_at :] = self._answers.ravel()
        return words

    def draw(
        self, words: IntArray, counts: IntArray, requests: IntArray, step: int, rng: np.random.Generator
    ) -> tuple[Moves, IntArray]:
        """The nearest rows by the answers of all ranks; finds this rank's answers to their new queries.

        Args:
            words: `[ranks, words]` int64, those of `ask` on all ranks.
            counts: `[ranks, 1]` int64, rows stored; `[ranks, 0]` before the first one.
            requests: `[ranks]` int64, rows that each asks for in each draw.
            step: Number of the exchange.
            rng: The same state on every rank.

        Returns:
            The nearest rows that this rank sends and gets, and how many `[ranks, draws]` int64 are still to be drawn by
            other means.
        """
        if self._wanted is None:
            self._wanted, none = np.zeros(self._size, dtype=np.int64), np.empty(0, dtype=np.int64)
            return Moves(none, none, none, none, none, none, 0), requests
        answers = words[:, self._answers_at :].reshape(self._size, 2, -1)
        reader, owner, slot = self._merged(answers, self._wanted)
        # Whole numbers that are the share of the request in the mean.
        most = np.floor(self._share * requests + rng.random(self._size)).astype(np.int64) * self._draws
        place = _places(reader)
        taken = place < most[reader]
        reader, owner, slot, number = reader[taken], owner[taken], slot[taken], place[taken] % self._draws
        nearest = np.bincount(reader * self._draws + number, minlength=self._size * self._draws)
        self._wanted, self._answers = words[:, NearestWord.WANTED].copy(), self._search(words, step)
        sent, gets = owner == self._rank, reader == self._rank
        moves = Moves(
            reader[sent], number[sent], np.zeros_like(slot[sent]), slot[sent], owner[gets], number[gets], len(reader)
        )
        return moves, requests[:, None] - nearest.reshape(self._size, self._draws)

    def close(self) -> None:
        """Stop following the buffer."""
        self._index.close()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as arrays and numbers."""
        return {"wanted": self._wanted, "own": self._answers, "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank of as many.

        Raises:
            ValueError: It contradicts itself, or is that of other ranks.
        """
        wanted, answers = state["wanted"], state["own"]
        if wanted is not None and (wanted.shape != (self._size,) or answers.shape != (2, int(wanted.sum()))):
            raise ValueError(f"answers of shape {answers.shape} to {wanted.tolist()} questions of {self._size} ranks")
        self._wanted, self._answers, self._largest = wanted, answers, int(state["largest"])

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

    def _search(self, words: IntArray, step: int) -> IntArray:
        """The nearest of this rank's rows for the queries of all ranks, `[2, sum(wanted)]` int64; slots -1 for none."""
        self._index.sync(step)
        counts, wanted = words[:, NearestWord.QUERIES], words[:, NearestWord.WANTED]
        begin, most = np.cumsum(wanted) - wanted, int(wanted.max())
        answers = np.full((2, int(wanted.sum())), -1, dtype=np.int64)
        if not most or not counts.any():
            return answers
        width = self._index.width
        numbers = np.ascontiguousarray(words[:, HEAD : self._answers_at]).view(np.float32)
        queries = numbers[:, : self._queries * width].reshape(self._size, self._queries, width)
        asked = np.arange(self._queries) < counts[:, None]
        nearest = self._index.search(queries[asked], most, EARLIER, step)
        reader, slot, score = _distinct(np.repeat(np.arange(self._size), counts), nearest.slots, nearest.scores)
        place = _places(reader)
        taken = place < wanted[reader]
        answers[:, begin[reader[taken]] + place[taken]] = score[taken].view(np.int64), slot[taken]
        return answers


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
