"""Stores that the benchmark of the buffer compares: rows written at random slots and gathered from there.

Every store draws its places itself and is as large as the others, and all its rows are written before anything is
timed. Which of a library's ways is used is said with each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["BASELINES", "Batch", "Store", "installed_peers"]

Batch: TypeAlias = dict[str, Tensor]
"""Fields `[n, *shape]` by name."""


class Store(Protocol):
    """Room for many rows, full.

    Args:
        rows: Number of rows.
        batch: Some rows, all alike in form.
    """

    def __init__(self, rows: int, batch: Batch) -> None: ...

    def write(self, batch: Batch) -> object:
        """Put the rows of a batch to random places."""

    def gather(self, count: int) -> Any:
        """`count` random rows."""


class Numpy:
    """Rows that are packed already, in an array: the bare copy."""

    def __init__(self, rows: int, batch: Batch) -> None:
        packed = [
            np.ascontiguousarray(t.numpy()).view(np.uint8).reshape(len(t), -1) for t in map(_matrix, batch.values())
        ]
        self._given = np.concatenate(packed, axis=1)
        self._rows = np.resize(self._given, (rows, self._given.shape[1]))
        self._rng = np.random.default_rng(0)
        self._out: dict[int, Any] = {}

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        size = len(next(iter(batch.values())))
        self._rows[self._rng.integers(0, len(self._rows), size)] = self._given[:size]

    def gather(self, count: int) -> Any:
        """See `Store`."""
        out = self._out.setdefault(count, np.zeros((count, self._rows.shape[1]), np.uint8))
        return np.take(self._rows, self._rng.integers(0, len(self._rows), count), axis=0, out=out, mode="clip")


class Contiguous:
    """Rows that lie together, at a random place."""

    def __init__(self, rows: int, batch: Batch) -> None:
        self._given = torch.cat([_matrix(t).contiguous().view(torch.uint8) for t in batch.values()], dim=1)
        self._rows = self._given.repeat(-(-rows // len(self._given)), 1)[:rows]
        self._rng = np.random.default_rng(0)
        self._out: dict[int, Tensor] = {}

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        size = len(next(iter(batch.values())))
        start = int(self._rng.integers(0, len(self._rows) - size))
        self._rows[start : start + size].copy_(self._given[:size])

    def gather(self, count: int) -> Any:
        """See `Store`."""
        out = self._out.setdefault(count, torch.zeros((count, self._rows.shape[1]), dtype=torch.uint8))
        start = int(self._rng.integers(0, len(self._rows) - count))
        return out.copy_(self._rows[start : start + count])


class TorchRL:
    """torchrl's replay buffer by its own methods, `extend` (round robin) and `sample` (uniform with replacement)."""

    def __init__(self, rows: int, batch: Batch) -> None:
        self._wrap, data = _torchrl()
        self._buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(rows))
        for _ in range(-(-rows // len(self._wrap(batch)))):
            self._buffer.extend(self._wrap(batch))

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        self._buffer.extend(self._wrap(batch))

    def gather(self, count: int) -> Any:
        """See `Store`."""
        return self._buffer.sample(count)


class TorchRLStorage:
    """torchrl's `LazyTensorStorage` alone, `set` and `get` at random places: no writer, no sampler, no lock."""

    def __init__(self, rows: int, batch: Batch) -> None:
        self._wrap, data = _torchrl()
        self._rows, size = rows, len(self._wrap(batch))
        self._storage = data.LazyTensorStorage(rows)
        for start in range(0, rows - size + 1, size):
            self._storage.set(range(start, start + size), self._wrap(batch))

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        rows = self._wrap(batch)
        self._storage.set(torch.randint(0, self._rows, (len(rows),)), rows)

    def gather(self, count: int) -> Any:
        """See `Store`."""
        return self._storage.get(torch.randint(0, len(self._storage), (count,)))


class Cpprb:
    """cpprb's `ReplayBuffer`: `add` writes in a ring, which is kinder to memory than random places; `sample`."""

    def __init__(self, rows: int, batch: Batch) -> None:
        forms = {name: {"shape": tuple(t.shape[1:]) or 1, "dtype": t.numpy().dtype} for name, t in batch.items()}
        self._buffer = import_module("cpprb").ReplayBuffer(rows, forms)
        for _ in range(-(-rows // len(next(iter(batch.values()))))):
            self.write(batch)

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        self._buffer.add(**{name: tensor.numpy() for name, tensor in batch.items()})

    def gather(self, count: int) -> Any:
        """See `Store`."""
        return self._buffer.sample(count)


class ListOfSamples:
    """A list of samples that a gather stacks: what buffers over a dataset do, avalanche's among them."""

    def __init__(self, rows: int, batch: Batch) -> None:
        columns = list(batch.values())
        self._samples = [[column[i % len(column)].clone() for column in columns] for i in range(rows)]
        self._rng = np.random.default_rng(0)

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        samples = zip(*(tensor.clone() for tensor in batch.values()), strict=True)
        size = len(next(iter(batch.values())))
        for place, sample in zip(self._rng.integers(0, len(self._samples), size).tolist(), samples, strict=True):
            self._samples[place] = list(sample)

    def gather(self, count: int) -> Any:
        """See `Store`."""
        chosen = [self._samples[i] for i in self._rng.integers(0, len(self._samples), count).tolist()]
        return [torch.stack(column) for column in zip(*chosen, strict=True)]


class TensorPerField:
    """One tensor a field, rows written one by one, gathers by `numpy.random.choice`: mammoth's buffer."""

    def __init__(self, rows: int, batch: Batch) -> None:
        self._columns = {name: t.repeat(-(-rows // len(t)), *[1] * (t.ndim - 1))[:rows] for name, t in batch.items()}
        self._rows, self._rng = rows, np.random.default_rng(0)

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        size = len(next(iter(batch.values())))
        for i, place in enumerate(self._rng.integers(0, self._rows, size).tolist()):
            for name, column in self._columns.items():
                column[place] = batch[name][i]

    def gather(self, count: int) -> Any:
        """See `Store`."""
        choice = torch.from_numpy(self._rng.choice(self._rows, count, replace=False))
        return [torch.stack(list(column[choice])) for column in self._columns.values()]


BASELINES: dict[str, Callable[[int, Batch], Store]] = {"raw numpy": Numpy, "contiguous copy": Contiguous}
PEERS: dict[str, tuple[str | None, Callable[[int, Batch], Store]]] = {
    "torchrl": ("torchrl", TorchRL),
    "torchrl, storage alone": ("torchrl", TorchRLStorage),
    "cpprb": ("cpprb", Cpprb),
    "list and stack (avalanche)": (None, ListOfSamples),
    "tensor a field (mammoth)": (None, TensorPerField),
}


def installed_peers() -> dict[str, Callable[[int, Batch], Store]]:
    """The peers that can be measured here, by name."""
    return {name: store for name, (package, store) in PEERS.items() if package is None or find_spec(package)}


def _torchrl() -> tuple[Callable[[Batch], Any], Any]:
    """torchrl's wrapper of a batch, and its module of replay buffers."""
    data, tensordict = import_module("torchrl.data"), import_module("tensordict")
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    return lambda batch: tensordict.TensorDict(batch, batch_size=[len(next(iter(batch.values())))]), data


def _matrix(tensor: Tensor) -> Tensor:
    """`[n, *shape]` as `[n, values]`."""
    return tensor.reshape(len(tensor), -1)
