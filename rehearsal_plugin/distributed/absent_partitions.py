"""Partitions that the section names and that no rank holds: a misspelt key takes its part of the draws to nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["ABSENT_AFTER", "absent_partitions", "warn_of_absent_partitions"]

LOG = logging.getLogger(__name__)

MIXTURE = "rehearsal.sampling.weights"

ABSENT_AFTER = 100
"""Exchanges after which partitions that nobody has held yet are named, once; and again where the mixture changed."""


def absent_partitions(
    config: RehearsalConfig, weights: Mapping[str, float] | None, keys: IntArray
) -> Iterator[tuple[str, list[str]]]:
    """Key paths of the section, each with the partitions that it names and that are not held.

    Args:
        config: The `rehearsal` section.
        weights: The mixture in force.
        keys: `[n]` int64, partitions that are or were held.
    """
    held = set(map(str, keys.tolist()))
    named: dict[str, Iterable[object]] = {
        MIXTURE: [key for key, weight in (weights or {}).items() if weight],
        "rehearsal.strategy.partition_weights": config.strategy.partition_weights or (),
        "rehearsal.guard.partitions": (config.guard and config.guard.partitions) or (),
    }
    for path, partitions in named.items():
        absent = [str(key) for key in partitions if str(key) not in held]
        if absent:
            yield path, absent


def warn_of_absent_partitions(
    config: RehearsalConfig, weights: Mapping[str, float] | None, keys: IntArray, holder: str, *, mixture_only: bool
) -> None:
    """Log a warning for each result of `absent_partitions`.

    Args:
        config: The `rehearsal` section.
        weights: The mixture in force.
        keys: `[n]` int64, partitions that are or were held.
        holder: Who would hold them.
        mixture_only: Whether the other keys of the section were looked at before.
    """
    for path, absent in absent_partitions(config, weights, keys):
        if mixture_only and path != MIXTURE:
            continue
        LOG.warning(
            "%s names the partitions %s, of which %s after %d steps; partitions are called by the integers in "
            "rehearsal.buffer.partition_by %r, which has %s so far",
            path,
            absent,
            holder,
            ABSENT_AFTER,
            config.buffer.partition_by,
            sorted(keys.tolist())[:20],
        )
