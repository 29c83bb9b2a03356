"""Types of keys that several sections share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

__all__ = ["LONGEST_WAIT_S", "ROW_LOSS", "Metric", "Name", "PartitionWeights", "Pool", "SampleLayout"]

LONGEST_WAIT_S = 1e9  # stays an int64 when it is turned into nanoseconds

ROW_LOSS = "rehearsal.loss"
"""The state that holds the task's loss of a row alone."""

KEY = re.compile(r"-?\d{1,19}")


def _refuse_auto(name: str) -> str:
    if name == "auto":
        raise PydanticCustomError("auto", "Input should be a name")
    return name


def _by_text(weights: Any) -> Any:
    """Partition keys as JSON writes them."""
    if not isinstance(weights, Mapping):
        return weights
    keys = {str(key): float(value) if type(value) is int else value for key, value in weights.items()}
    if not all(KEY.fullmatch(key) and -(1 << 63) <= int(key) < 1 << 63 for key in keys):
        raise PydanticCustomError("partition", 'Keys should be those of partitions, such as "3"')
    return {str(int(key)): value for key, value in keys.items()}


def _some(weights: dict[str, float]) -> dict[str, float]:
    if not any(weights.values()):
        raise PydanticCustomError("no_weight", "At least one partition should have a weight above 0")
    return weights


Metric: TypeAlias = Literal["inner_product", "cosine", "l2"]
"""How near two embeddings are."""

SampleLayout: TypeAlias = Literal["halves", "interleaved"]
"""How the rows of samples of several rows stand in a batch."""

Pool: TypeAlias = Literal["mean", "last"]
"""How the hidden states of a row's positions become one embedding."""

Name = Annotated[str, Field(min_length=1), AfterValidator(_refuse_auto)]

PartitionWeights = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=1e6)]], BeforeValidator(_by_text), AfterValidator(_some)
]
"""A weight by partition key."""
