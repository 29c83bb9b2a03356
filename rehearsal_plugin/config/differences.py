"""Digests of a section key by key, by which ranks find out which keys they were given different values for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from rehearsal_plugin.config.models import RehearsalConfig
from rehearsal_plugin.config.problems import section_type

__all__ = ["MAY_DIFFER", "key_digests", "value_at"]

MAY_DIFFER = frozenset({
    "rehearsal.enabled",
    "rehearsal.buffer.path",
    "rehearsal.buffer.preload",
    "rehearsal.sampling.weights_file",
    "rehearsal.exchange.timeout_s",
    "rehearsal.checkpoint.write_timeout_s",
    "rehearsal.metrics.file",
    "rehearsal.metrics.every",
    "rehearsal.metrics.rotate",
})  # fmt: skip
"""Keys that may have another value on each rank: paths, which name the disks of a host, times to wait, and
what rank 0 alone reads."""


def key_digests(config: RehearsalConfig) -> dict[str, int]:
    """A digest below 2^63 of the value of each key, by key path; the same key paths for every section.

    A part of the section that is left out counts as one whose keys are all null.
    """
    values = _values_of(RehearsalConfig, config, RehearsalConfig.KEY_PATH)
    return {path: _digest_of(value) for path, value in values if path not in MAY_DIFFER}


def value_at(config: RehearsalConfig, path: str) -> Any:
    """The value of the key at a path that `key_digests` has."""
    return dict(_values_of(RehearsalConfig, config, RehearsalConfig.KEY_PATH))[path]


def _values_of(section: type[BaseModel], values: BaseModel | None, path: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        value, inner = getattr(values, name, None), section_type(field)
        if inner is None:
            yield f"{path}.{name}", value
        else:
            yield f"{path}.{name}", "given" if value is not None else None
            yield from _values_of(inner, value, f"{path}.{name}")


def _digest_of(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
