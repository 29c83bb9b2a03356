"""Search in the buffers of all ranks, beside training or over a checkpoint."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.vector_index.filters import Where
from rehearsal_plugin.buffer.vector_index.index import RowIndex
from rehearsal_plugin.buffer.vector_index.known_rows import Embed, columns_of
from rehearsal_plugin.config import ExchangeConfig
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.distributed.transport import Transport, open_transport
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError, RehearsalError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.retrieval.queries import ConfigLike, checked_config, checked_k, prepare_queries
from rehearsal_plugin.retrieval.retrieved import Retrieved
from rehearsal_plugin.retrieval.search import DistributedSearch
from rehearsal_plugin.retrieval.stored import stored_rows

__all__ = ["Retriever"]

EVERYWHERE = Where()


class Retriever:
    """Finds rows of all ranks by their embedding.

    All ranks make their retrievers in the same order and call `search` or `submit` equally often, without queries where
    they have none. Each retriever has its own transport, so its collectives do not mix with others.

    | call | calling thread | background thread | other ranks |
    |---|---|---|---|
    | `search` | `sync`, then the whole search | | call it too |
    | `submit` | `sync`, then returns a future | the search: collectives, reading of rows | call it too |
    | `sync`, `refresh` | waits for the last `submit`, then updates the index | | take no part |
    | `metrics` | reads figures of the index | | take no part |
    | `close` | stops a waiting search, ends the thread, closes the transport | | take no part |

    All calls come from one thread. `sync` and `refresh` wait for the background, so no two threads change the index at
    once.

    Args:
        source: A rehearsal, whose training may go on; or a buffer that does not change meanwhile.
        config: The section `rehearsal.retrieval`; None takes that of the rehearsal.
        transport: Connection between the ranks, closed with the retriever. None takes all ranks of torch.distributed if
            that is initialised, over the rehearsal's `exchange.backend`, else this process alone.
        embed: Computes the embeddings of new rows, where rows have none as a field.
        timeout_s: Seconds to wait for the other ranks; None takes the rehearsal's `exchange.timeout_s`, else 600.
        now: The present step, for a buffer without a rehearsal.

    Raises:
        ConfigError: There is no section `retrieval`, or it cannot be used.
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
        self._source, self._embed, self._now, self._process = source, embed, now, os.getpid()
        self.config = checked_config(config, source.config.retrieval if isinstance(source, Rehearsal) else None)
        exchange = source.config.exchange if isinstance(source, Rehearsal) else ExchangeConfig()
        timeout_s = exchange.timeout_s if timeout_s is None else timeout_s
        self._transport = transport or open_transport(exchange.backend, timeout_s)
        self._stop = threading.Event()
        self._search = DistributedSearch(self._transport, timeout_s, self._stop.is_set)
        self._index: RowIndex | None = None
        self._worker: BackgroundThread[Retrieved] | None = None
        self._last: Future[Retrieved] | None = None
        self._refreshed = 0
        atexit.register(self.close)  # the interpreter would abort with a search in the background

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
        """A retriever over the rows of the newest checkpoint in a folder, saved by any number of ranks.

        Every rank loads an equal share of the rows into memory. All ranks must see the folder. Ages count from the step
        of the checkpoint.

        Args:
            folder: Folder written by `Rehearsal.save`, DeepSpeed or `rehearsal seed`.
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
        """Search the rows of all ranks, as they are now.

        Args:
            queries: `[n, width]` numbers; None for a rank without queries.
            k: Rows for each query.
            where: Filter of the rows; each rank filters for its own queries.

        Raises:
            BatchError: The queries, or the embeddings of rows, are no vectors of one length. The other ranks get an
                `ExchangeError` then, and for any other error of `embed`.
            ExchangeError: A rank is gone, or has other fields or another metric; or an elastic job has other ranks.
            ExchangeTimeout: A rank did not answer in time.
            ClosedError: `close` was called.
        """
        return self._prepare_search(queries, k, where)()

    def submit(
        self, queries: ArrayLike | Tensor | None = None, k: int = 10, where: Where = EVERYWHERE
    ) -> Future[Retrieved]:
        """Search in the background while training goes on; see `search`.

        It covers the rows stored at the call. A row that is replaced before it is read is passed over, and the next
        nearest takes its place. Recorded state of a row may be rewritten while it is read.

        Raises:
            ConfigError: The transport has to be used from the training thread (Horovod, NCCL); use `search`.
        """
        if self._transport.main_thread:
            raise ConfigError(
                f"{type(self._transport).__name__} issues collectives from the training thread only; use search()"
            )
        search_now = self._prepare_search(queries, k, where)
        self._worker = self._worker or BackgroundThread(f"retrieval-rank{self._transport.rank}")
        self._last = self._worker.submit(search_now)
        return self._last

    def refresh(self, embed: Embed | None = None, rows: int = 256) -> int:
        """Recompute the embeddings of the stalest rows of this rank with the present model.

        They are stored with `update_fields` where rows have a field for them. Other ranks take no part.

        Args:
            embed: Computes embeddings of rows; None takes that of the retriever.
            rows: Largest number of rows.

        Returns:
            Number of rows with a new embedding.

        Raises:
            ConfigError: There is no `embed`.
            BatchError: `embed` did not return one vector for each row.
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
        index.store(slots, vectors, self._current_step)
        self._refreshed += len(slots)
        return len(slots)

    def sync(self) -> RowIndex | None:
        """Bring the index up to date with the buffer of this rank; `search` and `submit` do it first.

        Waits for a search in the background, which covers the rows stored at its call.
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
            self._index.sync(self._current_step)
        return self._index

    def metrics(self) -> dict[str, float]:
        """Figures of this rank, as of the last search, by name.

        - `rows_indexed`, `rows_refreshed`, `rows_received`: numbers of rows.
        - `rows_skipped`: rows whose embedding is no number.
        - `staleness_mean`, `staleness_max`: steps since the last change of a row's embedding that a `sync` has seen.
        - `drift`: mean of 1 - cosine between the embeddings that changed last and those before.
        - `searches`, `collectives`: calls so far.
        """
        index = self._index
        stale = np.zeros(0, dtype=np.int64) if index is None else index.staleness(self._current_step)
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
        """Stop a search in the background and close the transport; a second call does nothing."""
        if self._stop.is_set() or os.getpid() != self._process:  # a forked child has no thread to wait for
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
    def _current_step(self) -> int:
        if isinstance(self._source, Rehearsal):
            return self._source.steps
        if self._now is not None:
            return self._now
        count = len(self._source)
        return int(self._source.written(np.arange(count)).max()) if count else 0

    def _prepare_search(self, queries: ArrayLike | Tensor | None, k: int, where: Where) -> Callable[[], Retrieved]:
        """A function that searches with the present index, queries and step.

        That function raises an error of this one, once the other ranks know of it: they wait for this rank.
        """
        self._check_open()
        index: RowIndex | None = None
        count, vectors, error = 1, np.zeros((0, 0), dtype=np.float32), None
        try:
            index = self.sync()
            width = 0 if index is None else index.width
            count, vectors = checked_k(k), prepare_queries(queries, width, self.config.metric)
        except Exception as failure:  # of any kind, as `embed` is the user's
            error = failure
        now = self._current_step

        def search_now() -> Retrieved:
            message = "" if error is None else _error_text(error)
            try:
                return self._search(index, vectors, count, where, now, metric=self.config.metric, error=message)
            finally:
                if error is not None:
                    raise error

        return search_now

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise ClosedError("the retriever was closed; make a new one to go on")
        if self._transport.outdated:
            raise ExchangeError("the ranks were numbered anew since the retriever was made; close it, make a new one")


def _error_text(error: Exception) -> str:
    return str(error) if isinstance(error, RehearsalError) else repr(error)
