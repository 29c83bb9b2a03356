"""The buffer of all ranks as a memory that can be asked, beside training or from a checkpoint."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.index import RowIndex
from rehearsal_plugin.buffer.vector_index.known_rows import Embed, columns_of
from rehearsal_plugin.config import ExchangeConfig, RetrievalConfig
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.distributed.transport import Transport, open_transport
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError, RehearsalError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.retrieval.queries import prepared, wanted
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.search import DistributedSearch
from rehearsal_plugin.retrieval.stored import stored_rows

__all__ = ["Retriever"]

ConfigLike: TypeAlias = RetrievalConfig | Mapping[str, Any] | None

EVERYWHERE = Where()


class Retriever:
    """Finds rows of all ranks by their embedding.

    All ranks make their retrievers in the same order and call `search` or `submit` equally often, those without
    queries with none. Each retriever has a transport of its own, so that its collectives do not mix with others.

    Args:
        source: A rehearsal, whose training may go on; or a buffer, to which nothing is written meanwhile.
        config: The section `rehearsal.retrieval`; None takes that of the rehearsal.
        transport: The ranks; None takes all ranks of torch.distributed if that is initialised, over the rehearsal's
            `exchange.backend`, else this process alone. It is closed together with the retriever.
        embed: Makes the embeddings of rows that have none as a field, whenever they are new.
        timeout_s: Seconds to wait for the other ranks; None takes the rehearsal's `exchange.timeout_s`, else 600.
        now: The present step, for a buffer that no rehearsal counts the steps of.

    Raises:
        ConfigError: There is no such section, or it cannot be used.
        MissingDependencyError: faiss is not installed; raised by the first search.
    """

    def __init__(
        self,
        source: Rehearsal | RehearsalBuffer,
        config: ConfigLike = None,
        *,
        transport: Transport | None = None,
        embed: Embed | None = None,
        timeout_s: float | None = None,
        now: int | None = None,
    ) -> None:
        self._source, self._embed, self._now = source, embed, now
        self.config = _config_of(source, config)
        exchange = source.config.exchange if isinstance(source, Rehearsal) else ExchangeConfig()
        timeout_s = exchange.timeout_s if timeout_s is None else timeout_s
        self._transport = transport or open_transport(exchange.backend, timeout_s)
        self._stop = threading.Event()
        self._search = DistributedSearch(self._transport, timeout_s, self._stop.is_set)
        self._index: RowIndex | None = None
        self._worker: BackgroundThread[Retrieved] | None = None
        self._last: Future[Retrieved] | None = None
        self._refreshed = 0
        atexit.register(self.close)  # a search in the background would have the interpreter abort

    @classmethod
    def of_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        config: ConfigLike,
        *,
        transport: Transport | None = None,
        embed: Embed | None = None,
        timeout_s: float = 600.0,
    ) -> Retriever:
        """Over the rows of the newest checkpoint in a folder, whatever number of ranks saved it.

        Every rank takes an equal share of the rows into memory. All ranks must see the folder; the step of the
        checkpoint is the one that ages go by.

        Args:
            folder: Where `Rehearsal.save`, DeepSpeed or `rehearsal seed` wrote.
            config: The section `rehearsal.retrieval`.
            transport: As for the class.
            embed: As for the class.
            timeout_s: As for the class.

        Raises:
            CheckpointError: There is no checkpoint or no row, or it cannot be read.
        """
        transport = transport or open_transport("auto", timeout_s)
        buffer, step = stored_rows(Path(folder), transport.rank, transport.size)
        return cls(buffer, config, transport=transport, embed=embed, timeout_s=timeout_s, now=step)

    @property
    def index(self) -> RowIndex | None:
        """This rank's index; None until there are rows."""
        return self._index

    def search(self, queries: ArrayLike | Tensor | None = None, k: int = 10, where: Where = EVERYWHERE) -> Retrieved:
        """The nearest rows of all ranks, as they are now.

        Args:
            queries: `[n, width]` numbers; None for no queries of this rank, where others have some.
            k: Rows for each.
            where: Which rows count; every rank says so for its own queries.

        Raises:
            BatchError: The queries, or the embeddings of rows, are no such vectors; the other ranks get an
                `ExchangeError`, as where `embed` raises anything else.
            ExchangeError: A rank is gone, or has other rows or another metric; or an elastic job has other ranks.
            ExchangeTimeout: A rank did not come in time.
            ClosedError: `close` was called.
        """
        return self._ask(queries, k, where)()

    def submit(
        self, queries: ArrayLike | Tensor | None = None, k: int = 10, where: Where = EVERYWHERE
    ) -> Future[Retrieved]:
        """The same in the background; training may go on meanwhile.

        Rows are those that were stored when it was called. One that is replaced before it was read is passed over,
        and the next nearest takes its place. What a strategy has recorded beside a row may be rewritten while it is
        read.

        Raises:
            ConfigError: The transport has to be used from the training thread (Horovod, NCCL); use `search`.
        """
        if self._transport.main_thread:
            raise ConfigError(
                f"{type(self._transport).__name__} issues collectives from the training thread only; use search()"
            )
        job = self._ask(queries, k, where)
        self._worker = self._worker or BackgroundThread(f"retrieval-rank{self._transport.rank}")
        self._last = self._worker.submit(job)
        return self._last

    def refresh(self, embed: Embed | None = None, rows: int = 256) -> int:
        """Compute the embeddings of this rank's stalest rows anew, as with the model as it is now.

        They are stored with `update_fields` where rows have a field for them. No other rank has to take part.

        Args:
            embed: Makes embeddings of rows; None takes the one given to the retriever.
            rows: How many.

        Returns:
            Rows that got a new embedding.

        Raises:
            ConfigError: There is no `embed`.
            BatchError: It gave something else than a vector for each row.
        """
        index = self.sync()
        embed = embed or self._embed
        if embed is None:
            raise ConfigError("there is no function that makes embeddings; give refresh() one")
        if index is None:
            return 0
        slots = index.stalest(rows)
        if not len(slots):
            return 0
        packed, _ = index.read(slots)
        vectors = embed(columns_of(index.buffer.layout, packed)).detach()
        index.store(slots, vectors, self._step)
        self._refreshed += len(slots)
        return len(slots)

    def sync(self) -> RowIndex | None:
        """Take over what changed in this rank's buffer; `search` and `submit` do it, too.

        Waits for a search in the background, which goes by what was stored when it was asked for.
        """
        self._check_open()
        if self._last is not None:
            self._last.exception()  # its collectives come first on all ranks, too
            self._last = None
        if isinstance(self._source, Rehearsal):
            self._source.drain()  # nothing is written from here to the next step
        buffer = self._source.buffer if isinstance(self._source, Rehearsal) else self._source
        if self._index is not None and self._index.buffer is not buffer:
            self._index.close()
            self._index = None
        if buffer is not None:
            self._index = self._index or RowIndex(buffer, self.config, self._embed)
            self._index.sync(self._step)
        return self._index

    def metrics(self) -> dict[str, float]:
        """Of this rank, as of the last search: rows, and how stale their embeddings are.

        `rows_indexed`; `rows_skipped`, whose embedding is no number; `rows_refreshed`; `staleness_mean` and
        `staleness_max`, steps since the embedding of a row was computed, as far as it was seen to change; `drift`, the
        mean of 1 - cosine between the embeddings that changed last and those before; `searches`, `collectives`,
        `rows_received`.
        """
        index = self._index
        stale = np.zeros(0, dtype=np.int64) if index is None else index.staleness(self._step)
        return {
            "rows_indexed": 0 if index is None else index.rows,
            "rows_skipped": 0 if index is None else index.skipped,
            "rows_refreshed": self._refreshed,
            "staleness_mean": float(stale.mean()) if len(stale) else 0.0,
            "staleness_max": int(stale.max()) if len(stale) else 0,
            "drift": 0.0 if index is None else index.drift,
            "searches": self._search.searches,
            "collectives": self._search.collectives,
            "rows_received": self._search.rows_received,
        }

    def close(self) -> None:
        """Give up searches in the background and the transport; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.close)
        if self._worker is not None:
            self._worker.close(timeout_s=5.0)
        if self._index is not None:
            self._index.close()
        self._transport.close()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _step(self) -> int:
        if isinstance(self._source, Rehearsal):
            return self._source.steps
        if self._now is not None:
            return self._now
        count = len(self._source)
        return int(self._source.written(np.arange(count)).max()) if count else 0

    def _ask(self, queries: ArrayLike | Tensor | None, k: int, where: Where) -> Callable[[], Retrieved]:
        """A job that searches; what it depends on is taken now."""
        self._check_open()
        index: RowIndex | None = None
        count, vectors, error = 1, np.zeros((0, 0), dtype=np.float32), None
        try:
            index = self.sync()
            width = 0 if index is None else index.width
            count, vectors = wanted(k), prepared(queries, width, self.config.metric)
        except Exception as failure:  # of any kind, as `embed` is the user's: the other ranks wait for this one
            error = failure
        now = self._step

        def job() -> Retrieved:
            told = {"metric": self.config.metric, "error": "" if error is None else _described(error)}
            try:
                return self._search(index, vectors, count, where, now, **told)
            finally:
                if error is not None:
                    raise error

        return job

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise ClosedError("the retriever was closed; make a new one to go on")
        if self._transport.outdated:
            raise ExchangeError("the ranks were numbered anew since the retriever was made; close it, make a new one")


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, RehearsalError) else repr(error)


def _config_of(source: Rehearsal | RehearsalBuffer, config: ConfigLike) -> RetrievalConfig:
    if isinstance(config, RetrievalConfig):
        return config
    if config is not None:
        return RetrievalConfig(**config)
    found = source.config.retrieval if isinstance(source, Rehearsal) else None
    if found is None:
        raise ConfigError(
            "rehearsal.retrieval is missing: it says which field is the embedding; add it, or give config"
        )
    return found
