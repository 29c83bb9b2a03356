"""What a model gained and lost from phase to phase, from its evaluation on every domain after every phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal_plugin.core.arrays import Float64Array

__all__ = ["Transfer"]


class Transfer:
    """Evaluations by phase and domain, and what the literature makes of them.

    Phase i trains on domain i; there may be more domains than phases. All figures are such that more is better but
    `forgetting`, `retained_loss` and `learned_loss`.

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
        known = self._phases[0] if self._phases else self._before
        if known is not None and row.shape != known.shape:
            raise ValueError(f"{len(row)} evaluations for {len(known)} domains")
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
        old = range(trained - 1)
        if len(old):
            gains = [self._sign * (last[i] - table[i, i]) for i in old]
            losses = [(self._sign * table[:-1, i]).max() - self._sign * last[i] for i in old]
            figures["retained_loss"] = float(last[: trained - 1].mean())
            figures["backward_transfer"] = float(np.mean(gains))
            figures["forgetting"] = float(np.mean(losses))
            if self._before is not None:
                ahead = [self._sign * (table[i - 1, i] - self._before[i]) for i in range(1, trained)]
                figures["forward_transfer"] = float(np.mean(ahead))
        return figures
