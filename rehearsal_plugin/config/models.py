"""The keys of the `rehearsal` section; their descriptions are its reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from rehearsal_plugin.config.section import Section, refusing
from rehearsal_plugin.config.size import INT64, Size, parse_size
from rehearsal_plugin.config.source import find_block
from rehearsal_plugin.errors import ConfigError

__all__ = [
    "BufferConfig",
    "CheckpointConfig",
    "ConfigSource",
    "ExchangeConfig",
    "RehearsalConfig",
    "SamplingConfig",
    "StrategyConfig",
    "json_schema",
]

DEFAULT_RATIO = 0.05
LONGEST_WAIT_S = 1e9  # stays an int64 when it is turned into nanoseconds


def _refuse_auto(name: str) -> str:
    if name == "auto":
        raise PydanticCustomError("auto", "Input should be a name")
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_refuse_auto)]


class BufferConfig(Section):
    """How many rows a rank keeps, where, and which."""

    KEY_PATH: ClassVar[str] = "rehearsal.buffer"

    capacity: Size = Field(
        default="1GiB",
        description="What each rank keeps: a number of rows, or bytes as in '4GiB', '512 MiB', '1.5GB', '64B'.",
    )
    storage: Literal["memory", "pinned", "cuda", "mmap"] = Field(
        default="memory",
        description="Where the rows live: host memory, page-locked host memory, the GPU, or a file for "
        "buffers larger than memory.",
    )
    path: Name | None = Field(
        default=None, description="Folder of the files of storage 'mmap'; given with that storage only."
    )
    policy: Literal["reservoir", "balanced", "random_replace", "fifo", "score", "herding", "closest_to_centre"] = Field(
        default="reservoir",
        description="Which rows stay: a uniform sample of all that were offered, equal shares for each "
        "partition, every candidate in place of a random row, or the newest. By 'score_by': a reservoir in which "
        "high scores stay longer, or equal shares of the rows that stand for their partition's mean, together "
        "('herding') or each alone.",
    )
    partition_by: Name | None = Field(
        default=None,
        description="Dotted name of the integer batch field that tells the partition of a row, such as its "
        "class label or domain id.",
    )
    score_by: Name | None = Field(
        default=None,
        description="Dotted name of the floating-point batch field that rows are judged by: one number for policy "
        "'score' and sampling.weights 'score', features for 'herding' and 'closest_to_centre'. 'loss' is the task's "
        "loss of each row, recorded when it was seen and again whenever it is replayed.",
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
        rows = (parse_size(self.capacity) or 0) // row_bytes
        if not rows:
            raise ConfigError(
                f"{self.KEY_PATH}.capacity '{self.capacity}' cannot hold one row of {row_bytes} bytes; "
                f"give at least '{row_bytes}B' or a number of rows"
            )
        return rows

    @property
    def by_loss(self) -> bool:
        """Whether rows are judged by the task's loss, which the strategy records."""
        return self.score_by == "loss"

    @property
    def by_features(self) -> bool:
        """Whether the policy judges rows by features, not by one number."""
        return self.policy in ("herding", "closest_to_centre")

    def broken_rules(self) -> Iterator[str]:
        """Storage and path, policy and partitions, policy and score."""
        if self.storage == "mmap" and self.path is None:
            yield f"{self.KEY_PATH}.path is missing: storage 'mmap' keeps rows in files, so name their folder"
        if self.storage != "mmap" and self.path is not None:
            yield (
                f"{self.KEY_PATH}.path has no use with {self.KEY_PATH}.storage '{self.storage}'; "
                "leave it out or set the storage to 'mmap'"
            )
        if self.policy == "balanced" and self.partition_by is None:
            yield (
                f"{self.KEY_PATH}.partition_by is missing: policy 'balanced' shares the buffer between "
                "partitions, so name the batch field that tells them apart"
            )
        if (self.by_features or self.policy == "score") and self.score_by is None:
            yield (
                f"{self.KEY_PATH}.score_by is missing: policy '{self.policy}' judges rows by it, so name a "
                "floating-point batch field" + (", or 'loss'" if self.policy == "score" else " of features")
            )
        if self.by_features and self.by_loss:
            yield f"{self.KEY_PATH}.score_by is 'loss', and policy '{self.policy}' needs a batch field of features"


class SamplingConfig(Section):
    """Which stored rows are replayed."""

    KEY_PATH: ClassVar[str] = "rehearsal.sampling"

    scope: Literal["global", "local"] = Field(
        default="global", description="Draw from the rows of all ranks, or from each rank's own."
    )
    weights: Literal["uniform", "balanced", "score"] = Field(
        default="uniform",
        description="The same chance for every stored row, for every partition, or in proportion to the row's "
        "buffer.score_by; a row can then come several times in one draw.",
    )


class StrategyConfig(Section):
    """What the replayed rows are used for."""

    KEY_PATH: ClassVar[str] = "rehearsal.strategy"

    name: Name = Field(
        default="er",
        description="'er' (trained on like new rows), 'der' and 'der++' (held to the outputs recorded when they were "
        "seen), 'x-der' ('der++' whose records are refreshed), 'er-ace' (new classes compete among themselves), 'topk' "
        "(distillation from the k largest logits), or a registered strategy of your own.",
    )
    loss_weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of replayed rows in 'er' and 'er-ace'.")
    alpha: float = Field(default=0.5, ge=0, le=1e6, description="Weight of the distance to recorded outputs.")
    beta: float = Field(
        default=0.5, ge=0, le=1e6, description="Weight of the task's loss on the second draw of 'der++' and 'x-der'."
    )
    gamma: float = Field(
        default=0.75,
        ge=0,
        le=1e6,
        description="Bound of refreshed scores in 'x-der', against that of the row's own class.",
    )
    outputs: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        description="Dotted names of the model's outputs that are recorded; every tensor with the batch dimension when "
        "left out. A lone tensor is called 'output'.",
    )
    k: int = Field(default=16, ge=1, lt=INT64, description="Logits that 'topk' keeps of each position.")
    transform: Literal["replayed", "all"] = Field(
        default="replayed",
        description="Which rows go through the transform given to the rehearsal: replayed ones, so that new rows are "
        "stored, and their outputs recorded, as the model saw them; or all, so that raw rows are stored with the "
        "outputs of transformed ones.",
    )


class ExchangeConfig(Section):
    """How rows travel between ranks."""

    KEY_PATH: ClassVar[str] = "rehearsal.exchange"

    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description="Communication library; 'auto' is NCCL where the ranks' own group uses it, else gloo.",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds to wait for the other ranks before the step is given up with an error.",
    )
    on_failure: Literal["raise", "local"] = Field(
        default="raise",
        description="What a failed exchange leads to: an error in the training loop; or a warning, once, after which "
        "this rank goes on with the rows of its own buffer.",
    )
    launch: Literal["auto", "thread", "inline"] = Field(
        default="auto",
        description="Start collectives from a background thread, or from the training thread at a fixed point "
        "of the step; 'auto' takes what the backend allows.",
    )

    def broken_rules(self) -> Iterator[str]:
        """Backend and launch."""
        if self.backend == "nccl" and self.launch == "thread":
            yield (
                f"{self.KEY_PATH}.launch 'thread' can deadlock with backend 'nccl', whose collectives need one "
                "order over all communicators; use 'inline' or 'auto'"
            )


class CheckpointConfig(Section):
    """How the buffer is saved."""

    KEY_PATH: ClassVar[str] = "rehearsal.checkpoint"

    enabled: bool = Field(
        default=True, description="Whether the buffer is saved and loaded with the checkpoints of the framework."
    )
    asynchronous: bool = Field(
        default=False, description="Copy the rows and write them in the background, instead of waiting for the disk."
    )
    incremental: bool = Field(
        default=False,
        description="Write only the rows that changed since the last save; the others are hard links to its files.",
    )
    write_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds to wait for a save in the background before an error is raised.",
    )


class RehearsalConfig(Section):
    """The whole `rehearsal` section. Every key has a default."""

    KEY_PATH: ClassVar[str] = "rehearsal"

    enabled: bool = Field(default=True, description="False leaves the training exactly as it is without the section.")
    buffer: BufferConfig = Field(default=BufferConfig(), description="How many rows a rank keeps, where, and which.")
    ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description=f"Share of replayed rows in what the model sees, from 0 to below 1; {DEFAULT_RATIO} when "
        "neither this nor 'representatives' is given.",
    )
    representatives: int | None = Field(
        default=None,
        ge=0,
        lt=INT64,
        description="Replayed rows in every micro-batch of a rank, as a whole number in place of 'ratio'.",
    )
    candidates: int | None = Field(
        default=None,
        ge=1,
        lt=INT64,
        description="Rows of every micro-batch that are offered to the buffer, drawn at random; None offers all.",
    )
    mode: Literal["append", "replace"] = Field(
        default="append",
        description="Replayed rows come on top of the new ones, or take the place of some of them.",
    )
    inject: Literal["forward", "loader"] = Field(
        default="forward",
        description="Where replayed rows join the batch: at the engine's forward, or already in the data loader "
        "for loops that compute the loss outside the model.",
    )
    fields: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        description="Dotted names of the batch fields that make up a row; every tensor with the batch dimension "
        "when left out.",
    )
    non_finite: Literal["keep", "skip", "refuse"] = Field(
        default="keep",
        description="Candidates with NaN or infinity in a floating-point field: stored like all others, not offered to "
        "the buffer, or refused with an error. Whatever the buffer does, the model sees the batch as it is.",
    )
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Which stored rows are replayed.")
    strategy: StrategyConfig = Field(default=StrategyConfig(), description="What the replayed rows are used for.")
    exchange: ExchangeConfig = Field(default=ExchangeConfig(), description="How rows travel between ranks.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="How the buffer is saved.")
    start_step: int = Field(
        default=0,
        ge=0,
        lt=INT64,
        description="Optimizer step until which rows are collected and none is replayed.",
    )
    seed: int = Field(
        default=0, ge=0, lt=INT64, description="Seed of all random choices; the same seed gives the same run."
    )

    @classmethod
    def load(cls, source: ConfigSource) -> RehearsalConfig:
        """Read the section from wherever it is written.

        Args:
            source: A `RehearsalConfig` (returned as it is), a mapping, the path of a JSON or YAML file, or
                base64 of JSON as DeepSpeed takes it; the bare section or a whole DeepSpeed config.

        Raises:
            ConfigError: There is no section, or it cannot be used; every problem is named by its key path.
        """
        if isinstance(source, RehearsalConfig):
            return source
        block = find_block(source)
        if block is None:
            raise ConfigError("the DeepSpeed config has no 'rehearsal' section; add one ({} takes the defaults)")
        with refusing(cls):
            return cls.model_validate(block)

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("ratio") is None and values.get("representatives") is None:
            return {**values, "ratio": DEFAULT_RATIO}
        return values

    def broken_rules(self) -> Iterator[str]:
        """Amount of replay, weights with partitions and scores, fields of a row."""
        key = self.buffer.partition_by
        if self.ratio is not None and self.representatives is not None:
            yield "rehearsal.ratio and rehearsal.representatives both say how much is replayed; keep one of them"
        if self.sampling.weights == "balanced" and key is None:
            yield (
                "rehearsal.buffer.partition_by is missing: rehearsal.sampling.weights 'balanced' draws "
                "partitions equally, so name the batch field that tells them apart"
            )
        if self.sampling.weights == "score" and self.buffer.score_by is None:
            yield (
                "rehearsal.buffer.score_by is missing: rehearsal.sampling.weights 'score' draws in proportion to "
                "it, so name a floating-point batch field, or 'loss'"
            )
        if self.sampling.weights == "score" and self.buffer.by_features:
            yield (
                f"rehearsal.sampling.weights is 'score', and rehearsal.buffer.policy '{self.buffer.policy}' judges "
                "rows by features, which are no score; use the weights 'uniform' or 'balanced'"
            )
        used = self.buffer.by_features or "score" in (self.sampling.weights, self.buffer.policy)
        if self.buffer.score_by is not None and not used:
            yield (
                "rehearsal.buffer.score_by has no use: set rehearsal.buffer.policy or rehearsal.sampling.weights "
                "to 'score', or leave it out"
            )
        score = None if self.buffer.by_loss else self.buffer.score_by
        for name, option in ((key, "partition_by"), (score, "score_by")):
            if name is not None and self.fields is not None and name not in self.fields:
                yield f"rehearsal.fields lacks '{name}', which rehearsal.buffer.{option} names; add it to the list"


ConfigSource: TypeAlias = Union["RehearsalConfig", Mapping[str, Any], str, "os.PathLike[str]"]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the section; rules between keys are not part of it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RehearsalConfig.model_json_schema()}
