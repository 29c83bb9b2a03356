"""The interface of strategies, and their registry.

A strategy defines the state of a row (recorded when the row is new), the number of independent draws, and the loss over
new and replayed rows. It is pure: tensors in, tensors out. A micro-batch with two draws is cut into three parts:

    outputs of the model    new new new new | replayed replayed | replayed replayed
                            Part (new)        Part (draw 0)       Part (draw 1)
    state                   none yet          as recorded         as recorded
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

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
"""`criterion(outputs, *targets)`: the mean loss over these rows, a scalar."""


@dataclass(frozen=True)
class Part:
    """Part of a micro-batch: its new rows, or the replayed rows of one draw.

    Attributes:
        outputs: The model's outputs for these rows, nested as the model returned them.
        targets: Targets of the loss, each `[rows, ...]`.
        state: State recorded when the rows were new, by name, each `[rows, ...]`; empty for new rows.
        size: Number of rows.
        criterion: The task's loss.
        losses: The task's loss of each row `[rows]` float32, where it is known without the criterion; None otherwise.
    """

    outputs: Any
    targets: Sequence[Tensor]
    state: Mapping[str, Tensor]
    size: int
    criterion: Criterion
    losses: Tensor | None = None

    def loss(self) -> Tensor:
        """The task's loss, a mean over the rows of this part; 0 without rows, with a history for a backward pass."""
        if self.size:
            return self.criterion(self.outputs, *self.targets)
        of_none = (tensor.float().sum() for tensor in tensors_of(self.outputs).values() if not len(tensor))
        return sum(of_none, torch.zeros((), device="cpu"))

    def select(self, places: Tensor) -> Part:
        """The rows at `places` `[n]` int64, without their state."""

        def take(_: str, leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == self.size
            return leaf[places.to(leaf.device)] if batched else leaf

        outputs, targets = map_leaves((self.outputs, tuple(self.targets)), take)
        return Part(outputs, targets, {}, len(places), self.criterion)


class Strategy(ABC):
    """Base of all strategies.

    Attributes:
        draws: Independent draws in a step, all of the same number of rows.
        records: Whether rows carry state.
        refreshes: Whether replayed rows get new state, stored on the rank that holds them; see `refresh`.
        relearns: Whether `loss` contains the task's loss on replayed rows, which can then be weighted.
        reads: Keys of the section that this very class reads, of those that only some strategies do; None where it is
            not known, as in a subclass of your own.
        config: The section `rehearsal.strategy`.
    """

    reads: ClassVar[frozenset[str] | None] = None
    draws: int = 1
    records: bool = False
    refreshes: bool = False
    relearns: bool = True

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    @property
    def plain(self) -> bool:
        """Whether the strategy's loss is the mean loss over all rows, which a model can compute itself."""
        return False

    @property
    def replayed_weight(self) -> float | None:
        """What a replayed row counts for in a mean over all rows, where that is the strategy's loss; None for no."""
        return 1.0 if self.plain else None

    def tensors(self, outputs: Any) -> dict[str, Tensor]:
        """The outputs that the strategy uses, by dotted name; see `flatten`."""
        return flatten(outputs, self.config.outputs)

    def state(self, new: Part) -> dict[str, Tensor]:
        """State to store with each new row: tensors `[rows, ...]` by name; called after `loss`.

        The outputs carry no gradients. Without a call of `loss`, there are no targets.
        """
        return {}

    def refresh(self, part: Part) -> dict[str, Tensor]:
        """New state for the replayed rows of one draw, under the same names; called after `loss`."""
        return dict(part.state)

    def state_dict(self) -> dict[str, Tensor]:
        """State of the strategy itself, for checkpoints; empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: It is the state of another strategy.
        """
        if state:
            raise ValueError(f"strategy '{self.config.name}' remembers nothing, and is given {sorted(state)}")

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """Term to add to a loss that the model computed itself over all rows; None for no term.

        Raises:
            ConfigError: The strategy needs the losses of new and replayed rows apart.
        """
        return None

    @abstractmethod
    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """The loss of a step, a scalar.

        Args:
            new: The rows of the batch.
            replayed: One part for each draw; empty before anything is replayed.
        """


S = TypeVar("S", bound=type[Strategy])


def register(name: str) -> Callable[[S], S]:
    """Make a strategy available as `rehearsal.strategy.name`."""
    return STRATEGIES.register(name)


def make_strategy(config: StrategyConfig) -> Strategy:
    """Make the strategy that the section names.

    Raises:
        ConfigError: No strategy is registered under that name.
    """
    strategy: Strategy = STRATEGIES[config.name](config)
    return strategy


def flatten(outputs: Any, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a model's outputs by dotted name; a lone tensor is called `"output"`.

    Args:
        outputs: A tensor, or any nesting of mappings, lists and tuples.
        only: Names of the tensors; None takes all tensors but scalars.

    Raises:
        BatchError: There is no tensor, or one that `only` names is missing.
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
    """The mean squared error between present and recorded outputs, averaged over the recorded tensors.

    Raises:
        BatchError: An output is missing, or has another shape than the recorded one.
    """
    for name, stored in state.items():
        if name not in tensors or tensors[name].shape != stored.shape:
            problem = f"has {tuple(tensors[name].shape[1:])}" if name in tensors else "is missing"
            raise BatchError(
                f"the model's output '{name}' was recorded with shape {tuple(stored.shape[1:])} a row and now "
                f"{problem}; name outputs that keep their shape in rehearsal.strategy.outputs"
            )
    errors = [functional.mse_loss(tensors[name].float(), stored.float()) for name, stored in state.items()]
    return torch.stack(errors).mean()
