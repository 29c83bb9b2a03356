"""Rows of the same content: found by a hash, decided by their bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray, Mask
from rehearsal_plugin.core.rng import Purpose, generator

__all__ = ["DUPLICATE", "ContentIndex", "content_hashes", "repeated_rows", "same_content"]

DUPLICATE = -2
"""Stands for the slot of a row that is not offered, because an equal one is stored."""


def content_hashes(rows: Tensor, content_bytes: int) -> IntArray:
    """Hashes `[n]` int64 of the first `content_bytes` bytes, a multiple of 16, of rows `[n, row_bytes]` uint8.

    Their 32-bit words times random 64-bit numbers, summed modulo 2^64: two different rows share a hash with a
    chance of 2^-33 at most (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    words, factors = rows[:, :content_bytes].view(torch.int32), _hash_factors(content_bytes // 4)
    if rows.device.type == "cpu":
        return _mix_bits(np.einsum("nw,w->n", words.numpy(), factors))
    return _mix_bits((words * torch.from_numpy(factors).to(rows.device)).sum(1).cpu().numpy())


def same_content(first: Tensor, second: Tensor, content_bytes: int) -> Mask:
    """Which of the rows `[n, row_bytes]` uint8 have the same content in both, `[n]` bool."""
    words = (rows[:, :content_bytes].view(torch.int64) for rows in (first, second))
    return np.asarray((next(words) == next(words)).all(1).cpu().numpy())


def repeated_rows(hashes: IntArray, same: Callable[[IntArray, IntArray], Mask]) -> Mask:
    """Which rows equal an earlier one.

    Each round compares every row with the first of its hash, the model. Rows that equal it are repeats, the others, of
    another content with the same hash, go to the next round. For rows a, b, a with one hash: the model a settles the
    third row, and b is the model of the next round.

    Args:
        hashes: `[n]` int64, of their content.
        same: Returns of rows at two indices `[m]` int64 each, pair by pair, which are equal.

    Returns:
        `[n]` bool.
    """
    repeats, left = np.zeros(len(hashes), dtype=bool), np.arange(len(hashes))
    while len(left):
        _, first, group, sizes = np.unique(hashes[left], return_index=True, return_inverse=True, return_counts=True)
        models = left[first][group]
        later = (sizes[group] > 1) & (left != models)
        left, models = left[later], models[later]
        equal = same(left, models)
        repeats[left[equal]] = True
        left = left[~equal]
    return repeats


class ContentIndex:
    """The rows of a buffer by the hash of their content: a hash table with chaining.

    A row belongs to the place of the low bits of its hash. All rows of a place form a linked list of slots:

        place    _first          _next
        0        3               slot 3: 1, slot 1: -1       rows at slots 3 and 1 share place 0
        1        -1                                          no row
        2        0               slot 0: -1

    Invariant: a slot with a row stands in one chain, that of its hash in `_hashes`. The table takes 17 to 21 bytes a
    slot. All work is in proportion to the rows looked up or put, whatever the number of rows stored.

    Args:
        capacity: Slots.
        content_bytes: The first bytes of a row, which make up its content.
    """

    def __init__(self, capacity: int, content_bytes: int) -> None:
        self._bytes = content_bytes
        self._places = 1 << (capacity - 1).bit_length()
        kind = np.int32 if capacity < 1 << 31 else np.int64
        self._first = np.full(self._places, -1, dtype=kind)
        self._next = np.full(capacity, -1, dtype=kind)
        self._hashes = np.zeros(capacity, dtype=np.int64)
        self._taken = np.zeros(capacity, dtype=bool)

    def hashes(self, rows: Tensor) -> IntArray:
        """See `content_hashes`."""
        return content_hashes(rows, self._bytes)

    def duplicates(self, rows: Tensor, hashes: IntArray, read: Callable[[IntArray], Tensor]) -> Mask:
        """Which rows are stored already, or equal an earlier one of the batch.

        Args:
            rows: `[n, row_bytes]` uint8.
            hashes: `[n]` int64, theirs.
            read: Returns the stored rows `[m, row_bytes]` at slots `[m]`.

        Returns:
            `[n]` bool.
        """
        duplicate = self._find_stored(rows, hashes, read)
        new = np.flatnonzero(~duplicate)
        duplicate[new] = repeated_rows(
            hashes[new], lambda one, other: self._same_pairs(rows, new[one], rows, new[other])
        )
        return duplicate

    def put(self, slots: IntArray, hashes: IntArray) -> None:
        """Note the rows that are now at `slots` `[n]`, all different, by their `hashes` `[n]`."""
        for slot in slots[self._taken[slots]].tolist():
            self._unlink_slot(slot)
        places = hashes & (self._places - 1)
        order = np.argsort(places, kind="stable")
        slots, places = slots[order], places[order]
        behind = self._first[places]  # new rows go to the head of their chain, one before the other
        chained = np.flatnonzero(places[1:] == places[:-1])
        behind[chained + 1] = slots[chained]
        self._next[slots] = behind
        self._first[places] = slots  # of those of one place the last, which leads to the others
        self._hashes[slots] = hashes[order]
        self._taken[slots] = True

    def _find_stored(self, rows: Tensor, hashes: IntArray, read: Callable[[IntArray], Tensor]) -> Mask:
        """Which rows are stored already: all chains are followed side by side, a slot a round."""
        stored, slots = np.zeros(len(rows), dtype=bool), self._first[hashes & (self._places - 1)]
        while (slots >= 0).any():
            alike = np.flatnonzero((slots >= 0) & (self._hashes[slots] == hashes))
            if len(alike):
                others = read(slots[alike].astype(np.int64)).to(rows.device)
                stored[alike] = self._same_pairs(rows, alike, others, np.arange(len(alike)))
            slots = np.where(stored | (slots < 0), -1, self._next[slots])
        return stored

    def _same_pairs(self, rows: Tensor, index: IntArray, others: Tensor, places: IntArray) -> Mask:
        first, second = rows[torch.from_numpy(index)], others[torch.from_numpy(places)]
        return same_content(first, second, self._bytes)

    def _unlink_slot(self, slot: int) -> None:
        """Take a slot out of its chain."""
        place = int(self._hashes[slot]) & (self._places - 1)
        after, before = int(self._next[slot]), int(self._first[place])
        if before == slot:
            self._first[place] = after
            return
        while self._next[before] != slot:
            before = int(self._next[before])
        self._next[before] = after


@functools.cache
def _hash_factors(count: int) -> IntArray:
    """Random factors `[count]`, the same on all ranks and in all runs: hashes are compared between them."""
    return generator(0, Purpose.CONTENT, 0).integers(-(1 << 63), 1 << 63, count, dtype=np.int64)


def _mix_bits(sums: IntArray) -> IntArray:
    """Mix sums `[n]` so that their low bits, which choose the place, depend on all bits (a multiply-xorshift)."""
    bits = np.ascontiguousarray(sums).view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(bits ^ (bits >> np.uint64(32))).view(np.int64)
