"""Whether a strategy's term was trained on: found by the gradients of a backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.term_gradient import TermGradients


def watched() -> tuple[TermGradients, Tensor, Tensor]:
    """Outputs of a model, a term that was made of them, and what watches the term."""
    outputs = torch.ones(3, requires_grad=True) * 2
    term = outputs.square().mean()
    terms = TermGradients()
    terms.watch(term, [outputs])
    return terms, outputs, term


def test_a_term_in_the_loss_is_fine() -> None:
    terms, outputs, term = watched()
    (outputs.sum() + term).backward()  # type: ignore[no-untyped-call]
    terms.check("strategy 'der'")


def test_a_loss_of_the_outputs_without_the_term_is_refused_with_the_cure() -> None:
    terms, outputs, _ = watched()
    outputs.sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(BatchError, match=r"leaves out the term of strategy 'der'.*rehearsal\.loss\(criterion"):
        terms.check("strategy 'der'")


def test_a_pass_without_a_backward_is_fine() -> None:
    terms, _, _ = watched()
    terms.check("strategy 'der'")


def test_a_term_without_a_gradient_is_not_watched() -> None:
    terms, outputs = TermGradients(), torch.ones(3, requires_grad=True) * 2
    terms.watch(torch.zeros(()), [outputs])
    outputs.sum().backward()  # type: ignore[no-untyped-call]
    terms.check("strategy 'der'")


def test_the_next_step_begins_anew() -> None:
    terms, outputs, _ = watched()
    outputs.sum().backward()  # type: ignore[no-untyped-call]
    terms.clear()
    terms.check("strategy 'der'")


def test_one_lost_term_among_several_is_enough() -> None:
    terms, outputs, term = watched()
    lost = outputs.abs().mean()
    terms.watch(lost, [outputs])
    (outputs.sum() + term).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(BatchError):
        terms.check("x")
