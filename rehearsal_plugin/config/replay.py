"""The keys that say which rows are replayed, how many, and what for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from rehearsal_plugin.config.buffer import BufferConfig
from rehearsal_plugin.config.names import Name, PartitionWeights, PathName
from rehearsal_plugin.config.registries import POLICIES, STRATEGIES, registered_in
from rehearsal_plugin.config.section import Section
from rehearsal_plugin.config.size import INT64

__all__ = ["PaddingConfig", "SamplingConfig", "StrategyConfig"]


Weights: TypeAlias = Annotated[
    Annotated[Literal["uniform", "balanced", "score", "retrieved", "stream", "forgetting"], Tag("<name>")]
    | Annotated[PartitionWeights, Tag("<mixture>")],
    Discriminator(lambda weights: "<mixture>" if isinstance(weights, Mapping) else "<name>"),
]


Scope: TypeAlias = Annotated[
    Annotated[Literal["global", "node", "local"], Tag("<name>")] | Annotated[int, Field(ge=1), Tag("<ranks>")],
    Discriminator(lambda scope: "<ranks>" if isinstance(scope, int) else "<name>"),
]


class SamplingConfig(Section):
    """Which stored rows are replayed."""

    KEY_PATH: ClassVar[str] = "rehearsal.sampling"

    scope: Scope = Field(
        default="global",
        description="Draw from the rows of all ranks, of the ranks of a node, or from each rank's own. Or from those "
        "of a group of at most so many ranks, spread over all nodes: the exchange then costs the same however many "
        "ranks there are, and a rank holds connections to its group alone. Groups ask for rows in proportion to what "
        "they hold, so the batch of all ranks together is drawn as with 'global'.",
    )
    weights: Weights = Field(
        default="uniform",
        description="The same chance for every stored row, for every partition, or in proportion to the row's "
        "buffer.score_by; a row can then come several times in one draw. 'retrieved' draws the rows whose embeddings "
        "(rehearsal.retrieval) are nearest to those of the new rows, mixed with uniform ones. 'stream' gives every row "
        "that was ever offered to any rank the same chance, also where ranks offer at different rates: a stored row "
        "counts for all that it stands for (buffer.policy 'reservoir' or 'balanced'). 'forgetting' draws partitions in "
        "proportion to how far the loss on each has risen, and a tenth of the rows from all alike; the more of a "
        "partition is among the new rows, the less of it. Or the share of "
        'each partition in what is replayed, as {"0": 3, "1": 1}; partitions that are not named get none.',
    )
    retrieved_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Of the rows that the weights 'retrieved' draw, the share of the nearest ones; the others are "
        "drawn uniformly, and a row can be among both.",
    )
    queries: int = Field(
        default=16,
        ge=1,
        le=1 << 16,
        description="New rows of a rank and step, at most, whose neighbours the weights 'retrieved' look for; drawn at "
        "random where there are more candidates.",
    )
    weights_file: PathName | None = Field(
        default=None,
        description="A JSON or YAML file with weights by partition, looked at in every step; whoever changes it "
        "changes the mixture of the running job.",
    )

    @property
    def by_partition(self) -> bool:
        """Whether rows are drawn partition by partition."""
        return self.weights not in ("uniform", "score", "retrieved", "stream")

    @property
    def weights_given(self) -> bool:
        """Whether partitions have weights that somebody gives, and may give anew."""
        return self.by_partition and self.weights != "forgetting"

    def unsuited_policy(self, buffer: BufferConfig) -> Iterator[str]:
        """A policy whose rows stand for no known part of the stream."""
        if self.weights == "stream" and buffer.policy in POLICIES and buffer.sample_of is None:
            yield (
                f"{self.KEY_PATH}.weights 'stream' needs rows that are a uniform sample of what was offered, and "
                f"rehearsal.buffer.policy '{buffer.policy}' keeps others; set the policy to 'reservoir' or 'balanced', "
                "or the weights to 'uniform'"
            )

    @property
    def mixture(self) -> dict[int, float] | None:
        """The weight of each partition, where they are given one by one."""
        return None if isinstance(self.weights, str) else {int(key): value for key, value in self.weights.items()}


class StrategyConfig(Section):
    """What the replayed rows are used for."""

    KEY_PATH: ClassVar[str] = "rehearsal.strategy"

    name: Annotated[Name, registered_in(STRATEGIES)] = Field(
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
    partition_weights: PartitionWeights | None = Field(
        default=None,
        description="What replayed rows of each partition count for in the loss together, whatever share of the rows "
        "they are: each by w / q, the weight of its partition over the share that this has had in what was replayed. "
        "Partitions that are not named count as they come.",
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


class PaddingConfig(Section):
    """Rows of different length: fields that are padded behind, and what with."""

    KEY_PATH: ClassVar[str] = "rehearsal.padding"

    length: int | None = Field(
        default=None,
        ge=1,
        lt=1 << 31,
        description="The longest row, in positions of dimension 1 of the batch, or the longest document of a flat row. "
        "When left out, that of the checkpoint, or 32768; four times what the first batch has where that is longer.",
    )
    values: Annotated[dict[Name, float], Field(min_length=1)] | None = Field(
        default=None,
        description="Dotted names of the batch fields that have a length, and what each is padded with. "
        "When left out, those that tokenizers of Hugging Face give: 'input_ids', 'attention_mask', 'labels' and so on, "
        "also behind 'decoder_', 'chosen_', 'rejected_' and 'KL_'. Fields may differ in length in a batch.",
    )
    token_id: int | None = Field(
        default=None,
        ge=-INT64,
        lt=INT64,
        description="What 'input_ids' are padded with where 'values' is left out; 0 with an attention mask.",
    )

    def broken_rules(self) -> Iterator[str]:
        """Either all values or the one that names do not tell."""
        if self.values is not None and self.token_id is not None:
            yield (
                f"{self.KEY_PATH}.token_id has no use beside {self.KEY_PATH}.values, which say what each field is "
                "padded with; leave one of them out"
            )
