"""What a strategy is, and where it is registered.

A strategy says what a row carries beside the batch (its state, recorded when the row was seen), how many
independent draws it takes, and the loss over new and replayed rows. It is pure: tensors in, tensors out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.config import StrategyConfig
from rehearsal_plugin.config.registries import STRATEGIES
from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.errors import BatchError

__all__ = [
    "STRATEGIES",
    "Criterion",
    "Part",
    "Strategy",
    "distance",
    "flatten",
    "make_strategy",
    "register",
    "tensors_of",
]

Criterion = Callable[..., Tensor]
"""`criterion(outputs, *targets)`: the mean loss over the rows it is given, a scalar."""


@dataclass(frozen=True)
class Part:
    """Rows of one kind in what the model saw: new ones, or one draw of replayed ones.

    Attributes:
        outputs: The model's outputs for these rows, in the nesting that the model gave.
        targets: What the loss compares them with, each `[rows, ...]`.
        state: What was recorded when the rows were seen, by name, each `[rows, ...]`; empty for new rows.
        size: Rows.
        criterion: The task's loss.
    """

    outputs: Any
    targets: Sequence[Tensor]
    state: Mapping[str, Tensor]
    size: int
    criterion: Criterion

    def loss(self) -> Tensor:
        """The task's loss, a mean over the rows of this part; 0 where replayed rows displaced all new ones."""
        return self.criterion(self.outputs, *self.targets) if self.size else torch.zeros(())

    def select(self, places: Tensor) -> Part:
        """Some of the rows, `places` `[n]` int64, without their state."""

        def some(_: str, leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == self.size
            return leaf[places.to(leaf.device)] if batched else leaf

        outputs, targets = map_leaves((self.outputs, tuple(self.targets)), some)
        return Part(outputs, targets, {}, len(places), self.criterion)


class Strategy(ABC):
    """Base of all strategies.

    Attributes:
        draws: Independent draws a step; each brings as many rows.
        records: Whether rows carry state.
        refreshes: Whether replayed rows get new state, stored where they live; see `refresh`.
        relearns: Whether `loss` takes the task's loss on replayed rows, so that it can be weighted.
        config: The section `rehearsal.strategy`.
    """

    draws: int = 1
    records: bool = False
    refreshes: bool = False
    relearns: bool = True

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    @property
    def plain(self) -> bool:
        """Whether the mean loss over all rows, as a model may compute it itself, is the strategy's loss."""
        return False

    def tensors(self, outputs: Any) -> dict[str, Tensor]:
        """The outputs that the strategy looks at, by dotted name; see `flatten`."""
        return flatten(outputs, self.config.outputs)

    def state(self, new: Part) -> dict[str, Tensor]:
        """What to store beside each new row: tensors `[rows, ...]` by name; asked for after `loss`.

        The outputs have no history. Where they are recorded without a loss, there are no targets.
        """
        return {}

    def refresh(self, part: Part) -> dict[str, Tensor]:
        """New state for the replayed rows of one draw, by the names of their state; asked for after `loss`."""
        return dict(part.state)

    def state_dict(self) -> dict[str, Tensor]:
        """What the strategy itself remembers from step to step, for checkpoints; nothing unless it says so."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: It is that of another strategy.
        """
        if state:
            raise ValueError(f"strategy '{self.config.name}' remembers nothing, and is given {sorted(state)}")

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """What to add to a loss that the model computed itself over all rows; None for nothing.

        Raises:
            ConfigError: The strategy cannot go on from such a loss.
        """
        return None

    @abstractmethod
    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """The loss of a step, a scalar.

        Args:
            new: The rows of the batch.
            replayed: One part a draw; empty parts are left out, so there may be none.
        """


S = TypeVar("S", bound=type[Strategy])


def register(name: str) -> Callable[[S], S]:
    """Make a strategy available as `rehearsal.strategy.name`."""
    return STRATEGIES.register(name)


def make_strategy(config: StrategyConfig) -> Strategy:
    """The strategy that the section names.

    Raises:
        ConfigError: None is registered by that name.
    """
    strategy: Strategy = STRATEGIES[config.name](config)
    return strategy


def flatten(outputs: Any, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a model's outputs by dotted name; a lone tensor is called `"output"`.

    Args:
        outputs: A tensor, or any nesting of mappings, lists and tuples.
        only: Names to take; None takes all tensors but scalars.

    Raises:
        BatchError: There is none, or not all of those named.
    """
    tensors = tensors_of(outputs)
    missing = set(only or ()) - set(tensors)
    if missing or not tensors:
        raise BatchError(
            f"the model's output, a {type(outputs).__name__}, has the tensors {sorted(tensors)}"
            + (
                f"; rehearsal.strategy.outputs names {sorted(missing)}"
                if missing
                else ", so there is nothing to replay"
            )
        )
    return {name: tensor for name, tensor in tensors.items() if only is None or name in only}


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """All tensors but scalars in any nesting of mappings, lists and tuples, by dotted name; see `flatten`."""
    tensors: dict[str, Tensor] = {}

    def collect(name: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.ndim:
            tensors[name or "output"] = leaf

    map_leaves(tree, collect)
    return tensors


def distance(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Tensor:
    """The mean squared error between outputs and recorded ones, averaged over the tensors that were recorded.

    Raises:
        BatchError: An output is missing, or has not the shape that it was recorded with.
    """
    for name, stored in state.items():
        if name not in tensors or tensors[name].shape != stored.shape:
            found = f"has {tuple(tensors[name].shape[1:])}" if name in tensors else "is missing"
            raise BatchError(
                f"the model's output '{name}' was recorded with shape {tuple(stored.shape[1:])} a row and now {found}; "
                "name outputs that keep their shape in rehearsal.strategy.outputs"
            )
    errors = [functional.mse_loss(tensors[name].float(), stored.float()) for name, stored in state.items()]
    return torch.stack(errors).mean()
