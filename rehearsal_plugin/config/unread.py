"""Keys that were given and that nothing reads, because another key says so."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from rehearsal_plugin.config.models import RehearsalConfig
from rehearsal_plugin.config.section import Section

__all__ = ["unread_keys", "warn_of_unread_keys"]

LOG = logging.getLogger(__name__)

STRATEGY_KEYS = ("loss_weight", "alpha", "beta", "gamma", "outputs", "k")
"""Keys of `rehearsal.strategy` that only some strategies read."""


def unread_keys(config: RehearsalConfig, read_by_strategy: Collection[str] | None) -> list[str]:
    """Paths of the keys that differ from their default and have no effect.

    Args:
        config: The `rehearsal` section.
        read_by_strategy: Which of `STRATEGY_KEYS` the strategy reads; None where it is not known.
    """
    sampling, guard = config.sampling, config.guard
    unread: list[tuple[Section, str]] = []
    if read_by_strategy is not None:
        unread += [(config.strategy, key) for key in STRATEGY_KEYS if key not in read_by_strategy]
    if sampling.weights != "retrieved":
        unread += [(sampling, "retrieved_share"), (sampling, "queries")]
    if guard is not None and guard.action != "raise_ratio":
        unread += [(guard, "factor"), (guard, "most")]
    return list(_changed(unread))


def warn_of_unread_keys(config: RehearsalConfig, read_by_strategy: Collection[str] | None) -> None:
    """Log the result of `unread_keys`, if there are any."""
    unread = unread_keys(config, read_by_strategy)
    if unread:
        LOG.warning(
            "no effect: %s; strategy '%s' and the rest of the section read none of these keys, so leave them out",
            ", ".join(unread),
            config.strategy.name,
        )


def _changed(keys: list[tuple[Section, str]]) -> Iterator[str]:
    for section, key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{section.KEY_PATH}.{key}"
