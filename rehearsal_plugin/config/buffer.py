"""The keys of `rehearsal.buffer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from rehearsal_plugin.config.names import PARTITION, Name, PathName
from rehearsal_plugin.config.registries import (
    POLICIES,
    STORAGES,
    RegisteredPolicy,
    SampleOf,
    listing,
    registered_in,
)
from rehearsal_plugin.config.section import Section
from rehearsal_plugin.config.size import INT64, Size, parse_size
from rehearsal_plugin.errors import ConfigError

__all__ = ["BufferConfig"]


class BufferConfig(Section):
    """How many rows a rank keeps, where, and which."""

    KEY_PATH: ClassVar[str] = "rehearsal.buffer"

    capacity: Size = Field(
        default="1GiB",
        description="What each rank keeps: a number of rows, or bytes as in '4GiB', '512 MiB', '1.5GB', '64B'. Rows "
        "that differ in length count with the bytes that they have.",
    )
    storage: Annotated[str, registered_in(STORAGES), listing(STORAGES)] = Field(
        default="memory",
        description="Where the rows live: host memory, page-locked host memory, the GPU, or a file for "
        "buffers larger than memory.",
    )
    path: PathName | None = Field(
        default=None, description="Folder of the files of storage 'mmap'; given with that storage only."
    )
    policy: Annotated[str, registered_in(POLICIES), listing(POLICIES)] = Field(
        default="reservoir",
        description="Which rows stay: a uniform sample of all that were offered on a rank, equal shares for each "
        "partition, every candidate in place of a random row, or the newest. By 'score_by': a reservoir in which "
        "high scores stay longer, or equal shares of the rows that stand for their partition's mean, together "
        "('herding') or each alone.",
    )
    partition_by: Name | None = Field(
        default=None,
        description="Dotted name of the integer batch field that tells the partition of a row, such as its "
        "class label or domain id.",
    )
    partition: int | None = Field(
        default=None,
        ge=-INT64,
        lt=INT64,
        description="The partition of all rows that this job offers, in place of 'partition_by', for jobs that each "
        "train on one domain and hand the buffer on.",
    )
    score_by: Name | None = Field(
        default=None,
        description="Dotted name of the floating-point batch field that rows are judged by: one number for policy "
        "'score' and sampling.weights 'score', features for 'herding' and 'closest_to_centre'. 'loss' is the task's "
        "loss of each row, recorded when it was seen and again whenever it is replayed.",
    )

    preload: PathName | None = Field(
        default=None,
        description="Folder of rows that the buffer of a new job starts with: a checkpoint, or what 'rehearsal seed' "
        "wrote.",
    )
    deduplicate: bool = Field(
        default=False, description="Whether a row is refused whose content this rank's buffer holds already."
    )

    def rows(self, row_bytes: int) -> int:
        """Rows that the capacity holds.

        Args:
            row_bytes: Bytes of one packed row, above 0.

        Raises:
            ConfigError: Not even one row.
        """
        if isinstance(self.capacity, int):
            return self.capacity
        rows = (self.capacity_bytes or 0) // row_bytes
        if not rows:
            raise ConfigError(
                f"{self.KEY_PATH}.capacity '{self.capacity}' cannot hold one row of {row_bytes} bytes; "
                f"give at least '{row_bytes}B' or a number of rows"
            )
        return rows

    @model_validator(mode="before")
    @classmethod
    def _partition_of_the_job(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("partition") is not None and values.get("partition_by") is None:
            return {**values, "partition_by": PARTITION}
        return values

    @property
    def capacity_bytes(self) -> int | None:
        """The capacity in bytes; None where it is a number of rows."""
        return None if isinstance(self.capacity, int) else parse_size(self.capacity)

    @property
    def by_loss(self) -> bool:
        """Whether rows are judged by the task's loss, which the strategy records."""
        return self.score_by == "loss"

    @property
    def by_features(self) -> bool:
        """Whether the policy judges rows by features, not by one number."""
        return self._policy.judges == "features"

    @property
    def by_score(self) -> bool:
        """Whether the policy judges rows by one number."""
        return self._policy.judges == "score"

    @property
    def sample_of(self) -> SampleOf | None:
        """What the rows that the policy keeps are a uniform sample of; None for nothing."""
        return self._policy.sample_of

    @property
    def _policy(self) -> RegisteredPolicy:
        """The policy, or one that reads no key where its name is not registered yet."""
        return POLICIES[self.policy] if self.policy in POLICIES else RegisteredPolicy(lambda *_: None)

    def broken_rules(self) -> Iterator[str]:
        """Storage and path, policy and partitions, policy and score."""
        if (self.partition is not None) != (self.partition_by == PARTITION):
            yield (
                f"{self.KEY_PATH}.partition and {self.KEY_PATH}.partition_by both tell the partition of a row; keep "
                "one of them"
            )
        if self.storage == "mmap" and self.path is None:
            yield f"{self.KEY_PATH}.path is missing: storage 'mmap' keeps rows in files, so name their folder"
        if self.storage != "mmap" and self.path is not None:
            yield (
                f"{self.KEY_PATH}.path has no use with {self.KEY_PATH}.storage '{self.storage}'; "
                "leave it out or set the storage to 'mmap'"
            )
        if self._policy.partitions and self.partition_by is None:
            yield (
                f"{self.KEY_PATH}.partition_by is missing: policy '{self.policy}' shares the buffer between "
                "partitions, so name the batch field that tells them apart"
            )
        if (self.by_features or self.by_score) and self.score_by is None:
            yield (
                f"{self.KEY_PATH}.score_by is missing: policy '{self.policy}' judges rows by it, so name a "
                "floating-point batch field" + (", or 'loss'" if self.by_score else " of features")
            )
        if self.by_features and self.by_loss:
            yield f"{self.KEY_PATH}.score_by is 'loss', and policy '{self.policy}' needs a batch field of features"
