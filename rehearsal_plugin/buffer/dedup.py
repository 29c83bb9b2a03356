"""Which rows have the same content: found by a hash, decided by their bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray, Mask
from rehearsal_plugin.core.rng import Purpose, generator

__all__ = ["DUPLICATE", "ContentIndex", "content_hashes", "repeated", "same_content"]

DUPLICATE = -2
"""Stands for the slot of a row that is not offered, because an equal one is stored."""


def content_hashes(rows: Tensor, content_bytes: int) -> IntArray:
    """Hashes `[n]` int64 of the first `content_bytes` bytes, a multiple of 16, of rows `[n, row_bytes]` uint8.

    Their 32-bit words times random 64-bit numbers, summed modulo 2^64: two different rows share a hash with a
    chance of 2^-33 at most (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    words, factors = rows[:, :content_bytes].view(torch.int32), _factors(content_bytes // 4)
    if rows.device.type == "cpu":
        return _mixed(np.einsum("nw,w->n", words.numpy(), factors))
    return _mixed((words * torch.from_numpy(factors).to(rows.device)).sum(1).cpu().numpy())


def same_content(first: Tensor, second: Tensor, content_bytes: int) -> Mask:
    """Which of the rows `[n, row_bytes]` uint8 have the same content in both, `[n]` bool."""
    words = (rows[:, :content_bytes].view(torch.int64) for rows in (first, second))
    return np.asarray((next(words) == next(words)).all(1).cpu().numpy())


def repeated(hashes: IntArray, same: Callable[[IntArray, IntArray], Mask]) -> Mask:
    """Which rows equal an earlier one.

    Args:
        hashes: `[n]` int64, of their content.
        same: Tells of rows at two indices `[m]` int64 each, pair by pair, which are equal.

    Returns:
        `[n]` bool.
    """
    again, left = np.zeros(len(hashes), dtype=bool), np.arange(len(hashes))
    while len(left):
        _, first, group, sizes = np.unique(hashes[left], return_index=True, return_inverse=True, return_counts=True)
        models = left[first][group]
        later = (sizes[group] > 1) & (left != models)
        left, models = left[later], models[later]
        equal = same(left, models)
        again[left[equal]] = True
        left = left[~equal]
    return again


class ContentIndex:
    """The rows of a buffer by the hash of their content: a hash table with a chain for each of its places.

    It takes 17 to 21 bytes a slot. All work is in proportion to the rows that are asked for or put, whatever the
    number of rows stored.

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
        """Which rows are stored already, or are equal to an earlier one among them.

        Args:
            rows: `[n, row_bytes]` uint8.
            hashes: `[n]` int64, theirs.
            read: Gives the rows `[m, row_bytes]` at slots `[m]`.

        Returns:
            `[n]` bool.
        """
        found = self._stored(rows, hashes, read)
        new = np.flatnonzero(~found)
        found[new] = repeated(hashes[new], lambda one, other: self._same(rows, new[one], rows, new[other]))
        return found

    def put(self, slots: IntArray, hashes: IntArray) -> None:
        """Note the rows that are now at `slots` `[n]`, all different, by their `hashes` `[n]`."""
        for slot in slots[self._taken[slots]].tolist():
            self._remove(slot)
        places = hashes & (self._places - 1)
        order = np.argsort(places, kind="stable")
        slots, places = slots[order], places[order]
        behind = self._first[places]
        chained = np.flatnonzero(places[1:] == places[:-1])
        behind[chained + 1] = slots[chained]
        self._next[slots] = behind
        self._first[places] = slots  # of those of one place the last, which leads to the others
        self._hashes[slots] = hashes[order]
        self._taken[slots] = True

    def _stored(self, rows: Tensor, hashes: IntArray, read: Callable[[IntArray], Tensor]) -> Mask:
        found, slots = np.zeros(len(rows), dtype=bool), self._first[hashes & (self._places - 1)]
        while (slots >= 0).any():
            alike = np.flatnonzero((slots >= 0) & (self._hashes[slots] == hashes))
            if len(alike):
                stored = read(slots[alike].astype(np.int64)).to(rows.device)
                found[alike] = self._same(rows, alike, stored, np.arange(len(alike)))
            slots = np.where(found | (slots < 0), -1, self._next[slots])
        return found

    def _same(self, rows: Tensor, index: IntArray, others: Tensor, places: IntArray) -> Mask:
        first, second = rows[torch.from_numpy(index)], others[torch.from_numpy(places)]
        return same_content(first, second, self._bytes)

    def _remove(self, slot: int) -> None:
        place = int(self._hashes[slot]) & (self._places - 1)
        after, before = int(self._next[slot]), int(self._first[place])
        if before == slot:
            self._first[place] = after
            return
        while self._next[before] != slot:
            before = int(self._next[before])
        self._next[before] = after


@functools.cache
def _factors(count: int) -> IntArray:
    return generator(0, Purpose.CONTENT, 0).integers(-(1 << 63), 1 << 63, count, dtype=np.int64)


def _mixed(sums: IntArray) -> IntArray:
    """Sums whose low bits depend on all of their bits."""
    bits = np.ascontiguousarray(sums).view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(bits ^ (bits >> np.uint64(32))).view(np.int64)
