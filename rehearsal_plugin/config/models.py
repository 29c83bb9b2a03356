"""The whole `rehearsal` section; the descriptions of its keys are its reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union

from pydantic import Field, model_validator

from rehearsal_plugin.config.amounts import GuardConfig, Ratio, RatioBudget, RatioSchedule, broken_amounts
from rehearsal_plugin.config.buffer import BufferConfig
from rehearsal_plugin.config.by_row import settings_by_loss, settings_by_output
from rehearsal_plugin.config.names import PARTITION, Name, SampleLayout
from rehearsal_plugin.config.registries import POLICIES, STORAGES, STRATEGIES, TRANSPORTS
from rehearsal_plugin.config.replay import PaddingConfig, SamplingConfig, StrategyConfig
from rehearsal_plugin.config.retrieval import RetrievalConfig
from rehearsal_plugin.config.running import CheckpointConfig, ExchangeConfig, MetricsConfig
from rehearsal_plugin.config.section import Section, refusing
from rehearsal_plugin.config.size import INT64
from rehearsal_plugin.config.source import find_block
from rehearsal_plugin.errors import ConfigError

__all__ = ["ConfigSource", "RehearsalConfig"]

DEFAULT_RATIO = 0.05

LOSSES_EVERY = 1
"""Default of `losses_every` where what is replayed follows the losses."""


class RehearsalConfig(Section):
    """The whole `rehearsal` section. Every key has a default."""

    KEY_PATH: ClassVar[str] = "rehearsal"

    enabled: bool = Field(default=True, description="False leaves the training exactly as it is without the section.")
    buffer: BufferConfig = Field(default=BufferConfig(), description="How many rows a rank keeps, where, and which.")
    ratio: Ratio | None = Field(
        default=None,
        description=f"Share of replayed rows in what the model sees, from 0 to below 1; {DEFAULT_RATIO} when "
        "neither this nor 'representatives' is given. Or a forgetting budget, for which the ratio is raised and "
        "lowered while the job runs.",
    )
    representatives: int | None = Field(
        default=None,
        ge=0,
        lt=INT64,
        description="Replayed rows in every micro-batch of a rank, as a whole number in place of 'ratio'.",
    )
    ratio_in: Literal["rows", "tokens"] = Field(
        default="rows",
        description="What the ratio is a share of: rows, or positions that are no padding, where rows differ in "
        "length. Of fields that differ in length, the longest of each row counts.",
    )
    ratio_schedule: RatioSchedule | None = Field(
        default=None, description="A ratio that rises or falls while the job runs; constant when left out."
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
    hidden: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        description="Dotted names of batch fields that the rows carry and the model does not get, such as the "
        "domain of a row.",
    )
    padding: PaddingConfig | None = Field(
        default=None, description="How rows of different length are stored; when left out, all have the same."
    )
    packing: Literal["documents", "rows"] = Field(
        default="documents",
        description="What a sample is where a batch is one flat row of documents, told apart by 'position_ids' or "
        "'cu_seq_lens_*': each document, or the row as it is, also with its whole mask [1, length, length].",
    )
    rows_per_sample: int = Field(
        default=1,
        ge=1,
        lt=1 << 16,
        description="Batch rows that belong together and are stored and replayed as one sample, such as 2 for the "
        "pairs of preference training. All amounts of rows are then amounts of samples.",
    )
    sample_layout: SampleLayout = Field(
        default="halves",
        description="Where the rows of a sample stand in a batch: first rows of all samples, then second ones "
        "('halves'), or sample by sample ('interleaved').",
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
    metrics: MetricsConfig = Field(default=MetricsConfig(), description="What rank 0 writes down while the job runs.")
    losses_every: int = Field(
        default=0,
        ge=0,
        lt=INT64,
        description="Every how many optimizer steps the losses of new and of replayed rows are measured apart, by "
        f"partition; 0 for never. {LOSSES_EVERY} when left out where 'ratio' is a budget, or sampling.weights "
        "'forgetting'.",
    )
    guard: GuardConfig | None = Field(
        default=None, description="What happens when the loss on replayed rows rises; nothing when left out."
    )
    retrieval: RetrievalConfig | None = Field(
        default=None, description="How stored rows are found by their embedding; not at all when left out."
    )
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
    def load(cls, source: ConfigSource, *, open_names: bool = False) -> RehearsalConfig:
        """Read the section from wherever it is written.

        Args:
            source: A `RehearsalConfig` (returned as it is), a mapping, the path of a JSON or YAML file, or
                base64 of JSON as DeepSpeed takes it; the bare section or a whole DeepSpeed config.
            open_names: Whether policies, strategies, storages and transports may be named that are registered later,
                as by a script that has not started yet.

        Raises:
            ConfigError: There is no section, or it cannot be used; every problem is named by its key path.
        """
        if isinstance(source, RehearsalConfig):
            return source
        block = find_block(source)
        if block is None:
            raise ConfigError("the DeepSpeed config has no 'rehearsal' section; add one ({} takes the defaults)")
        with refusing(cls):
            return cls.model_validate(block, context={"open_names": open_names})

    def look_up_names(self) -> None:
        """Refuse a section whose names are still not registered; see `load`.

        Raises:
            ConfigError: One is not, or it does not go together with other keys.
        """
        POLICIES[self.buffer.policy], STORAGES[self.buffer.storage]
        STRATEGIES[self.strategy.name], TRANSPORTS[self.exchange.backend]
        if complaints := [*self.buffer.broken_rules(), *self.broken_rules()]:  # of a policy registered since
            raise ConfigError("; ".join(complaints))

    def of_a_job(self) -> RehearsalConfig:
        """This section, for a job that replays by it.

        Raises:
            ConfigError: It is switched off, or as for `look_up_names`.
        """
        if not self.enabled:
            raise ConfigError(
                "rehearsal.enabled is false, and a Rehearsal was made, which would replay all the same; make none, or "
                "leave the key out (attach(), RehearsalCallback and run go by it themselves)"
            )
        self.look_up_names()
        return self

    @property
    def drawn_by(self) -> Any:
        """All that decides which stored rows are replayed, as JSON knows it."""
        if self.sampling.weights != "retrieved" or self.retrieval is None:
            return self.sampling.weights
        return [
            self.sampling.weights,
            self.sampling.retrieved_share,
            self.sampling.queries,
            self.retrieval.model_dump(mode="json"),
        ]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults: dict[str, Any] = {}
        if values.get("ratio") is None and values.get("representatives") is None:
            defaults["ratio"] = DEFAULT_RATIO
        sampling = values.get("sampling")
        weights = sampling.get("weights") if isinstance(sampling, dict) else getattr(sampling, "weights", None)
        if "losses_every" not in values and (
            isinstance(values.get("ratio"), (dict, RatioBudget)) or weights == "forgetting"
        ):
            defaults["losses_every"] = LOSSES_EVERY
        return {**values, **defaults}

    @property
    def ratio_budget(self) -> RatioBudget | None:
        """The forgetting budget that the ratio is controlled by; None for a ratio that is given."""
        return self.ratio if isinstance(self.ratio, RatioBudget) else None

    @property
    def given_ratio(self) -> float | None:
        """The ratio that is given; None where it is controlled, or rows are counted."""
        return None if isinstance(self.ratio, RatioBudget) else self.ratio

    @property
    def follows_losses(self) -> bool:
        """Whether the losses on replayed rows of each partition decide how much of it is replayed."""
        return self.ratio_budget is not None or self.sampling.weights == "forgetting"

    def broken_rules(self) -> Iterator[str]:
        """Amount of replay, weights with partitions and scores, fields of a row."""
        key = self.buffer.partition_by
        yield from self.sampling.unsuited_policy(self.buffer)
        padded = () if self.padding is None or self.fields is None else self.padding.values or ()
        if left_out := sorted(set(padded).difference(self.fields or ())):
            yield (
                f"rehearsal.padding.values names {left_out}, which rehearsal.fields leaves out, so nothing of them is "
                "stored; name them in both, or in neither"
            )
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
        if self.sampling.weights == "retrieved" and self.retrieval is None:
            yield (
                "rehearsal.retrieval is missing: rehearsal.sampling.weights 'retrieved' draws the rows whose "
                "embeddings are nearest to those of the new rows, so say there which field is the embedding, or which "
                "module gives it"
            )
        if self.sampling.weights == "score" and self.buffer.by_features:
            yield (
                f"rehearsal.sampling.weights is 'score', and rehearsal.buffer.policy '{self.buffer.policy}' judges "
                "rows by features, which are no score; use the weights 'uniform' or 'balanced'"
            )
        used = self.buffer.by_features or self.buffer.by_score or self.sampling.weights == "score"
        if self.buffer.score_by is not None and not used:
            yield (
                "rehearsal.buffer.score_by has no use: set rehearsal.buffer.policy or rehearsal.sampling.weights "
                "to 'score', or leave it out"
            )
        yield from broken_amounts(self)
        if self.rows_per_sample > 1:
            yield from self._broken_samples()
        weights_of_strategy = self.strategy.partition_weights
        weighted = {"sampling.weights": self.sampling.mixture, "strategy.partition_weights": weights_of_strategy}
        for option, weights in weighted.items():
            if weights is not None and key is None:
                yield (
                    f"rehearsal.buffer.partition_by is missing: rehearsal.{option} has a weight for each partition, "
                    "so name the batch field that tells them apart"
                )
        if self.sampling.weights_file is not None and not self.sampling.weights_given:
            yield (
                "rehearsal.sampling.weights_file changes the weights of partitions; set rehearsal.sampling.weights to "
                "'balanced' or to the weights at the start"
            )
        wanted = None if self.retrieval is None or self.retrieval.module is not None else self.retrieval.embedding
        if wanted is not None and self.fields is not None and wanted not in self.fields:
            yield f"rehearsal.fields lacks '{wanted}', which rehearsal.retrieval.embedding names; add it to the list"
        score = None if self.buffer.by_loss else self.buffer.score_by
        for name, option in ((key, "partition_by"), (score, "score_by")):
            if name not in (None, PARTITION) and self.fields is not None and name not in self.fields:
                yield f"rehearsal.fields lacks '{name}', which rehearsal.buffer.{option} names; add it to the list"

    def _broken_samples(self) -> Iterator[str]:
        """What goes by single rows, where samples have several."""
        settings = [*settings_by_output(self), *settings_by_loss(self)]
        settings += ["rehearsal.buffer.partition_by"] * (self.buffer.partition_by is not None)
        settings += ["rehearsal.ratio_in 'tokens'"] * (self.ratio_in == "tokens")
        for setting in settings:
            yield (
                f"{setting} goes by single rows, and rehearsal.rows_per_sample is {self.rows_per_sample}; leave one of "
                "them out"
            )


ConfigSource: TypeAlias = Union["RehearsalConfig", Mapping[str, Any], str, "os.PathLike[str]"]
