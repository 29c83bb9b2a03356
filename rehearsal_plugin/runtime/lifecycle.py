"""Makes the buffer and the prefetcher of a rank, and makes the prefetcher anew when ranks come, go or fail."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.distributed.groups import rank_group
from rehearsal_plugin.distributed.opening import SectionCheck
from rehearsal_plugin.distributed.transport import LocalTransport, Pending, Transport, wait
from rehearsal_plugin.errors import StorageError
from rehearsal_plugin.runtime.prefetcher import Prefetcher

__all__ = ["Lifecycle"]

LOG = logging.getLogger(__name__)

RUN_BITS = 63
"""Of the number that tells one run from another: it travels as an int64."""


class Lifecycle:
    """The ranks, the buffer and the prefetcher, from the first rows to `close`.

    | what happens | buffer | prefetcher | transport |
    |---|---|---|---|
    | `begin` (first rows) | made | made | stays |
    | `restart` (rollback, ranks came or went) | stays | made anew | stays, or made anew |
    | `go_alone` (an exchange failed) | stays | made anew | this rank alone |
    | `reset` (a checkpoint is loaded) | gone | gone | stays |

    Args:
        config: The `rehearsal` section.
        transport: The ranks; closed by `close`.
        metrics: What is counted and timed.
        draws: Independent draws of a step.

    Attributes:
        rank: This process among those that share the buffer, or shared it before an exchange failed.
        size: How many those are.
        alone: Whether an exchange failed, and this rank goes on by itself.
        prefetcher: This rank's buffer, exchange and background; None until the first rows.
    """

    def __init__(self, config: RehearsalConfig, transport: Transport, metrics: Metrics, draws: int) -> None:
        self.rank, self.size, self.alone = transport.rank, transport.size, False
        self.prefetcher: Prefetcher | None = None
        self._config, self._transport, self._metrics, self._draws = config, transport, metrics, draws
        self._first_step = 0
        self._run, self._agreed = secrets.randbits(RUN_BITS), False
        self._mixture: Mapping[Any, float] | None = None  # that was proposed last
        self._section_check = self._compare_sections()
        self._group = rank_group(config, transport, self.rank)

    @property
    def step(self) -> int:
        """Number of the next exchange, the same on all ranks."""
        return self._first_step if self.prefetcher is None else self.prefetcher.step

    @property
    def first_step(self) -> int:
        """Number of the first exchange since `restart` or `reset`."""
        return self._first_step

    @property
    def run(self) -> str | None:
        """Identifier of this run, 16 hexadecimal digits: random, of rank 0, and kept over restarts.

        None until the first exchange has told the ranks which one it is.
        """
        self._keep_run()
        return f"{self._run:016x}" if self._agreed else None

    def go_on_as(self, run: str | None) -> None:
        """Drop all rows, and take over the run of a checkpoint that all ranks load; None keeps this one.

        Raises:
            ValueError: It is no such identifier.
        """
        if run is None:
            return
        number = int(run, 16)
        if not 0 <= number < 1 << RUN_BITS:
            raise ValueError(f"{run!r} names no run")
        self.reset(self.step)
        self.join_run(number)

    def join_run(self, run: int) -> None:
        """Take another number for the run, which other ranks have."""
        self._run, self._agreed = run, True
        if self.prefetcher is not None:
            self.prefetcher.census.run = run

    def check_sections(self) -> None:
        """Refuse other sections on other ranks, where no exchange does it; waits for nobody.

        Raises:
            ExchangeError: A rank has another section.
        """
        if self._section_check is not None:
            self._section_check.hear()

    def begin(self, layout: RowLayout, device: torch.device) -> Prefetcher:
        """Make an empty buffer for rows of a layout, and its prefetcher; batches live on `device`."""
        padding = self._config.padding
        if padding is not None and padding.values and not layout.pads:  # rows of earlier checkpoints do not tell
            layout = replace(layout, pads=padding.values, rows_per_sample=self._config.rows_per_sample)
        buffer = RehearsalBuffer(self._config.buffer, layout, rank=self.rank, ranks=self.size, seed=self._config.seed)
        self.prefetcher = self._prefetcher_of(buffer, device)
        return self.prefetcher

    def restart(self, step: int, connect: Callable[[], Transport] | None = None) -> None:
        """Begin the exchange anew at `step`; see `Rehearsal.restart`.

        Raises:
            StorageError: The background does not end writing within `exchange.timeout_s`.
        """
        self._restart(step, connect, alone=False)

    def go_alone(self, error: Exception) -> None:
        """Exchange with nobody from now on; what was on its way is lost, the rows of this rank stay."""
        LOG.warning(
            "rank %d goes on with the rows of its own buffer (rehearsal.exchange.on_failure is 'local'): %s",
            self.rank,
            error,
        )
        self._metrics.failures += 1
        self._restart(self.step, LocalTransport, alone=True)

    def reset(self, step: int) -> None:
        """Begin anew at `step` without a row."""
        if self.prefetcher is not None:
            self._keep_run()
            self.prefetcher.close(drain_s=0.0)
            self.prefetcher = None
        self._first_step = step

    def propose_mixture(self, weights: Mapping[Any, float]) -> None:
        """Take other weights by partition as soon as all ranks have them, also after a restart."""
        self._mixture = weights
        if self.prefetcher is not None:
            self.prefetcher.mixture.propose(weights)

    def gather(self, *values: int) -> list[list[int]]:
        """The values of every rank, by rank; between two steps, when all ranks ask and nothing is on its way.

        Raises:
            ExchangeError: A rank does not answer.
        """
        pending = self._transport.all_gather(torch.tensor(values, device="cpu"))
        answers: list[list[int]] = self._wait(pending, "an agreement").tolist()
        return answers

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, by rank; under the rules of `gather`.

        Raises:
            ExchangeError: A rank does not answer.
        """
        data = text.encode()
        lengths = [length for (length,) in self.gather(len(data))]
        words = np.frombuffer(data.ljust(8 * -(-max(1, *lengths) // 8), b"\0"), dtype=np.int64)
        answers = self.gather(*words.tolist())
        return [
            np.array(answer, dtype=np.int64).tobytes()[:length].decode()
            for answer, length in zip(answers, lengths, strict=True)
        ]

    def swap_bytes(self, sent: Mapping[int, bytes], expected: Mapping[int, int]) -> dict[int, bytes]:
        """Send bytes to other ranks, and receive as many as are `expected` from each; under the rules of `gather`.

        Args:
            sent: By the rank that gets them.
            expected: Number of bytes by the rank that sends them.

        Returns:
            The bytes that came, by the rank that sent them.

        Raises:
            ExchangeError: A rank does not answer.
        """
        everyone, device = range(self._transport.size), self._transport.device
        counts = np.array([len(sent.get(rank, b"")) for rank in everyone])
        expected_counts = np.array([expected.get(rank, 0) for rank in everyone])
        packed = np.frombuffer(bytearray().join(sent[rank] for rank in sorted(sent)), dtype=np.uint8)
        send = torch.from_numpy(packed)[:, None].to(device)
        recv = torch.empty((int(expected_counts.sum()), 1), dtype=torch.uint8, device=device)
        pending = self._transport.all_to_all(send, counts, recv, expected_counts, channel="checkpoint")
        received = self._wait(pending, "a transfer of checkpoint files").cpu().numpy().reshape(-1)
        ends = zip(everyone, expected_counts.tolist(), expected_counts.cumsum().tolist(), strict=True)
        return {rank: received[stop - length : stop].tobytes() for rank, length, stop in ends if length}

    def close(self, drain_s: float) -> None:
        """Stop the background after up to `drain_s` seconds, and close the transport."""
        try:
            if self.prefetcher is not None:
                self.prefetcher.close(drain_s)
        finally:
            self._group.close()
            self._transport.close()

    def _wait(self, pending: Pending, what: str) -> Tensor:
        deadline = time.monotonic() + self._config.exchange.timeout_s
        return wait(pending, deadline, lambda: False, f"{what} on rank {self.rank}")

    def _compare_sections(self) -> SectionCheck | None:
        local = self._config.sampling.scope == "local"
        return SectionCheck(self._config, self._transport) if local else None

    def _keep_run(self) -> None:
        """Remember what the first exchange of this prefetcher has told."""
        if self.prefetcher is not None and self.prefetcher.census.run is not None:
            self._run, self._agreed = self.prefetcher.census.run, True

    def _restart(self, step: int, connect: Callable[[], Transport] | None, *, alone: bool) -> None:
        """As `restart`; `alone` keeps this rank's number among those that are gone."""
        self._keep_run()
        old, self._first_step = self.prefetcher, step
        patience = self._config.exchange.timeout_s
        if old is not None and not old.close(drain_s=0.0, grace_s=patience):
            raise StorageError(
                f"the background of rank {self.rank} has been writing to the buffer for {patience:g} s "
                "(rehearsal.exchange.timeout_s), so it cannot be used anew; see whether its disk still answers"
            )
        if connect is not None:
            self._group.close()
            self._transport.close()
            self._transport = connect()
            if not alone:
                self.rank, self.size = self._transport.rank, self._transport.size
            self.alone = alone
            self._section_check = self._compare_sections()
            self._group = rank_group(self._config, self._transport, self.rank)
        if old is not None:
            self.prefetcher = self._prefetcher_of(old.buffer, old.device)

    def _prefetcher_of(self, buffer: RehearsalBuffer, device: torch.device) -> Prefetcher:
        prefetcher = Prefetcher(
            self._config,
            self._group,
            buffer,
            device,
            self._metrics,
            rank=self.rank,
            draws=self._draws,
            step=self._first_step,
            run=self._run,
        )
        if self._mixture is not None:
            prefetcher.mixture.propose(self._mixture)
        return prefetcher
