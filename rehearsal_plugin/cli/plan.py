"""`rehearsal plan`: memory, traffic and time of a job, estimated before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rehearsal_plugin.cli.plan_table import print_plan
from rehearsal_plugin.cli.row_size import row_size
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.source import read
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.cost_model import (
    COPY_GB_S,
    DRAW_RANK_BY_PARTITION_NS,
    DRAW_RANK_NS,
    DRAW_US,
    LINKS,
    Links,
    Load,
    Times,
    coverage,
    load_of,
    times,
)

__all__ = ["plan"]

Option = typer.Option
Figure = Annotated[float | None, Option(min=0, help="In place of that of --links.")]
MICRO_BATCH, ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def plan(
    config: Annotated[Path, typer.Argument(help="The section, or a whole DeepSpeed config: JSON or YAML.")],
    ranks: Annotated[int, Option(min=1, help="Data-parallel ranks that share the buffer.")],
    step_ms: Annotated[float, Option(help="Milliseconds of an optimizer step without rehearsal, above 0.")],
    row_bytes: Annotated[
        str | None, Option(help="A row with all that is recorded beside it: bytes, or such as 16KiB.")
    ] = None,
    field: Annotated[
        list[str] | None,
        Option(help="In place of --row-bytes: a field of a sample as NAME=DTYPE[SHAPE], one option for each."),
    ] = None,
    rows_of: Annotated[Path | None, Option(help="In place of --row-bytes: a checkpoint with such rows.")] = None,
    batch: Annotated[int | None, Option(min=1, help="Rows of a micro-batch of a rank, where CONFIG has none.")] = None,
    accumulation: Annotated[int | None, Option(min=1, help="Micro-batches of a step; else of CONFIG, or 1.")] = None,
    rows: Annotated[int | None, Option(min=1, help="Rows of the past, of all ranks together.")] = None,
    tokens: Annotated[int | None, Option(min=1, help="The same in tokens; needs --row-tokens.")] = None,
    row_tokens: Annotated[int | None, Option(min=1, help="Tokens of a row.")] = None,
    links: Annotated[str, Option(help=f"Published figures of a cluster: {', '.join(LINKS)}.")] = "h100-ndr",
    node: Annotated[int | None, Option(min=1, help="Ranks of a node, in place of that of --links.")] = None,
    base_us: Figure = None,
    hop_us: Figure = None,
    net_hop_us: Figure = None,
    message_us: Figure = None,
    gb_s: Figure = None,
    net_gb_s: Figure = None,
    draw_us: Annotated[float, Option(min=0, help="Microseconds of a draw from few ranks.")] = DRAW_US,
    rank_ns: Annotated[float | None, Option(min=0, help="Of the draw, for each rank that is drawn from.")] = None,
    copy_gb_s: Annotated[float, Option(help="GB/s at which one core copies rows, above 0.")] = COPY_GB_S,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tell what a job will take: memory and bytes of a rank, whether a step hides it, what of the past is kept."""
    section = RehearsalConfig.load(config)
    if not section.enabled:
        raise ConfigError(f"rehearsal.enabled is false in {config}: there is nothing to plan")
    figures = {"node": node, "base_us": base_us, "hop_us": hop_us, "net_hop_us": net_hop_us}
    figures |= {"message_us": message_us, "gb_s": gb_s, "net_gb_s": net_gb_s}
    _check_positive({"--step-ms": step_ms, "--copy-gb-s": copy_gb_s, "--gb-s": gb_s, "--net-gb-s": net_gb_s})
    size, shape = row_size(row_bytes, field or [], rows_of), _batch_shape(read(config), ranks, batch, accumulation)
    past = _past_rows(rows, tokens, row_tokens)
    stored, load = size.held(section.buffer.storage), load_of(section, size.moved, *shape)
    if rank_ns is None:
        rank_ns = DRAW_RANK_BY_PARTITION_NS if section.sampling.by_partition else DRAW_RANK_NS
    chosen = _chosen_links(links, figures)
    load = replace(load, group=chosen.node) if load.within_node else load
    clock = Clock(chosen, step_ms, draw_us, rank_ns, copy_gb_s)
    estimate = {
        "row_bytes": size.moved,
        "stored_bytes": stored,
        "links_name": links,
        **_estimate_memory(section, load, stored),
        **_estimate_traffic(load, ranks),
        **_estimate_time(load, ranks, clock),
        **_estimate_past(section.buffer.rows(stored), ranks, past, load.offered / math.prod(shape)),
    }
    if section.sampling.weights == "retrieved":
        estimate["left_out"] = "the queries and answers of sampling.weights 'retrieved', which travel in the headers"
    if as_json:
        print(json.dumps(estimate, indent=2))
    else:
        print_plan(estimate)


def _check_positive(options: Mapping[str, float | None]) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:
            raise typer.BadParameter(f"{name} is {value:g}; give a number above 0")


@dataclass(frozen=True)
class Clock:
    """What the time of the background depends on, beside the load."""

    links: Links
    step_ms: float
    draw_us: float
    rank_ns: float
    copy_gb_s: float

    def times(self, load: Load, ranks: int) -> Times:
        """The parts of the background in a step."""
        costs = {"draw_us": self.draw_us, "rank_ns": self.rank_ns, "copy_gb_s": self.copy_gb_s}
        return times(load, ranks, self.links, **costs)

    def scope_that_hides(self, load: Load, ranks: int) -> int | None:
        """The largest group of ranks whose exchange a step hides; None where it is hidden as it is, or by no group."""
        if not load.row_trips or self.times(load, ranks).total <= self.step_ms:
            return None
        sizes = (1 << power for power in range(ranks.bit_length() - 1, 0, -1))
        fitting = (size for size in sizes if self.times(replace(load, group=size), ranks).total <= self.step_ms)
        return next(fitting, None)


def _batch_shape(config: Mapping[str, Any], ranks: int, batch: int | None, accumulation: int | None) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step: from the options, else from DeepSpeed's keys."""
    values = {key: config.get(key) for key in (MICRO_BATCH, ACCUMULATION, "train_batch_size")}
    known = {key: value for key, value in values.items() if isinstance(value, int) and value > 0}
    total = known.get("train_batch_size")
    micro, steps = batch or known.get(MICRO_BATCH), accumulation or known.get(ACCUMULATION)
    if micro is None and total is not None:
        micro = total // (ranks * (steps or 1))
    if not micro:
        raise typer.BadParameter(f"the config has no {MICRO_BATCH} above 0; give the rows of a micro-batch by --batch")
    if steps is None:
        steps = 1 if total is None else total // (ranks * micro)
    if total is not None and None in (batch, accumulation) and micro * steps * ranks != total:
        raise typer.BadParameter(
            f"train_batch_size is {total}, and {ranks} ranks with {steps} micro-batches of {micro} rows make "
            f"{micro * steps * ranks}; change --ranks, or give --batch and --accumulation"
        )
    return micro, steps


def _chosen_links(name: str, figures: Mapping[str, float | None]) -> Links:
    if name not in LINKS:
        raise typer.BadParameter(f"--links is '{name}'; there are {', '.join(LINKS)}, and an option for each figure")
    changes: dict[str, Any] = {key: value for key, value in figures.items() if value is not None}
    return replace(LINKS[name], **changes)


def _past_rows(rows: int | None, tokens: int | None, row_tokens: int | None) -> int | None:
    if (tokens is None) != (row_tokens is None):
        raise typer.BadParameter("--tokens and --row-tokens go together")
    if rows is not None and tokens is not None:
        raise typer.BadParameter("--rows and --tokens both tell the past; keep one of them")
    return rows if tokens is None or row_tokens is None else max(1, tokens // row_tokens)


def _estimate_memory(section: RehearsalConfig, load: Load, stored: int) -> dict[str, Any]:
    """Memory of one rank: the buffer, and rows on their way, in pools that are used in turn and grow by doubling."""
    rows = section.buffer.rows(stored)
    moving = (load.offered, load.replayed, load.replayed)
    pools = sum(2 << (math.ceil(count) - 1).bit_length() for count in moving if count)
    return {
        "storage": section.buffer.storage,
        "buffer_rows": rows,
        "buffer_bytes": rows * stored,
        "transit_bytes": pools * load.row_bytes,
    }


def _estimate_traffic(load: Load, ranks: int) -> dict[str, Any]:
    """Traffic of one rank in a step; rows that a rank draws from itself do not travel."""
    group = load.drawn_from(ranks)
    away, alone = (group - 1) / group, not load.row_trips or ranks == 1
    return {
        "offered_rows": load.offered,
        "replayed_rows": load.replayed,
        "rows_bytes": away * load.replayed * load.row_bytes,
        "headers_bytes": 0 if alone else group * load.header_bytes,
        "header_every": 0 if alone else load.header_every,
        "messages": 0 if alone else load.messages(ranks) * load.row_trips,
    }


def _estimate_time(load: Load, ranks: int, clock: Clock) -> dict[str, Any]:
    taken = clock.times(load, ranks)
    return {
        "background_ms": {**asdict(taken), "total": taken.total},
        "step_ms": clock.step_ms,
        "share_of_step": taken.total / clock.step_ms,
        "hides": taken.total <= clock.step_ms,
        "scope": clock.scope_that_hides(load, ranks),
        "links": clock.links.source,
    }


def _estimate_past(capacity: int, ranks: int, past_rows: int | None, offered: float) -> dict[str, Any]:
    if past_rows is None:
        return {}
    return {"seen_rows": past_rows, "past_share": coverage(capacity, ranks, past_rows, offered)}
