"""Wrapper of a strategy whose rows carry an embedding, the model's hidden states for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies.base import Part, Strategy
from rehearsal_plugin.strategies.hidden_states import HiddenStates

__all__ = ["RowEmbedding", "with_embedding"]


class RowEmbedding(Strategy):
    """Behaves as another strategy, and records the embedding of each row.

    The embedding of a new row comes from the forward in which it was new. With `refresh`, the present embedding is
    stored on the rank that holds the row whenever the row is replayed and `Rehearsal.loss` computes the loss.

    Args:
        inner: The other strategy.
        name: Name of the state with the embedding.
        embeddings: Returns the embeddings of all rows of the last forward, new ones first, `[rows, width]` float32.
        refresh: Whether replayed rows get new embeddings.
    """

    records = True

    def __init__(self, inner: Strategy, name: str, embeddings: Callable[[], Tensor], *, refresh: bool) -> None:
        super().__init__(inner.config)
        self._inner, self._name, self._embeddings, self._refresh = inner, name, embeddings, refresh
        self.draws, self.relearns, self.refreshes = inner.draws, inner.relearns, inner.refreshes or refresh
        self._rows = 0
        self._next: int | None = None  # first row of the next part to be refreshed

    @property
    def plain(self) -> bool:
        """See `Strategy.plain`."""
        return self._inner.plain

    @property
    def replayed_weight(self) -> float | None:
        """See `Strategy.replayed_weight`."""
        return self._inner.replayed_weight

    def tensors(self, outputs: Any) -> dict[str, Tensor]:
        """See `Strategy.tensors`."""
        tensors = self._inner.tensors(outputs)
        self._rows, self._next = len(next(iter(tensors.values()))), None
        return tensors

    def state(self, new: Part) -> dict[str, Tensor]:
        """See `Strategy.state`: the state of the other strategy, and the embedding `[rows, width]` float32."""
        return {**self._inner.state(new), self._name: self._last_embeddings()[: new.size]}

    def refresh(self, part: Part) -> dict[str, Tensor]:
        """See `Strategy.refresh`."""
        state = self._inner.refresh(self._without_embedding(part))
        if not self._refresh:
            return {**state, self._name: part.state[self._name]}
        # A plain strategy has one draw, the last rows. Any other had `loss` called before, which set the first row.
        start = self._rows - part.size if self._next is None else self._next
        self._next = start + part.size
        return {**state, self._name: self._last_embeddings()[start : self._next]}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Strategy.state_dict`."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_state_dict`."""
        self._inner.load_state_dict(state)

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`."""
        if self._inner.plain and not self._inner.records:
            return None  # its loss is the model's loss
        return self._inner.regularizer([self._without_embedding(part) for part in replayed])

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        self._next = new.size
        return self._inner.loss(new, [self._without_embedding(part) for part in replayed])

    def _last_embeddings(self) -> Tensor:
        embeddings = self._embeddings()
        if len(embeddings) != self._rows:
            raise BatchError(
                f"the hidden states that were seen last are those of {len(embeddings)} rows, and the outputs those of "
                f"{self._rows}; ask for the loss of each micro-batch before the model sees the next"
            )
        return embeddings

    def _without_embedding(self, part: Part) -> Part:
        return replace(part, state={name: value for name, value in part.state.items() if name != self._name})


def with_embedding(strategy: Strategy, retrieval: RetrievalConfig | None) -> tuple[Strategy, HiddenStates | None]:
    """The strategy as `retrieval.module` wants it, and what sees the hidden states; without a module, as it is."""
    if retrieval is None or retrieval.module is None:
        return strategy, None
    states = HiddenStates(retrieval.module, retrieval.pool, retrieval.mask, training_only=True)
    return RowEmbedding(strategy, retrieval.embedding, states.take, refresh=retrieval.refresh), states
