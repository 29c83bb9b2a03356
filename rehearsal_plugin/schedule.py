"""How many rows to replay, so that a ratio is met exactly over time."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from rehearsal_plugin.config import RehearsalConfig

__all__ = ["Schedule"]


class Schedule:
    """Whole numbers of rows whose running sum never strays from the ratio by a whole row a draw.

    `ratio` is the share of replayed rows in what the model sees: with b new rows and `mode: append` that is
    r / (b + r), with `mode: replace` it is r / b. The fraction that a batch cannot take is carried to the
    next. The arithmetic is rational: nothing drifts, and all ranks agree.

    Args:
        config: Gives `ratio` or `representatives`, and `mode`.
        turns: Independent draws that share the ratio; `representatives` are those of each.
    """

    def __init__(self, config: RehearsalConfig, turns: int = 1) -> None:
        self._fixed = config.representatives
        share = Fraction(str(config.ratio or 0))
        self._per_row = (share if config.mode == "replace" else share / (1 - share)) / turns
        self._carry = Fraction(0)

    def next(self, batch_size: int) -> int:
        """Rows to replay from each draw for another batch of `batch_size` rows."""
        if self._fixed is not None:
            return self._fixed
        due = self._carry + self._per_row * batch_size
        rows = due.numerator // due.denominator
        self._carry = due - rows
        return rows

    def state_dict(self) -> dict[str, int]:
        """The fraction that is carried to the next batch."""
        return {"numerator": self._carry.numerator, "denominator": self._carry.denominator}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: No fraction from 0 to below 1.
        """
        carry = Fraction(state["numerator"], max(1, state["denominator"]))
        if not 0 <= carry < 1:
            raise ValueError(f"{carry} rows are carried to the next batch")
        self._carry = carry
