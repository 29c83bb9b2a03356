"""What rehearsal will take of a cluster: memory, bytes and time of a step, before a job runs.

The time of an exchange follows the alpha-beta model of Hockney (1994): a message of m bytes takes alpha + m / beta. The
headers of all ranks go round a ring, in the steps that NCCL itself reckons with; rows go straight from owner to reader.
The rank that is asked for most rows decides how long that takes. Nothing overlaps in the model, so a real exchange
may be faster, unless the training itself keeps the links or the cores busy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.global_counts import least_pairs
from rehearsal_plugin.distributed.header import FIXED, WORD_BYTES
from rehearsal_plugin.strategies import make_strategy

__all__ = [
    "COPY_GB_S",
    "DRAW_BY_PARTITION_NS",
    "DRAW_NS",
    "LINKS",
    "Links",
    "Load",
    "Times",
    "busiest_rows",
    "coverage",
    "load_of",
    "times",
]

DRAW_NS, DRAW_BY_PARTITION_NS = 40.0, 170.0
"""Nanoseconds of the draw for each row that any rank asks for, uniform and by partition, as
`scripts/benchmarks/exchange.py` measures them."""

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
        message_us: A message with rows. Every rank gets one, also without rows: gloo does so, and PyTorch asks it of
            NCCL since 2.14. They are reckoned one after the other, which is the worst case.
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
        collectives: 0 where ranks draw from themselves alone.
    """

    offered: float
    replayed: float
    row_bytes: int
    header_bytes: int
    collectives: int


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
        ratio = max(config.ratio or 0.0, 0.0 if schedule is None else schedule.to)
        replayed = batch * (ratio if config.mode == "replace" else ratio / (1 - ratio))
    offered = min(batch, config.candidates or batch)
    collectives = 0 if config.sampling.scope == "local" else 3 if strategy.refreshes else 2
    header_bytes = WORD_BYTES * (FIXED + 2 * least_pairs(config))
    return Load(offered * accumulation, replayed * accumulation, row_bytes, header_bytes, collectives)


def times(load: Load, ranks: int, links: Links, *, draw_ns: float, copy_gb_s: float) -> Times:
    """How long the exchange of a step takes.

    Args:
        load: Of each rank.
        ranks: How many share the buffer.
        links: Between them.
        draw_ns: Nanoseconds that the draw takes for each row that any rank asks for; every rank draws for all.
        copy_gb_s: GB/s at which rows are copied: in, out, and to the model.
    """
    alone = ranks == 1 or not load.collectives
    draw = draw_ns * load.replayed * (1 if alone else ranks) / 1e6
    copies = (load.offered + 2 * load.replayed) * load.row_bytes / copy_gb_s / 1e6
    if alone:
        return Times(0.0, draw, copies, 0.0)
    nodes = math.ceil(ranks / links.node)
    crowd = max(1.0, min(ranks, links.node) / links.cores) if links.cores else 1.0
    bytes_a_ms = 1e6 * (links.gb_s if nodes == 1 else links.net_gb_s)
    hops_us = (ranks - nodes) * links.hop_us + (nodes - 1) * links.net_hop_us
    headers = crowd * (links.base_us + hops_us) / 1e3 + crowd * ranks * load.header_bytes / bytes_a_ms
    most = busiest_rows(ranks, load.replayed)
    # Links of its own hold the busiest rank up, and cores that all share what all of them move together.
    moved = max(most, crowd * load.replayed) * (ranks - 1) / ranks
    rows = crowd * (links.base_us + (ranks - 1) * links.message_us) / 1e3 + moved * load.row_bytes / bytes_a_ms
    return Times(headers, draw, copies, rows * (load.collectives - 1))


def busiest_rows(ranks: int, replayed: float) -> int:
    """Rows that the rank sends which is asked for most, when every rank asks for `replayed` rows of any rank.

    What a rank is asked for is close to a Poisson number with that mean; this is the number that of all ranks together
    less than one exceeds in the mean.
    """
    if replayed <= 0:
        return 0
    most, tail = 0, 1.0 - math.exp(-replayed)
    while ranks * tail >= 1.0:
        most += 1
        tail -= math.exp(most * math.log(replayed) - replayed - math.lgamma(most + 1))
    return min(max(most, math.ceil(replayed)), math.ceil(ranks * replayed))


def coverage(capacity: int, ranks: int, seen: int, offered: float) -> float:
    """The share of the rows seen so far that the buffers of all ranks hold.

    Args:
        capacity: Rows of each rank's buffer.
        ranks: How many.
        seen: Rows that all ranks together have seen.
        offered: The share of these that was offered to the buffer.
    """
    return min(capacity * ranks, seen * offered) / seen
