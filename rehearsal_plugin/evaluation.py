"""Forgetting and transfer from phase to phase, from an evaluation of every domain after every phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal_plugin.core.arrays import Float64Array

__all__ = ["Transfer"]


class Transfer:
    """A table of evaluations, a row a phase and a column a domain, and the figures that the literature makes of it.

    Phase i trains on domain i; there may be more domains than phases. All figures are such that more is better but
    `forgetting`, `retained_loss` and `learned_loss`. Losses of three domains after each of three phases:

    >>> transfer = Transfer()
    >>> for losses in ([2.0, 4.0, 5.0], [2.5, 1.5, 4.5], [2.25, 2.0, 1.0]):
    ...     transfer.add(losses)
    >>> transfer.figures()["forgetting"]  # the mean of 2.25 - 2.0 and 2.0 - 1.5
    0.375

    Args:
        before: `[domains]`, the evaluation of every domain before the first phase; None where that is not known.
        lower_is_better: True for losses and errors, False for accuracies.
    """

    def __init__(self, before: Sequence[float] | None = None, *, lower_is_better: bool = True) -> None:
        self._before = None if before is None else np.asarray(before, dtype=np.float64)
        self._sign = -1.0 if lower_is_better else 1.0
        self._phases: list[Float64Array] = []

    def add(self, evaluations: Sequence[float]) -> None:
        """The evaluation of every domain after one more phase, `[domains]`.

        Raises:
            ValueError: There are more or fewer domains than before.
        """
        row = np.asarray(evaluations, dtype=np.float64)
        first = self._phases[0] if self._phases else self._before
        if first is not None and row.shape != first.shape:
            raise ValueError(f"{len(row)} evaluations for {len(first)} domains")
        self._phases.append(row)

    def figures(self) -> dict[str, float]:
        """All figures that the evaluations so far allow; none before the first phase.

        Returns:
            `average`: over the domains trained on, after the last phase.
            `learned_loss`: the evaluation of the domain trained on last; the name is that of Abbes et al., "Revisiting
                replay and gradient alignment for continual pre-training of large language models", 2025.
            `retained_loss`: the mean over the domains before it, after the last phase; the name is theirs, too.
            `backward_transfer`: mean over the domains before the last of how much better they are now than right after
                their own phase (Lopez-Paz and Ranzato, "Gradient episodic memory", 2017); below 0 is forgetting.
            `forgetting`: mean over the same domains of how much worse they are now than at their best after any
                earlier phase (Chaudhry et al., "Riemannian walk", 2018); below 0 if they never were better.
            `forward_transfer`: mean over the domains from the second on of how much better they were right before
                their own phase than before the first (Lopez-Paz and Ranzato, 2017); needs `before`.
        """
        if not self._phases:
            return {}
        table = np.stack(self._phases)
        last, trained = table[-1], min(table.shape)
        figures = {"average": float(last[:trained].mean()), "learned_loss": float(last[trained - 1])}
        if trained > 1:
            figures["retained_loss"] = float(last[: trained - 1].mean())
            figures |= self._transfers(self._sign * table, trained)
        return figures

    def _transfers(self, better: Float64Array, trained: int) -> dict[str, float]:
        """Transfer and forgetting of a table `[phases, domains]` in which more is better."""
        last = better[-1, : trained - 1]
        figures = {
            "backward_transfer": float(np.mean(last - better.diagonal()[: trained - 1])),
            "forgetting": float(np.mean(better[:-1, : trained - 1].max(axis=0) - last)),
        }
        if self._before is not None:
            right_before = better.diagonal(offset=1)[: trained - 1]  # domain i after phase i - 1
            figures["forward_transfer"] = float(np.mean(right_before - self._sign * self._before[1:trained]))
        return figures
