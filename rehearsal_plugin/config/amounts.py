"""How much is replayed: a ratio, one that changes in steps, or one that holds a forgetting budget; and the guard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Protocol, TypeAlias

from pydantic import Discriminator, Field, Tag

from rehearsal_plugin.config.buffer import BufferConfig
from rehearsal_plugin.config.replay import SamplingConfig
from rehearsal_plugin.config.running import ExchangeConfig
from rehearsal_plugin.config.section import Section
from rehearsal_plugin.config.size import INT64

__all__ = ["GuardConfig", "Ratio", "RatioBudget", "RatioSchedule", "broken_amounts"]


class RatioBudget(Section):
    """A ratio that is controlled, so that the loss on replayed rows rises by no more than a budget."""

    KEY_PATH: ClassVar[str] = "rehearsal.ratio"

    budget: float = Field(
        gt=0,
        le=10,
        description="By which part the mean loss on replayed rows may rise: 0.02 for 2 %. Of partitions the one that "
        "has risen most counts, each against its loss when replay began, or when its last new rows came.",
    )
    min: float = Field(default=0.005, gt=0, lt=1, description="The lowest ratio.")
    max: float = Field(default=0.5, gt=0, lt=1, description="The highest ratio.")
    by: Literal["ratio", "loss_weight", "both"] = Field(
        default="ratio",
        description="What is raised and lowered: the ratio; what a replayed row counts for in the loss, at a ratio in "
        "the middle of the bounds; or both, the weight first, as it costs no new rows. Strategies 'er' and 'er-ace'.",
    )
    max_weight: float = Field(
        default=4.0, gt=1, le=1e3, description="The most that a replayed row counts for; at least it counts 1."
    )
    window: int = Field(
        default=1024,
        ge=8,
        lt=1 << 31,
        description="Replayed rows of all ranks that a mean is taken over. More of them are less noise and a slower "
        "control.",
    )

    @property
    def middle(self) -> float:
        """Between the bounds, on the logarithmic scale; the ratio to begin with."""
        return math.sqrt(self.min * self.max)

    def broken_rules(self) -> Iterator[str]:
        """Bounds in their order, and one that is read."""
        if self.min >= self.max:
            yield f"rehearsal.ratio.min is {self.min:g} and rehearsal.ratio.max is {self.max:g}; give a higher one"
        if self.by == "ratio" and self.max_weight != type(self).model_fields["max_weight"].default:
            yield "rehearsal.ratio.max_weight has no use with rehearsal.ratio.by 'ratio'; set it to 'both'"


Ratio: TypeAlias = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("<number>")] | Annotated[RatioBudget, Tag("<budget>")],
    Discriminator(lambda ratio: "<budget>" if isinstance(ratio, (dict, RatioBudget)) else "<number>"),
]


class RatioSchedule(Section):
    """A ratio that changes in equal steps."""

    KEY_PATH: ClassVar[str] = "rehearsal.ratio_schedule"

    to: float = Field(ge=0, lt=1, description="The ratio at the end.")
    steps: int = Field(ge=1, lt=INT64, description="Optimizer steps from 'ratio' to it, counted from 'start_step'.")


class GuardConfig(Section):
    """What happens when the loss on replayed rows rises."""

    KEY_PATH: ClassVar[str] = "rehearsal.guard"

    bound: float = Field(
        default=1.1, gt=1, le=1e6, description="How many times its lowest value the mean loss on replayed rows may be."
    )
    window: int = Field(default=100, ge=1, lt=INT64, description="Measured steps that the mean is taken over.")
    action: Literal["warn", "raise_ratio", "stop"] = Field(
        default="warn",
        description="A warning; a higher ratio, step by step up to 'most'; or the end of the job with an error that "
        "names the last good checkpoint, also when the loss was NaN or infinite for a whole window.",
    )
    partitions: Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None, description="Keys of the partitions whose replayed rows are watched; all when left out."
    )
    factor: float = Field(default=1.5, gt=1, le=1e3, description="By which 'raise_ratio' multiplies the ratio.")
    most: float = Field(default=0.5, gt=0, lt=1, description="The highest ratio that 'raise_ratio' leads to.")


class Amounts(Protocol):
    """What is looked at of a `RehearsalConfig`."""

    @property
    def buffer(self) -> BufferConfig: ...

    @property
    def sampling(self) -> SamplingConfig: ...

    @property
    def ratio(self) -> float | RatioBudget | None: ...

    @property
    def representatives(self) -> int | None: ...

    @property
    def ratio_in(self) -> str: ...

    @property
    def ratio_schedule(self) -> RatioSchedule | None: ...

    @property
    def guard(self) -> GuardConfig | None: ...

    @property
    def losses_every(self) -> int: ...

    @property
    def exchange(self) -> ExchangeConfig: ...


def broken_amounts(config: Amounts) -> Iterator[str]:
    """What the ratio, its schedule, its budget and the guard ask of each other."""
    if config.ratio is not None and config.representatives is not None:
        yield "rehearsal.ratio and rehearsal.representatives both say how much is replayed; keep one of them"
    if config.ratio is None and config.ratio_schedule is not None:
        yield "rehearsal.ratio_schedule changes a ratio, and rehearsal.representatives is given; give 'ratio'"
    if config.ratio is None and config.ratio_in == "tokens":
        yield "rehearsal.ratio_in is 'tokens', and rehearsal.representatives counts rows; give 'ratio'"
    yield from _broken_budget(config)
    yield from _broken_guard(config)


def _broken_budget(config: Amounts) -> Iterator[str]:
    """What keeps the losses of partitions from being known, or the ratio from following them."""
    users = {
        "rehearsal.ratio.budget": isinstance(config.ratio, RatioBudget),
        "rehearsal.sampling.weights 'forgetting'": config.sampling.weights == "forgetting",
    }
    for user in (name for name, used in users.items() if used):
        if config.buffer.partition_by is None and config.buffer.partition is None:
            yield (
                f"rehearsal.buffer.partition_by is missing: {user} goes by the loss on each partition, as the loss on "
                "all rows falls with what is new, so name the batch field that tells them apart"
            )
        if not config.losses_every:
            yield f"{user} goes by the loss on replayed rows; set rehearsal.losses_every to 1 or more to measure it"
        if config.sampling.scope == "local":
            yield (
                f"{user} goes by what all ranks measured together, and rehearsal.sampling.scope is 'local', so that "
                "they tell each other nothing; set it to 'global'"
            )
        if config.exchange.on_failure == "local":
            yield (
                f"{user} goes by what all ranks measured together, and rehearsal.exchange.on_failure 'local' lets a "
                "rank go on without the others; set it to 'raise'"
            )
    if not isinstance(config.ratio, RatioBudget):
        return
    if config.ratio_schedule is not None:
        yield "rehearsal.ratio_schedule and rehearsal.ratio.budget both change the ratio; keep one of them"
    if config.guard is not None and config.guard.action == "raise_ratio":
        yield (
            "rehearsal.guard.action 'raise_ratio' and rehearsal.ratio.budget both change the ratio; let the guard "
            "'warn' or 'stop', for what is past saving"
        )


def _broken_guard(config: Amounts) -> Iterator[str]:
    """What keeps the guard from seeing or doing anything."""
    guard = config.guard
    if guard is None:
        return
    if not config.losses_every:
        yield "rehearsal.guard watches the loss on replayed rows; set rehearsal.losses_every to measure it"
    if guard.action == "raise_ratio" and config.ratio is None:
        yield "rehearsal.guard raises a ratio, and rehearsal.representatives is given; give 'ratio'"
    if guard.partitions is not None and config.buffer.partition_by is None:
        yield (
            "rehearsal.buffer.partition_by is missing: rehearsal.guard.partitions names partitions to watch, so "
            "name the batch field that tells them apart"
        )
    if config.sampling.scope == "local":
        yield (
            "rehearsal.guard watches what all ranks measured together, and rehearsal.sampling.scope is 'local', so "
            "that they tell each other nothing; set it to 'global'"
        )
    if guard.action == "raise_ratio" and isinstance(config.ratio, float) and config.ratio >= guard.most:
        yield (
            f"rehearsal.guard.most is {guard.most:g}, to which rehearsal.ratio {config.ratio:g} cannot be "
            "raised; give a higher one"
        )
