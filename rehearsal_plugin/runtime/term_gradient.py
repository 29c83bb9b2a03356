"""Whether the loss of a strategy was trained on: a term that reaches no gradient does nothing, whatever its weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rehearsal_plugin.errors import BatchError

__all__ = ["TermGradient", "TermGradients"]


class TermGradient:
    """Notes by hooks which gradients a backward pass computes: that of a term, and those of the outputs beside it.

    Args:
        term: The strategy's term or loss, a scalar.
        outputs: Tensors of the model that the term was made of.
    """

    def __init__(self, term: Tensor, outputs: Iterable[Tensor]) -> None:
        self._term = self._outputs = False
        term.register_hook(self._note_term)  # type: ignore[no-untyped-call]
        for tensor in outputs:
            if tensor.grad_fn is not None:
                tensor.register_hook(self._note_outputs)  # type: ignore[no-untyped-call]

    @property
    def lost(self) -> bool:
        """Whether the model learned from its outputs, and not from the term."""
        return self._outputs and not self._term

    def _note_term(self, _: Tensor) -> None:
        self._term = True

    def _note_outputs(self, _: Tensor) -> None:
        self._outputs = True


class TermGradients:
    """The terms of all micro-batches of a step."""

    def __init__(self) -> None:
        self._terms: list[TermGradient] = []

    def watch(self, term: Tensor, outputs: Iterable[Tensor]) -> None:
        """Expect a gradient of this term wherever there is one of the outputs; see `TermGradient`."""
        if term.grad_fn is not None:
            self._terms.append(TermGradient(term, outputs))

    def check(self, subject: str) -> None:
        """Refuse a step that left a term out.

        Args:
            subject: Which part of the section adds the term, for the message.

        Raises:
            BatchError: A gradient reached a model's outputs past the term.
        """
        if any(term.lost for term in self._terms):
            raise BatchError(
                f"the loss that was trained on leaves out the term of {subject}: it reached no gradient, so "
                "replay had no effect of its kind; train on the 'loss' that the model returns (or on its 'log_probs', "
                "which are weighted in place of it) or on that of rehearsal.loss(criterion, outputs, *targets) "
                "(handle.loss, and for a Trainer compute_loss_func=callback.loss(criterion))"
            )

    def clear(self) -> None:
        """Expect nothing any more, as after a step."""
        self._terms.clear()
