"""What rehearsal will take of a cluster: memory, bytes and time of a step, before a job runs.

The time of an exchange follows the alpha-beta model of Hockney (1994): a message of m bytes takes alpha + m / beta. The
headers of all ranks go round a ring, in the steps that NCCL itself reckons with, but only in some exchanges; rows go
straight from owner to reader, each rank sending as many as it gets. Nothing overlaps in the model, so a real exchange
may be faster, unless the training itself keeps the links or the cores busy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.census import GROUPS_TOLD_EVERY
from rehearsal_plugin.distributed.global_counts import least_pairs
from rehearsal_plugin.distributed.header import FIXED, PARTITION_WORDS, WORD_BYTES
from rehearsal_plugin.distributed.header_schedule import LONGEST
from rehearsal_plugin.strategies import make_strategy

__all__ = [
    "COPY_GB_S",
    "DRAW_RANK_BY_PARTITION_NS",
    "DRAW_RANK_NS",
    "DRAW_US",
    "LINKS",
    "Links",
    "Load",
    "Times",
    "coverage",
    "has_seldom_news",
    "header_ms",
    "load_of",
    "times",
]

DRAW_US = 250.0
"""Microseconds of a draw for few ranks, as `scripts/benchmarks/exchange.py` measures them."""

DRAW_RANK_NS, DRAW_RANK_BY_PARTITION_NS = 10.0, 170.0
"""Nanoseconds for each rank that rows are drawn from, uniform and by ten partitions, as measured there: what a rank
sums up over the table of all."""

COPY_GB_S = 10.0
"""GB/s at which one core gathers rows of 16 KiB, as `scripts/benchmarks/scale.py` measures it."""


@dataclass(frozen=True)
class Links:
    """How ranks are connected, in microseconds and GB/s (1e9 bytes, one direction) of one rank.

    Attributes:
        node: Ranks of a node.
        base_us: What a collective takes before the first byte.
        hop_us: A step of the ring within a node.
        net_hop_us: The same between two nodes.
        message_us: A message with rows. They are reckoned one after the other, which is the worst case.
        gb_s: Bandwidth within a node.
        net_gb_s: Bandwidth between nodes.
        cores: Cores of a node, where ranks that outnumber them share them to communicate; None where the GPU or the
            network card does that.
        source: Where the figures come from.
    """

    node: int
    base_us: float
    hop_us: float
    net_hop_us: float
    message_us: float
    gb_s: float
    net_gb_s: float
    cores: int | None = None
    source: str = ""


NCCL = "latencies: the tables of NCCL, src/graph/tuning.cc (ring, LL for headers and Simple for rows)"

LINKS = MappingProxyType(
    {
        "h100-ndr": Links(
            8, 8.4, 0.85, 2.7, 9.6, 450.0, 50.0,
            source="NVLink 4, 900 GB/s in both directions; ConnectX-7, 400 Gb/s a GPU (DGX H100); " + NCCL,
        ),
        "a100-hdr": Links(
            8, 8.4, 0.85, 2.7, 9.6, 300.0, 25.0,
            source="NVLink 3, 600 GB/s in both directions; ConnectX-6, 200 Gb/s a GPU (DGX A100, RA-09950-001); "
            + NCCL,
        ),
        "tcp": Links(
            8, 50.0, 50.0, 50.0, 50.0, 0.625, 0.625,
            source="gloo over one TCP flow of 5 Gb/s (AWS, 'New - ENA Express'); 50 us a message (100 GbE, "
            "fridayswithfaraday.com, 'NVIDIA Dynamo network optimization')",
        ),
    }
)  # fmt: skip
"""Named figures as published, none of them measured here."""


@dataclass(frozen=True)
class Load:
    """What one rank moves in an optimizer step.

    Attributes:
        offered: Rows offered to the buffer, as a mean.
        replayed: Rows asked for, as a mean, where a schedule asks for most.
        row_bytes: Bytes of a row, with all that is recorded beside it.
        header_bytes: Bytes of a rank's header.
        row_trips: How often rows or their state go between ranks; 0 where ranks draw from themselves alone.
        header_every: Exchanges from one header to the next, once buffers are full.
        group: Ranks that draw from each other; None for all.
        within_node: Whether the group is a node; else it is spread over as many nodes as it has ranks.
    """

    offered: float
    replayed: float
    row_bytes: int
    header_bytes: int
    row_trips: int
    header_every: int = LONGEST
    group: int | None = None
    within_node: bool = False

    def drawn_from(self, ranks: int) -> int:
        """Ranks out of `ranks` that one draws from."""
        return 1 if not self.row_trips else min(ranks, self.group or ranks)

    def messages(self, ranks: int) -> float:
        """Ranks that one sends rows to in a step, at most."""
        return min(self.drawn_from(ranks) - 1, math.ceil(self.replayed))


@dataclass(frozen=True)
class Times:
    """Milliseconds of the background in a step."""

    headers: float
    draw: float
    copies: float
    rows: float

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.headers + self.draw + self.copies + self.rows


def load_of(config: RehearsalConfig, row_bytes: int, batch: int, accumulation: int = 1) -> Load:
    """What a config asks of one rank in an optimizer step.

    Args:
        config: The section.
        row_bytes: Bytes of a row, with all that is recorded beside it.
        batch: Rows of a micro-batch, as the loader gives them.
        accumulation: Micro-batches of an optimizer step.
    """
    strategy = make_strategy(config.strategy)
    if config.representatives is not None:
        replayed = float(config.representatives * strategy.draws)
    else:
        schedule = config.ratio_schedule
        given = config.given_ratio or 0.0 if config.ratio_budget is None else config.ratio_budget.max
        ratio = max(given, 0.0 if schedule is None else schedule.to)
        replayed = batch * (ratio if config.mode == "replace" else ratio / (1 - ratio))
    offered, scope = min(batch, config.candidates or batch), config.sampling.scope
    return Load(
        offered * accumulation,
        replayed * accumulation,
        row_bytes,
        WORD_BYTES * (FIXED + 2 * least_pairs(config) + PARTITION_WORDS * config.follows_losses),
        0 if scope == "local" else 2 if strategy.refreshes else 1,
        LONGEST if has_seldom_news(config) else 1,
        scope if isinstance(scope, int) else None,
        scope == "node",
    )


def has_seldom_news(config: RehearsalConfig) -> bool:
    """Whether ranks with full buffers, whose steps are alike, have nothing to tell each other for long."""
    by_row = config.sampling.weights == "uniform" and config.ratio_in == "rows"
    return by_row and config.guard is None and not config.follows_losses


def times(load: Load, ranks: int, links: Links, *, draw_us: float, rank_ns: float, copy_gb_s: float) -> Times:
    """How long the exchange of a step takes in the mean.

    Args:
        load: Of each rank.
        ranks: How many share the buffer.
        links: Between them.
        draw_us: Microseconds of a draw.
        rank_ns: Nanoseconds more for each rank that rows are drawn from.
        copy_gb_s: GB/s at which rows are copied: in, out, and to the model.
    """
    group = min(links.node, ranks) if load.within_node else load.drawn_from(ranks)
    draw = draw_us / 1e3 + rank_ns * group / 1e6
    copies = (load.offered + 2 * load.replayed) * load.row_bytes / copy_gb_s / 1e6
    if not load.row_trips or ranks == 1:
        return Times(0.0, draw, copies, 0.0)
    headers = _ring_ms(load, ranks, links) / load.header_every
    if group < ranks:
        headers = _ring_ms(load, group, links, spread=not load.within_node) / load.header_every
        headers += _ring_ms(load, ranks, links) / (LONGEST if load.header_every > 1 else GROUPS_TOLD_EVERY)
    crowd, one_node = _crowd(ranks, links), load.within_node or (group == ranks <= links.node)
    bytes_a_ms = 1e6 * (links.gb_s if one_node else links.net_gb_s)
    messages = min(group - 1, math.ceil(load.replayed))
    moved = crowd * load.replayed * (group - 1) / group * load.row_bytes
    rows = crowd * (links.base_us + messages * links.message_us) / 1e3 + moved / bytes_a_ms
    return Times(headers, draw, copies, rows * load.row_trips)


def header_ms(load: Load, ranks: int, links: Links) -> float:
    """How long the headers take of an exchange that has those of all ranks."""
    return 0.0 if ranks == 1 or not load.row_trips else _ring_ms(load, ranks, links)


def _ring_ms(load: Load, ranks: int, links: Links, *, spread: bool = False) -> float:
    """Headers of so many ranks, once round; `spread` over as many nodes."""
    nodes = ranks if spread else math.ceil(ranks / links.node)
    crowd, bytes_a_ms = _crowd(ranks, links), 1e6 * (links.gb_s if nodes == 1 else links.net_gb_s)
    hops_us = (ranks - nodes) * links.hop_us + (nodes - 1) * links.net_hop_us
    return crowd * (links.base_us + hops_us) / 1e3 + crowd * ranks * load.header_bytes / bytes_a_ms


def _crowd(ranks: int, links: Links) -> float:
    """How many ranks share a core to communicate, at least 1."""
    return max(1.0, min(ranks, links.node) / links.cores) if links.cores else 1.0


def coverage(capacity: int, ranks: int, seen: int, offered: float) -> float:
    """The share of the rows seen so far that the buffers of all ranks hold.

    Args:
        capacity: Rows of each rank's buffer.
        ranks: How many.
        seen: Rows that all ranks together have seen.
        offered: The share of these that was offered to the buffer.
    """
    return min(capacity * ranks, seen * offered) / seen
