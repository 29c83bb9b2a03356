"""The names that keys of the section take, and what they stand for.

Each wing fills its own registry when it is imported, which importing the config does. Register yours before the section
is read::

    from rehearsal_plugin.buffer.policies import register

    @register("newest_half")
    def newest_half(index, offer, rng): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.registry import Registry

__all__ = [
    "POLICIES",
    "STORAGES",
    "STRATEGIES",
    "TRANSPORTS",
    "JudgedBy",
    "RegisteredPolicy",
    "SampleOf",
    "listing",
    "registered_in",
]


JudgedBy: TypeAlias = Literal["score", "features"]
"""What a policy looks at in rows: one number, or several."""

SampleOf: TypeAlias = Literal["rank", "partition"]
"""What the rows that a policy keeps are a uniform sample of: all offered on a rank, or those of each partition."""


@dataclass(frozen=True)
class RegisteredPolicy:
    """A policy, and the keys of `rehearsal.buffer` that it reads.

    Attributes:
        choose: `(slot index, offer, rng) -> slots`; see `buffer.policies.Policy`.
        partitions: Whether it needs `partition_by`.
        judges: What it needs of `score_by`: one score a row, features, or nothing (None).
        newest: Whether it keeps the newest rows. A step with too many candidates is then thinned to these.
        sample_of: What its rows are a uniform sample of; None for nothing.
    """

    choose: Callable[..., Any]
    partitions: bool = False
    judges: JudgedBy | None = None
    newest: bool = False
    sample_of: SampleOf | None = None

    def __call__(self, slot_index: Any, offer: Any, rng: np.random.Generator) -> IntArray:
        """The slots of the offered rows."""
        slots: IntArray = self.choose(slot_index, offer, rng)
        return slots


POLICIES: Registry[RegisteredPolicy] = Registry("rehearsal.buffer.policy")
STORAGES: Registry[Callable[..., Any]] = Registry("rehearsal.buffer.storage")
STRATEGIES: Registry[Callable[..., Any]] = Registry("rehearsal.strategy.name")
TRANSPORTS: Registry[Callable[..., Any]] = Registry("rehearsal.exchange.backend")


def registered_in(registry: Registry[Any]) -> AfterValidator:
    """Refuses a name that is not registered, and tells the nearest."""

    def check(name: str, info: ValidationInfo) -> str:
        if name in registry or (info.context or {}).get("open_names"):
            return name
        *others, last = [f"'{known}'" for known in registry]
        nearest = registry.nearest(name).rstrip()
        demand = f"{', '.join(others)} or {last}" + (f" ({nearest})" if nearest else "")
        raise PydanticCustomError("unregistered", "Input should be {demand}", {"demand": demand})

    return AfterValidator(check)


def listing(registry: Registry[Any]) -> Any:
    """Lists the names that are registered by now in the JSON Schema of a key."""

    def list_names(schema: dict[str, Any]) -> None:
        schema["enum"] = list(registry)

    return Field(json_schema_extra=list_names)
