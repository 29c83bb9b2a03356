"""Types of keys that several sections share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "LONGEST_WAIT_S",
    "PARTITION",
    "ROW_LOSS",
    "Metric",
    "Name",
    "PartitionWeights",
    "PathName",
    "Pool",
    "SampleLayout",
    "expand_path",
]

LONGEST_WAIT_S = 1e9  # stays an int64 when it is turned into nanoseconds

ROW_LOSS = "rehearsal.loss"
"""The state that holds the task's loss of a row alone."""

PARTITION = "rehearsal.partition"
"""The field of a row that holds the partition of its job, where all rows of a job have the same."""

KEY = re.compile(r"-?\d{1,19}")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _refuse_auto(name: str) -> str:
    if name == "auto":
        raise PydanticCustomError("auto", "Input should be a name")
    return name


def expand_path(path: str) -> str:
    """A path with the home folder in place of `~`, and the values of environment variables in place of `$NAME`.

    Raises:
        ValueError: A variable is not set.
    """
    unset = [name for match in VARIABLE.finditer(path) if (name := match[1] or match[2]) not in os.environ]
    if unset:
        raise ValueError(f"{path!r} names the environment variable {unset[0]}, which is not set")
    return os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - a Path would lose a slash at the end


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except ValueError as error:
        message = "Input should name environment variables that are set: {why}"
        raise PydanticCustomError("unset", message, {"why": str(error)}) from None


def _by_text(weights: Any) -> Any:
    """Partition keys as JSON writes them."""
    if not isinstance(weights, Mapping):
        return weights
    keys = {str(key): float(value) if type(value) is int else value for key, value in weights.items()}
    if not all(KEY.fullmatch(key) and -(1 << 63) <= int(key) < 1 << 63 for key in keys):
        raise PydanticCustomError("partition", 'Keys should be those of partitions, such as "3"')
    by_number = {str(int(key)): value for key, value in keys.items()}
    if len(by_number) < len(weights):
        raise PydanticCustomError("twice", "Keys should each stand for another partition")
    return by_number


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

PathName = Annotated[Name, AfterValidator(_expanded)]
"""A path, in which `~` and `$NAME` are expanded."""

PartitionWeights = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=1e6)]], BeforeValidator(_by_text), AfterValidator(_some)
]
"""A weight by partition key."""
